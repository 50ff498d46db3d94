"""Figures in one style."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def two_plots(rows: int = 1, size: tuple[float, float] = (10, 4)) -> "tuple[Figure, Any]":
    """A figure of two plots in each row, ``size`` inches wide and high, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, 2, figsize=size, layout="constrained")


def legend_below(axes: Any, below: float = -0.16) -> None:
    """The legend under the axes, where it covers nothing; ``below`` in heights of them."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=2, fontsize="small", frameon=False)


def drawn(figure: "Figure", path: Path, dpi: int = 120, **how: Any) -> Path:
    """Write a figure to ``path`` (PNG, or as its suffix says; atomically) and close it; returns the path."""
    from matplotlib import pyplot, rc_context

    temporary = path.with_name(f".{path.name}.part")
    try:
        with rc_context({"svg.fonttype": "none"}):  # words stay words, and the file small
            figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=dpi, **how)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)
    return path
