"""One layer in the source run: each delta is solved the moment its module's input is known."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from architectures.reading import Layer, Tap
from controllability.components.mixture import CHOSEN, SHARES
from controllability.deltas import Delta, LowRank
from controllability.errors import PatchError, SideConditionFailed
from controllability.execution.patched_run import Metric, PatchedRun
from controllability.interfaces import JointOptions, Param, Path
from controllability.models.hooks.guards import refuse_bypassed
from controllability.models.reading.positions import Positions
from controllability.models.sweep.effects import per_sample, ready
from controllability.models.sweep.target_run import LayerTarget, as_state, check_finite
from controllability.prover.derivation import Derivation
from controllability.solvers.served_tokens import Known


class LayerSweep:
    """One call of one layer in the source run: solves each delta the moment its module's input is known."""

    def __init__(
        self, layer: Layer, call: int, proof: Derivation, choice: int, target: LayerTarget, rows: Positions, scope: str,
        joint: JointOptions | None = None, known: Mapping[Path, Known] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.call, self.proof, self.choice, self.target = layer, call, proof, choice, target
        self.joint, self.served, self.metrics = joint, known or {}, metrics or {}
        self.rows = rows
        self.each = scope == "each"
        self.states: list[Tensor | None] = [None] * len(layer.inputs)
        self.chosen: dict[Path, Tensor] = {}
        self.reads: dict[Path, Tensor] = {}  # what a steered leaf reads, where there is but one pair
        self.output: Tensor | None = None
        self.before = 0  # positions that the model puts before the input's
        self.told: dict[Path, torch.dtype] = {}  # what ran, and in which numbers
        self.owns = False  # whether the deltas are tensors of their own, made outside of torch.inference_mode
        self._run: PatchedRun | None = None

    @property
    def run(self) -> PatchedRun:
        """The patched run of the block; it starts when the first input of the block is known."""
        if self._run is None:
            runs = as_state(self.states), self.target.trace()
            self._run = self.proof.patched_run(self.layer.params, *runs, self.choice, self.joint)
            self._run.served, self._run.metrics = self.served, self.metrics
        return self._run

    def entering(self, index: int, value: Tensor) -> None:
        check_finite(value, "source", self.layer, "entering the feed-forward half of")
        if self.states[index] is None:
            self.states[index] = self.rows.of(value).clone()

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        self.chosen[path] = index
        with self._located():
            self.run.bind(path, {CHOSEN: self.rows.of(index), SHARES: self.rows.of(shares)})

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor | None:
        run, rows = self.run, self.rows
        self.told[tap.outlet] = y.dtype
        goals = [(path, run.goals[path].update) for path in tap.paths if path in run.goals]
        x_rows, y_rows = rows.of(x), rows.of(y)
        if tap.kind != "output":
            run.observe_input(tap.inlet, x_rows)
        if not goals:
            run.observe_output(tap.outlet, rows.taken(y))
            return None
        if len(tap.paths) == 1:
            run.observe_raw(tap.outlet, rows.taken(y))
        if not self.each and self.joint is None and x.ndim == 3 and x.shape[1] > 1:
            run.others.update((path, rows.others(x)) for path, _ in goals)
        if len(rows.sample) == 1:
            self.reads.update((path, x_rows.reshape(-1).clone()) for path, _ in goals)
        with self._located():
            moves = [(update, run.change(path)) for path, update in goals]
        chosen = self.chosen.get(tap.mixture) if tap.mixture is not None else None
        if self.each:  # every position is patched: what the run goes on with is what was solved for
            index = rows.of(chosen) if chosen is not None else None
            changed = ready(self.layer, tap, moves)(x_rows, y_rows, index).to(y.dtype)
            run.observe_output(tap.outlet, changed)
            return rows.put(y, changed)
        shared = [(update, per_sample(delta)) for update, delta in moves]
        y = ready(self.layer, tap, shared)(x, y, chosen).to(y.dtype)
        run.observe_output(tap.outlet, rows.taken(y))
        return y

    def leaving(self, value: Tensor) -> None:
        self.output = self.rows.taken(value)
        self.before = value.shape[1] - self.rows.shape[1]

    @contextmanager
    def _located(self) -> Iterator[None]:
        try:
            yield
        except SideConditionFailed as failed:
            failed.layer = self.layer.index
            if isinstance(failed.position, int):
                failed.position = self.rows.name(failed.position)
            proof, count = failed.certificate, len(self.rows.sample)
            if proof is not None and len(proof.weights) == count:
                failed.certificate = proof.named([self.rows.name(row) for row in range(count)])
            raise

    def solved(self) -> Iterator[tuple[Param, Delta, Tensor | None]]:
        """The patch of this layer, parameter by parameter: delta, one row a pair, and the input of a matrix that has but one."""
        for path, goal in self.run.goals.items():
            delta = self.run.solved[path]
            yield goal.update.param, delta, self.reads.get(path) if type(delta) is LowRank else None

    def own_deltas(self) -> None:
        """Give the solved deltas tensors of their own."""
        solved = self.run.solved
        if not self.owns:
            refuse_bypassed(self.layer, self.layer.taps, self.told)
            solved.update({path: delta.mapped(Tensor.clone) for path, delta in solved.items()})
        self.owns = True

    def let_go(self) -> None:
        """Let go of what only the solving needed."""
        self.run.forget()
        self.target, self.chosen = LayerTarget(self.layer, []), {}


class Sweeper:
    """Listens to one layer in the source run and hands each call to a ``LayerSweep`` of its own."""

    def __init__(
        self, layer: Layer, solvers: list[LayerSweep], finished: Callable[[Layer], None],
        begun: Callable[[LayerSweep], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.layer, self.solvers, self.finished, self.begun = layer, solvers, finished, begun
        self.calls = 0

    @property
    def current(self) -> LayerSweep:
        """The call that is running."""
        return self.solvers[self.calls - 1]

    def begins(self) -> None:
        self.calls += 1
        if self.calls > len(self.solvers):
            raise PatchError(
                f"layer {self.layer.index} ({self.layer.name}) runs {self.calls} times in the source run and "
                f"{len(self.solvers)} times in the target run: calls are paired one to one"
            )
        self.begun(self.current)

    def entering(self, index: int, value: Tensor) -> None:
        self.current.entering(index, value)

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        self.current.routed(path, index, shares)

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor | None:
        return self.current.computed(tap, x, y)

    def leaving(self, value: Tensor) -> None:
        self.current.leaving(value)
        self.finished(self.layer)
