"""Build the prover's page: its own files, the package as a zip, and Python for the browser where ``fetch.py`` has brought it.

python docs/prover/build.py site

"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PAGE = ("index.html", "prover.css", "prover.js", "composer.js", "worker.js")
NOT_NEEDED = (
    "cli",
    "compiling",
    "embedded",
    "instrument",
    "models",
    "rocq",
    "verification",
)  # rooms that prove nothing
BUT = ("cli/__init__.py", "cli/name_clash.py")  # what `import controllability` itself loads


def core(file: Path) -> None:
    """The package without the rooms for live models, and what the page asks it, as a zip that Python imports from."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for package in ("controllability", "architectures"):
            sources = (p for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".css", ".js"))
            for source in sorted(sources):
                inside = source.relative_to(ROOT / package)
                if inside.parts[0] not in NOT_NEEDED or inside.as_posix() in BUT:
                    _add(packed, source, f"{package}/{inside.as_posix()}")
        for name in ("__init__", "answers", "examples", "expressions"):
            _add(packed, HERE / f"{name}.py", f"prover/{name}.py")


def _add(packed: zipfile.ZipFile, source: Path, name: str) -> None:
    entry = zipfile.ZipInfo(name)  # a fixed date: equal sources give equal bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    packed.writestr(entry, source.read_bytes())


def offered() -> dict[str, object]:
    """Examples and parts, each with its tree."""
    sys.path[:0] = [str(ROOT), str(HERE.parent)]
    from controllability.solvers.norm_scale import ROUTES
    from prover.examples import EXAMPLES, PALETTE
    from prover.expressions import outline, read

    examples = [
        {"title": title, "expression": text, "options": options, "outline": outline(read(text))}
        for title, text, options in EXAMPLES
    ]
    palette = [{"title": title, "outline": outline(read(text))} for title, text in PALETTE]
    return {"examples": examples, "palette": palette, "routes": ROUTES}


def build(site: Path) -> list[Path]:
    """Write the page under ``site/prover``; returns what was written."""
    out = Path(site) / "prover"
    out.mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    if not (Path(site) / "site/katex/katex.min.js").exists():  # formulas are shown as their source then
        page = (out / "index.html").read_text(encoding="utf-8").splitlines(keepends=True)
        (out / "index.html").write_text("".join(line for line in page if "/katex/" not in line), encoding="utf-8")
    (out / "offered.js").write_text(f"const OFFERED = {json.dumps(offered())};\n", encoding="utf-8")
    core(out / "core.zip")
    written = [out / name for name in (*PAGE, "offered.js", "core.zip")]
    if (fetched := HERE / "pyodide").is_dir():
        shutil.copytree(fetched, out / "pyodide", dirs_exist_ok=True)
        written += [out / "pyodide" / file.name for file in fetched.iterdir()]
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/prover/build.py SITE")
    print(*build(Path(sys.argv[1])), sep="\n")
