"""Peak memory of making and trying a patch, against the plain target and source runs: ``python tests/benchmarks/memory.py MODEL``.

MODEL is a directory; every number is the peak (VmHWM, Linux) of a process of its own that loads the model.  ``plain`` runs target
and source with ``logits_to_keep`` (the query's tokens; 1 for scope last), ``python`` makes the patch and runs the source under it,
``command`` is ``controllability patch``.  Prints a table: MB, and the ratios to ``plain``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

from common import markdown

CONTEXT = "Wes orders some milk."
QUERY = "What does Wes order at the shop in the city of Rome today"
HOW = ("plain", "python", "command")


def peak() -> int:
    """The most memory that this process had, in MB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) // 1024


def run(how: str, model: str, context: str, query: str, scope: str) -> None:
    """What one process does."""
    if how == "command":
        from controllability.cli.main import main as command

        with contextlib.redirect_stdout(io.StringIO()):
            status = command(["patch", model, "--context", context, "--query", query, "--scope", scope, "--json"])
        assert status == 0
        return
    import torch

    import controllability as ct
    from controllability.models.loading import encode, load_model

    loaded, tokenizer = load_model(model)
    target, source = encode(tokenizer, context, query)
    kept = {"use_cache": False, "logits_to_keep": 1 if scope == "last" else source["input_ids"].shape[1]}
    with torch.no_grad():
        if how == "plain":
            loaded(**target, **kept)
            loaded(**source, **kept)
            return
        mp = ct.patch_model(loaded, target, source, scope)
        with mp.applied(loaded):
            loaded(**source, **kept)


def measured(how: str, model: str, context: int, query: int, scope: str) -> int:
    """MB of a fresh process; ``context`` and ``query`` in sentences."""
    texts = [" ".join([text] * count) for text, count in ((CONTEXT, context), (QUERY, query))]
    command = [sys.executable, __file__, model, "--one", how, *texts, scope]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, nargs="+", default=[4, 200], help="sentences of 4 words")
    parser.add_argument("--query", type=int, nargs="+", default=[1, 25], help="sentences of 13 words")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        how, context, query, scope = args.one
        run(how, args.model, context, query, scope)
        print(peak())
        return
    rows = []
    for scope in ("each", "last"):
        for context in args.context:
            for query in args.query:
                plain, *others = (measured(how, args.model, context, query, scope) for how in HOW)
                rows.append([scope, 4 * context, 13 * query, plain, *others, *(other / plain for other in others)])
    columns = ["scope", "words of context", "words of query", *(f"{how}, MB" for how in HOW), "python", "command"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
