"""Theorem 2 on a live model: one target run observed, one source run in which every layer is solved.

[G, Thm 2, Alg. 1].  v of each layer comes from the patched source run, so rounding is corrected
instead of accumulated, and the run's own logits are the patched ones.
"""

from collections.abc import Mapping
from typing import Any

import torch

from controllability.errors import PatchError, SideConditionFailed
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.positions import Positions
from controllability.models.sweep.fallbacks import Plan
from controllability.models.sweep.layer_sweep import LayerSweep, Sweeper
from controllability.models.sweep.records import LayerRecord, record
from controllability.models.sweep.target_run import LayerTarget, Progress


def sweep(
    hooks: LayerHooks, plan: Plan, targets: list[list[LayerTarget]], inputs: Mapping[str, Any], rows: Positions,
    progress: Progress, records: dict[LayerSweep, LayerRecord] | None = None,
) -> tuple[list[LayerSweep], Any]:  # fmt: skip
    """Run the source once, solving on the way.  Where a side condition fails, it is run again by what ``plan`` falls back to.

    With ``records`` a layer's is put there when the next one begins, and what only the solving needed is let go.
    Raises ``SideConditionFailed`` with layer, position and component when nothing is left.
    """
    layers = hooks.reading.layers
    finished = lambda layer: progress("source sweep", layer.index + 1, len(layers))  # noqa: E731
    while True:
        closing, sweepers = Closing(records), list[Sweeper | None]()
        for layer, calls in zip(layers, targets, strict=True):
            solvers = [plan.solver(layer, i, call, rows) for i, call in enumerate(calls) if plan.moves(layer.index)]
            sweepers.append(Sweeper(layer, solvers, finished, closing.begun) if plan.moves(layer.index) else None)
        try:
            output = hooks.run(sweepers, inputs)
            closing.begun(None)
        except SideConditionFailed as failed:
            plan.after(failed)
            continue
        done = [solver for sweeper in sweepers if sweeper for solver in sweeper.solvers]
        for solver in done:
            if solver.output is None:
                raise PatchError(
                    f"layer {solver.layer.index} ({solver.layer.name}) runs more often in the target run than in the "
                    "source run: calls are paired one to one"
                )
        return done, output


class Closing:
    """Keeps the records of layers that are done, and lets go of the rest of them; without ``records`` it does nothing."""

    def __init__(self, records: dict[LayerSweep, LayerRecord] | None) -> None:
        self.records = records
        self.open: list[LayerSweep] = []
        if records is not None:
            records.clear()  # of a run that failed

    def begun(self, solver: LayerSweep | None) -> None:
        """``solver`` begins (None: the run is over): those before it that have their output are done."""
        if self.records is None:
            return
        with torch.inference_mode(False), torch.no_grad():  # what is kept must not be made inside inference mode
            for done in [each for each in self.open if each.output is not None]:
                done.own_deltas()
                self.records[done] = record(done)
                done.let_go()
                self.open.remove(done)
        self.open += [] if solver is None else [solver]
