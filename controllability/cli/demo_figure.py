"""Pictures of a patch: every layer's error before and after, and how large the patches are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from controllability.arrays import relative_error
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.target_run import observe_target, silent
from controllability.rendering.figure import drawn, two_plots


def layer_picture(model: Any, patch: Any, target: Mapping[str, Any], source: Mapping[str, Any], path: Path) -> Path:
    """Draw one patched pair of runs to ``path`` (PNG, written atomically); returns the path."""
    before = unpatched_errors(model, target, source, patch.scope)
    layers = patch.report.layers
    index = range(len(layers))
    scales = {"yscale": "log", "xlabel": "layer", "xticks": [*index]}
    figure, (errors, sizes) = two_plots()
    errors.bar([i - 0.2 for i in index], before, 0.4, label="without the context", color="#bb5a2a")
    after = [max(x.residual, 1e-17) for x in layers]
    errors.bar([i + 0.2 for i in index], after, 0.4, label="patched", color="#2a6fbb")
    errors.set(ylabel="relative error of the layer's output", title="error against the contextual run", **scales)
    errors.legend(loc="lower left")
    names = [*dict.fromkeys(_short(name) for x in layers for name in x.relative_changes)]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [next((v or 0.0 for n, v in x.relative_changes.items() if _short(n) == name), 0.0) for x in layers]
        sizes.bar([i + (k - (len(names) - 1) / 2) * width for i in index], heights, width, label=name)
    sizes.set(ylabel="relative change (largest over the words)", title="size of the patches", **scales)
    sizes.legend(fontsize="small")
    return drawn(figure, path)


@torch.no_grad()
def unpatched_errors(model: Any, target: Mapping[str, Any], source: Mapping[str, Any], scope: str) -> list[float]:
    """The negative control: relative error of each layer's output in the plain source run."""
    source_rows, target_rows = pair_positions(target, source, scope)
    checked = checked_reading(model)
    with LayerHooks(model, checked.reading) as hooks:
        runs = [
            observe_target(hooks, without_cache(model, inputs), rows, silent)[0]
            for inputs, rows in ((source, source_rows), (target, target_rows))
        ]
    calls = [[call for layer in run for call in layer] for run in runs]
    return [relative_error(s.outputs[()], t.outputs[()]) for s, t in zip(*calls, strict=True)]


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
