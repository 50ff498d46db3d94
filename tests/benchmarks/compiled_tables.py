"""The tables of ``compiled.py``: means over the contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import markdown, median
from compiled_sets import SETS

Row = dict[str, Any]


def reached_table(tasks: Sequence[Row]) -> str:
    """What each method reaches on each set, one method a line."""
    columns = ["method", "done", "seconds", "logit error"]
    for name in SETS:
        columns += [f"{name}: top-1", "KL", "right"]
    methods = dict.fromkeys(row["method"] for task in tasks for row in task["rows"])
    return markdown(
        columns, [_line(name, [r for t in tasks for r in t["rows"] if r["method"] == name]) for name in methods]
    )


def _line(method: str, rows: Sequence[Row]) -> list[Any]:
    done = [row for row in rows if "sets" in row]
    share = f"{len(done)}/{len(rows)}"
    if not done:
        return [method, share, *["-"] * (2 + 3 * len(SETS))]
    worst = max(row["sets"]["queries"]["max_logit_error"] for row in done)
    line: list[Any] = [method, share, median(row["seconds"] for row in done), worst]
    for name in SETS:
        for measure in ("top1_agreement", "kl", "accuracy"):
            line.append(sum(row["sets"][name][measure] for row in done) / len(done))
    return line


def ratio_table(tasks: Sequence[Row]) -> str:
    """Seconds of the exact solution ÷ those of distillation; in how many contexts the KL was never reached."""
    lines = []
    for name in dict.fromkeys(name for task in tasks for name in task["ratios"]):
        found = [task["ratios"][name] for task in tasks if name in task["ratios"]]
        never = f"{sum(not f['reached'] for f in found)}/{len(found)}"
        lines.append([name, median(f["ratio"] for f in found), max(f["ratio"] for f in found), never])
    return markdown(["exact ÷", "median", "worst", "never reached"], lines)
