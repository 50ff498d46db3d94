"""Figures in one style."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def two_plots() -> tuple[Figure, tuple[Axes, Axes]]:
    """A figure of two plots, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    return figure, (left, right)


def drawn(figure: Figure, path: Path) -> Path:
    """Write a figure to ``path`` (PNG, atomically) and close it; returns the path."""
    from matplotlib import pyplot

    temporary = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)
    return path
