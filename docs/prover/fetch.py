"""Bring Python for the browser: Pyodide's core from npm, SymPy and mpmath from PyPI, each with its checksum.

    python docs/prover/fetch.py            # into docs/prover/pyodide, which build.py copies into a site
    python docs/prover/fetch.py site       # and into a site that is built already

SymPy is compiled for Pyodide's own Python, so that the page need not compile it (12 s of one core).  npm and node must be there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
PYODIDE = "314.0.7"
CORE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
WHEELS = ("sympy==1.14.0", "mpmath==1.3.0")
SUMS = {
    "pyodide-314.0.7.tgz": "66b7949e5a0cba2250b586d7e368bf12fb482800748d182c4618254b685ffaa0",
    "sympy-1.14.0-py3-none-any.whl": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "mpmath-1.3.0-py3-none-any.whl": "a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c",
}


def checked(file: Path) -> Path:
    """The file, its SHA-256 as it was when this was written.  Raises ``SystemExit`` for another one."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SUMS[file.name]:
        raise SystemExit(f"{file.name}: its SHA-256 is {found}, expected {SUMS[file.name]}; nothing was written")
    return file


def fetch(out: Path) -> None:
    """Write the five files of Pyodide, SymPy with mpmath, and a list of all with their sizes."""
    for tool in ("npm", "node"):
        if shutil.which(tool) is None:
            raise SystemExit(
                f"{tool} is not installed: Pyodide is brought by npm, and SymPy compiled by node (nodejs.org)"
            )
    with TemporaryDirectory() as scratch:
        new = Path(scratch)
        subprocess.run(
            ["npm", "pack", "--silent", f"pyodide@{PYODIDE}"], cwd=new, check=True, stdout=subprocess.DEVNULL
        )
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(new),
            *WHEELS,
        ]
        subprocess.run(pip, check=True)
        archive, *wheels = [checked(new / name) for name in SUMS]
        with tarfile.open(archive) as packed:
            packed.extractall(new, filter="data")
        compiled = ["node", str(HERE / "compile.mjs"), str(new / "package"), str(new / "sympy.zip"), *map(str, wheels)]
        subprocess.run(compiled, check=True)
        files = [*(new / "package" / name for name in CORE), new / "sympy.zip"]
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, out / file.name)
        (out / "files.json").write_text(json.dumps({file.name: file.stat().st_size for file in files}, indent=1) + "\n")


if __name__ == "__main__":
    fetch(HERE / "pyodide")
    for site in sys.argv[1:]:
        shutil.copytree(HERE / "pyodide", Path(site) / "prover/pyodide", dirs_exist_ok=True)
