"""Theorem 2 on a live model: one target run observed, one source run in which every layer is solved.

[G, Thm 2, Alg. 1].  v of each layer comes from the patched source run, so rounding is corrected
instead of accumulated, and the run's own logits are the patched ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from architectures.reading import Layer, Tap
from controllability.arrays import arithmetic
from controllability.deltas import LowRank, Shift
from controllability.errors import BadInput, PatchError, SideConditionFailed
from controllability.interfaces import Param, Steering
from controllability.models.hooks import Installation, first_tensor, low_rank_output, patched_vector
from controllability.models.pairing import Rows
from controllability.proof import Proof
from controllability.trace import PatchedRun, Path, Trace

Progress = Callable[[str, int, int], None]


@dataclass
class LayerTarget:
    """What one layer did in the target run, at the paired positions: (N, ·) each."""

    state: Tensor | None = None
    outputs: dict[Path, Tensor] = field(default_factory=dict)

    def trace(self, layer: Layer) -> Trace:
        """The observed values as a trace of the block."""
        assert self.state is not None
        return Trace(layer.block, layer.params, self.state, self.outputs)


def check_finite(states: Tensor, run: str, layer: Layer, where: str) -> None:
    """Raise ``BadInput`` for a state with NaN or infinity at any position."""
    if bool(torch.isfinite(states.sum(dtype=torch.promote_types(states.dtype, torch.float32)))):
        return  # one number says so for all of them, but for sums that overflow by themselves
    finite = torch.isfinite(states)
    if not bool(finite.all()):
        bad = (~finite).nonzero()[0].tolist()
        raise BadInput(
            f"{run} run: the state {where} layer {layer.index} is not finite at sample {bad[0]}, position {bad[1]}; "
            "the model overflows on this input (try another dtype); nothing was changed"
        )


def observe_target(
    model: nn.Module,
    layers: tuple[Layer, ...],
    proofs: list[Proof],
    inputs: Mapping[str, Any],
    rows: Rows,
    progress: Progress,
) -> tuple[list[LayerTarget], Any]:
    """Run the model on the target's inputs; keep what the proofs ask for at the paired rows."""
    targets = [LayerTarget() for _ in layers]
    installation = Installation()

    def watch(layer: Layer, proof: Proof, target: LayerTarget) -> None:
        probe = Trace(layer.block, {}, None)
        moved = {p.name for p in proof.root.moved}

        def state(module: nn.Module, args: tuple[Any, ...]) -> None:
            check_finite(args[0], "target", layer, "entering the feed-forward half of")
            target.state = rows.of(args[0])

        def whole(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if layer is layers[-1]:  # what leaves another layer is seen entering the next one
                check_finite(first_tensor(output), "target", layer, "leaving")
            target.outputs[()] = rows.of(first_tensor(output)).clone()
            progress("target run", layer.index + 1, len(layers))

        for tap in layer.taps:
            module = model.get_submodule(tap.module)
            if target.state is None and probe.feeds_from_root(tap.inlet):
                installation.before(module, state)
            if any(name.startswith(f"{tap.module}.") for name in moved):

                def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor, path: Path = tap.outlet) -> None:
                    target.outputs[path] = rows.of(output).clone()

                installation.after(module, keep)
        installation.after(model.get_submodule(layer.name), whole)

    try:
        for layer, proof, target in zip(layers, proofs, targets, strict=True):
            watch(layer, proof, target)
        output = model(**inputs)
    finally:
        installation.undo()
    for layer, target in zip(layers, targets, strict=True):
        if target.state is None or () not in target.outputs:
            raise PatchError(
                f"layer {layer.index}: its hooks did not run in the target run; is the model compiled or replaced?"
            )
    return targets, output


