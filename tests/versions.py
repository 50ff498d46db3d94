"""Which versions of transformers and torch the package runs beside.

    python tests/versions.py 5.0.0/2.13.0 5.24.0/2.14.1 [--in FOLDER]

For each pair (transformers/torch) a virtual environment is made, everything is installed into it, and the tests of
``KINDS`` run there on this checkout.  A row of a Markdown table comes out (docs/versions.md): how many passed, and how
many families that version of transformers does not have.  What failed is printed below.  ``--in`` keeps the environments
in a folder, where they are found again.  torch from PyPI may bring gigabytes of CUDA.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
KINDS = {
    "families, exact": ["tests/test_families.py", "-k", "test_patched_exactly"],
    "live Gemma": ["tests/test_live_gemma.py"],
    "applied, merged, saved": ["tests/test_applied_runs.py", "tests/test_merging_safely.py", "tests/test_saving.py"],
    "generation": ["tests/test_generation.py", "tests/test_streaming.py"],
    "embedded, compiled": ["tests/test_embedded.py", "tests/test_compiling.py"],
    "GGUF, adapters": ["tests/test_gguf.py", "tests/test_adapters.py"],
}


def environment(folder: Path, transformers: str, torch: str) -> Path:
    """The Python of a virtual environment with these versions, made if it is not there."""
    where = folder / f"{transformers}-{torch}"
    python = where / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", where], check=True)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        needed = [*project["dependencies"], *extras["peft"], *extras["gguf"], "pytest>=8,<10", "jsonschema"]
        others = [one for one in needed if not one.startswith(("torch>", "transformers>", "tokenizers>"))]
        pins = [f"torch=={torch}", f"transformers=={transformers}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, *others], check=True)
    return python


def counts(python: Path, tests: list[str]) -> tuple[int, int, list[str]]:
    """(passed, not there, names and reasons of what failed) of some tests in an environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-m", "not slow or slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [python, "-m", "pytest", *options, *tests], cwd=ROOT, env=environ, capture_output=True, text=True
        )
        if not report.is_file():
            return 0, 0, [ran.stdout[-300:] + ran.stderr[-300:]]
        cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = []
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed.append(f"{case.get('name')}: {(problem.get('message') or '').splitlines()[0][:200]}")
    absent = [one for one in skipped if "not there" in str(one.find("skipped").get("message"))]  # type: ignore[union-attr]
    return len(cases) - len(skipped) - len(failed), len(absent), failed


def main() -> None:
    """A row a pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("pairs", nargs="+", metavar="TRANSFORMERS/TORCH")
    parser.add_argument("--in", dest="folder", type=Path)
    chosen = parser.parse_args()
    print(f"| transformers | torch | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for pair in chosen.pairs:
            python = environment(chosen.folder or Path(scratch), *pair.split("/"))
            cells, problems = [], []
            for tests in KINDS.values():
                passed, absent, failed = counts(python, tests)
                cells.append(
                    f"{passed} passed"
                    + f", {absent} not there" * bool(absent)
                    + f", {len(failed)} failed" * bool(failed)
                )
                problems += failed
            print(f"| {pair.replace('/', ' | ')} | {' | '.join(cells)} |", *problems, sep="\n", flush=True)


if __name__ == "__main__":
    main()
