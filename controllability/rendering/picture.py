"""Pictures of a patch: every layer's error before and after, and how large the patches are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

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


def layer_picture(model: Any, patch: Any, target: Mapping[str, Any], source: Mapping[str, Any], path: Path) -> Path:
    """Draw one patched pair of runs to ``path`` (PNG, written atomically); returns the path."""
    before = unpatched_errors(model, target, source, patch.scope)
    layers = patch.report.layers
    index = range(len(layers))
    figure, (errors, sizes) = two_plots()
    errors.bar([i - 0.2 for i in index], before, 0.4, label="without the context", color="#bb5a2a")
    errors.bar(
        [i + 0.2 for i in index], [max(x.residual, 1e-17) for x in layers], 0.4, label="patched", color="#2a6fbb"
    )
    errors.set(
        yscale="log",
        xlabel="layer",
        ylabel="relative error of the layer's output",
        xticks=[*index],
        title="error against the contextual run",
    )
    errors.legend(loc="lower left")
    names = [*dict.fromkeys(_short(name) for x in layers for name in x.relative_changes)]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [next((v or 0.0 for n, v in x.relative_changes.items() if _short(n) == name), 0.0) for x in layers]
        sizes.bar([i + (k - (len(names) - 1) / 2) * width for i in index], heights, width, label=name)
    sizes.set(
        yscale="log",
        xlabel="layer",
        ylabel="relative change (largest over the words)",
        xticks=[*index],
        title="size of the patches",
    )
    sizes.legend(fontsize="small")
    return drawn(figure, path)


@torch.no_grad()
def unpatched_errors(model: Any, target: Mapping[str, Any], source: Mapping[str, Any], scope: str) -> list[float]:
    """The negative control: relative error of each layer's output in the plain source run."""
    from controllability.models.pairing import pair
    from controllability.models.reading_check import checked_reading
    from controllability.models.running import without_cache
    from controllability.models.sweep import observe_target, residual_of
    from controllability.models.watch import LayerHooks

    source_rows, target_rows = pair(target, source, scope)
    checked = checked_reading(model)
    with LayerHooks(model, checked.reading) as hooks:
        runs = [
            observe_target(hooks, without_cache(model, inputs), rows, lambda *_: None)[0]
            for inputs, rows in ((source, source_rows), (target, target_rows))
        ]
    calls = [[call for layer in run for call in layer] for run in runs]
    return [residual_of(s.outputs[()], t.outputs[()]) for s, t in zip(*calls, strict=True)]


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
