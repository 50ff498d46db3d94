"""Figures in one style."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def two_plots(rows: int = 1, size: tuple[float, float] = (10, 4)) -> tuple[Figure, Any]:
    """A figure of two plots in each row, ``size`` inches wide and high, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, 2, figsize=size, layout="constrained")


def drawn(figure: Figure, path: Path, dpi: int = 120, **how: Any) -> Path:
    """Write a figure to ``path`` (PNG, atomically) and close it; returns the path."""
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, format="png", dpi=dpi, **how)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)
    return path
