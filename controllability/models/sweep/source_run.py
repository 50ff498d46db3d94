"""Theorem 2 on a live model: one target run observed, one source run in which every layer is solved.

[G, Thm 2, Alg. 1].  v of each layer comes from the patched source run, so rounding is corrected
instead of accumulated, and the run's own logits are the patched ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controllability.errors import PatchError, SideConditionFailed
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.positions import Positions
from controllability.models.sweep.fallbacks import Plan
from controllability.models.sweep.layer_sweep import LayerSweep, Sweeper
from controllability.models.sweep.target_run import LayerTarget, Progress


def sweep(
    hooks: LayerHooks, plan: Plan, targets: list[list[LayerTarget]], inputs: Mapping[str, Any], rows: Positions,
    progress: Progress,
) -> tuple[list[LayerSweep], Any]:  # fmt: skip
    """Run the source once, solving on the way.  Where a side condition fails, it is run again by what ``plan`` falls back to.

    Raises ``SideConditionFailed`` with layer, position and component when nothing is left.
    """
    layers = hooks.reading.layers
    finished = lambda layer: progress("source sweep", layer.index + 1, len(layers))  # noqa: E731
    while True:
        solvers = [
            [plan.solver(layer, i, call, rows) for i, call in enumerate(calls)]
            for layer, calls in zip(layers, targets, strict=True)
        ]
        sweepers = [Sweeper(layer, calls, finished) for layer, calls in zip(layers, solvers, strict=True)]
        try:
            output = hooks.run(sweepers, inputs)
        except SideConditionFailed as failed:
            plan.after(failed)
            continue
        done = [solver for calls in solvers for solver in calls]
        for solver in done:
            if solver.output is None:
                raise PatchError(
                    f"layer {solver.layer.index} ({solver.layer.name}) runs more often in the target run than in the "
                    "source run: calls are paired one to one"
                )
        return done, output
