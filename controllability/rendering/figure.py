"""Figures in one style."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Heat:
    """Numbers as colours: ``values`` has a row for each of ``rows``; the smaller tables have them written in."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]

    def draw(self, axes: Any) -> None:
        """On these axes, 0 white."""
        most = max((abs(v) for row in self.values for v in row if math.isfinite(v)), default=1) or 1
        image = axes.imshow(self.values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        axes.figure.colorbar(image, ax=axes)
        step, words = -(-len(self.columns) // 40), {"fontsize": "small", "parse_math": False}
        axes.set_xticks(range(0, len(self.columns), step), self.columns[::step], rotation=60, ha="right", **words)
        axes.set_yticks(range(len(self.rows)), self.rows, **words)
        for y, row in enumerate(self.values if len(self.rows) * len(self.columns) <= 200 else ()):
            for x, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 * most else "black"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize="x-small", color=colour)


@dataclass(frozen=True)
class Lines:
    """Curves over ``x``, told apart by marks as well as by colours."""

    title: str
    along: str
    up: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float]]

    def draw(self, axes: Any) -> None:
        """On these axes, with a legend below."""
        for mark, (name, values) in zip(itertools.cycle("os^vDP*X"), self.lines.items(), strict=False):
            axes.plot(self.x, values, marker=mark, markersize=4, linewidth=1, label=name)
        axes.set_xlabel(self.along)
        axes.set_ylabel(self.up)
        if len(self.lines) > 1:
            axes.legend(fontsize="x-small", frameon=False, ncols=1 + len(self.lines) // 8)


Panel = Heat | Lines


def figure_of(panels: Sequence[Panel], path: "str | Path | None" = None) -> Any:
    """A matplotlib figure of the panels below each other, drawn without a display; with ``path`` it is written there, and the path returned."""
    from matplotlib.figure import Figure

    wide = max((len(panel.columns) for panel in panels if isinstance(panel, Heat)), default=0)
    heights = [2.2 + 0.25 * len(panel.rows) if isinstance(panel, Heat) else 4 for panel in panels]
    figure = Figure(figsize=(min(16, max(7, 2 + 0.5 * wide)), sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_title(panel.title, parse_math=False)
        panel.draw(axes)
    return figure if path is None else drawn(figure, Path(path))
