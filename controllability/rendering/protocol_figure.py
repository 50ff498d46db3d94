"""The figure of the papers' section 4: agreement on every route in every dtype, and KL from token to token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controllability.rendering.figure import drawn, two_plots

COLOURS = {"float64": "#555555", "float32": "#2a6fbb", "bfloat16": "#bb5a2a", "float16": "#3c8d4f"}
SMALLEST = 1e-18  # what KL is drawn at where it is 0


def protocol_picture(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the rows of ``controllability protocol`` to ``path`` (.svg or .png); a refused row has a cross at the bottom."""
    figure, (left, right) = two_plots(size=(10, 4.8))
    routes, dtypes = ([*dict.fromkeys(row[name] for row in rows)] for name in ("route", "dtype"))
    for row in rows:
        colour, share = COLOURS[row["dtype"]], row["agreement"]
        x = routes.index(row["route"]) + 0.18 * (dtypes.index(row["dtype"]) - (len(dtypes) - 1) / 2)
        if share is None:
            left.plot(x, 0, "x", color=colour)
            continue
        bars = [[share - row["agreement_interval"][0]], [row["agreement_interval"][1] - share]]
        left.errorbar(x, share, bars, fmt="o", color=colour, capsize=3)
        left.plot(x, row["agreement_unpatched"], "o", color=colour, fillstyle="none")
        kl = [max(value, SMALLEST) for value in row["kl_by_token"]]
        right.semilogy(range(1, len(kl) + 1), kl, ".-"[len(kl) > 1 :], color=colour, alpha=0.7, linewidth=1)
    left.set(ylim=(-0.04, 1.04), ylabel="same token as with the context", title="agreement, 95 % interval")
    left.set_xticks(range(len(routes)), routes)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="token", ylabel="largest KL of the prompts (nats)", title="KL, a line for each route")
    marks = [("unpatched", "o", "k"), ("refused", "x", "k")]
    for label, mark, colour in [*((d, "o", COLOURS[d]) for d in dtypes), *marks]:
        left.plot([], [], mark, color=colour, label=label, fillstyle="none" if label == "unpatched" else "full")
    figure.legend(loc="outside lower center", ncols=len(dtypes) + 2, frameon=False)
    return drawn(figure, path)
