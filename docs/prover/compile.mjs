// node compile.mjs PYODIDE OUT.zip WHEEL…: the wheels' modules compiled by Pyodide's own Python, without their tests.
import fs from "fs";
import path from "path";
import { pathToFileURL } from "url";

const [pyodide, out, ...wheels] = process.argv.slice(2).map((given) => path.resolve(given));
const { loadPyodide } = await import(pathToFileURL(path.join(pyodide, "pyodide.mjs")));
const python = await loadPyodide({ indexURL: pyodide + path.sep });
wheels.forEach((file, i) => python.FS.writeFile(`/${i}.whl`, fs.readFileSync(file)));
python.globals.set("count", wheels.length);
python.runPython(`
import importlib._bootstrap_external as loader, warnings, zipfile
warnings.simplefilter("ignore")
LEFT_OUT = ("/tests/", "/benchmarks/", "sympy/physics/", "sympy/crypto/")
with zipfile.ZipFile("/out.zip", "w", zipfile.ZIP_DEFLATED) as out:
    for i in range(count):
        with zipfile.ZipFile(f"/{i}.whl") as wheel:
            for name in wheel.namelist():
                if ".dist-info/" in name:  # licences among it
                    out.writestr(name, wheel.read(name))
                elif name.endswith(".py") and not any(part in name for part in LEFT_OUT):
                    code = compile(wheel.read(name), name, "exec", dont_inherit=True)
                    out.writestr(name + "c", bytes(loader._code_to_timestamp_pyc(code)))
`);
fs.writeFileSync(out, python.FS.readFile("/out.zip"));