class LayerSweep:
    """One layer of the source run: solves each delta the moment its module's input is known."""

    def __init__(self, layer: Layer, proof: Proof, choice: int, target: LayerTarget, rows: Rows, scope: str) -> None:
        self.layer, self.proof, self.choice, self.target = layer, proof, choice, target
        self.rows = rows
        self.each = rows if scope == "each" else None
        self.run: PatchedRun | None = None
        self.output: Tensor | None = None

    def install(self, model: nn.Module, installation: Installation, finished: Callable[[], None]) -> None:
        """Attach to the modules of this layer."""
        probe = Trace(self.layer.block, {}, None)
        steps = (self.proof.root, *self.proof.alternatives)[self.choice].walk()
        # which leaves move is known from the proof, before any number is
        moved = {p for step in steps for p in step.moved}
        for tap in self.layer.taps:
            module = model.get_submodule(tap.module)
            if probe.feeds_from_root(tap.inlet):
                installation.before(module, self._start)
            steered = [p for p in moved if p.name.startswith(f"{tap.module}.")]
            if steered:
                self._attach(installation, module, tap, steered)

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.output = self.rows.of(first_tensor(output)).clone()
            finished()

        installation.after(model.get_submodule(self.layer.name), end)

    def _start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.run is None:
            check_finite(args[0], "source", self.layer, "entering the feed-forward half of")
            state = self.rows.of(args[0])
            self.run = self.proof.patched_run(self.layer.params, state, self.target.trace(self.layer), self.choice)

    def _attach(self, installation: Installation, module: nn.Module, tap: Tap, steered: list[Param]) -> None:
        def solve_vectors(module: nn.Module, args: tuple[Any, ...]) -> None:
            run = self._observe(tap, args[0])
            for param, path in self._goals(run, tap):
                if len(param.value(self.layer.params).shape) > 1 and len(tap.paths) == 1:
                    continue  # a matrix: solved after the module has computed W x
                delta = self._solve(run, path)
                assert isinstance(delta, Shift)
                holder, attribute = self.layer.params.holder(param.name)
                installation.exchange(
                    holder, attribute, patched_vector(holder._parameters[attribute], delta, self.each)
                )  # type: ignore[arg-type]

        def solve_matrices(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            run = self._observe(tap, args[0])
            for _, path in self._goals(run, tap):
                if path in run.solved:
                    continue
                run.observe_raw(path, self.rows.of(output))
                delta = self._solve(run, path)
                assert isinstance(delta, LowRank)
                output = low_rank_output(output, args[0], delta, self.each)
                run.observe_output(path, self.rows.of(output))
            return output

        if any(len(p.value(self.layer.params).shape) == 1 for p in steered):
            installation.before(module, solve_vectors)
        if any(len(p.value(self.layer.params).shape) > 1 for p in steered):
            installation.after(module, solve_matrices)

    def _observe(self, tap: Tap, x: Tensor) -> PatchedRun:
        assert self.run is not None
        self.run.observe_input(tap.inlet, self.rows.of(x))
        return self.run

    def _goals(self, run: PatchedRun, tap: Tap) -> list[tuple[Param, Path]]:
        return [(run.goals[path].steering.param, path) for path in tap.paths if path in run.goals]

    def _solve(self, run: PatchedRun, path: Path) -> LowRank | Shift:
        try:
            return run.delta(path)
        except SideConditionFailed as failed:
            failed.layer = self.layer.index
            if isinstance(failed.position, int):
                failed.position = self.rows.name(failed.position)
            raise

    def steerings(self) -> dict[Path, Steering]:
        """The steering used at each patched leaf."""
        assert self.run is not None
        return {path: goal.steering for path, goal in self.run.goals.items()}

    def deltas(self) -> dict[Param, LowRank | Shift]:
        """The solved patch of this layer, one row a pair."""
        assert self.run is not None
        return {goal.steering.param: self.run.solved[path] for path, goal in self.run.goals.items()}


def sweep(
    model: nn.Module,
    layers: tuple[Layer, ...],
    proofs: list[Proof],
    targets: list[LayerTarget],
    inputs: Mapping[str, Any],
    rows: Rows,
    scope: str,
    progress: Progress,
) -> tuple[list[LayerSweep], Any]:
    """Run the source once, solving on the way.  Where a side condition fails, the layer's next derivation is tried.

    Raises ``SideConditionFailed`` with layer, position and component when none is left.
    """
    choices = [0] * len(layers)
    first: dict[int, SideConditionFailed] = {}
    while True:
        solvers = [
            LayerSweep(layer, proof, choice, target, rows, scope)
            for layer, proof, choice, target in zip(layers, proofs, choices, targets, strict=True)
        ]
        installation = Installation()
        try:
            for solver in solvers:
                done = solver.layer.index + 1
                solver.install(model, installation, lambda done=done: progress("source sweep", done, len(layers)))
            output = model(**inputs)
        except SideConditionFailed as failed:
            assert failed.layer is not None
            first.setdefault(failed.layer, failed)
            choices[failed.layer] += 1
            if choices[failed.layer] > len(proofs[failed.layer].alternatives):
                original = first[failed.layer]
                original.tried = f"{choices[failed.layer]} derivations that move different parameters"
                raise original from None
            continue
        finally:
            installation.undo()
        return solvers, output


def residual_of(output: Tensor, target: Tensor) -> float:
    """max |difference| / max |target| of a layer's output over the paired rows."""
    xp = arithmetic(output)
    difference = (xp.lift(output) - xp.lift(target)).abs().max()
    return float(difference / xp.lift(target).abs().max().clamp_min(torch.finfo(torch.float32).tiny))
