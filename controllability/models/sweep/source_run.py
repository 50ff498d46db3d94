"""Theorem 2 on a live model: one target run observed, one source run in which every layer is solved.

[G, Thm 2, Alg. 1].  v of each layer comes from the patched source run, so rounding is corrected
instead of accumulated, and the run's own logits are the patched ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from architectures.reading import Layer
from controllability.arrays import errors_and_sizes
from controllability.errors import NotVerified, Overflow, PatchError, SideConditionFailed
from controllability.execution.patched_run import Metric
from controllability.interfaces import JointOptions, Path
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.checked_reading import Checked
from controllability.models.reading.heads import Result, by_blocks
from controllability.models.reading.inputs import sizes_are_free
from controllability.models.reading.positions import Positions
from controllability.models.reading.tolerances import UNREACHED
from controllability.models.sweep.layer_sweep import LayerSweep, Sweeper
from controllability.models.sweep.records import LayerRecord, record
from controllability.models.sweep.target_run import LayerTarget, Progress
from controllability.prover.derivation import Derivation
from controllability.solvers.resorts import Resort
from controllability.solvers.served_tokens import Known

COARSE = 1e-12  # epsilon from which on a free size is worth looking for: above it rounding can be magnified much
Served = Mapping[tuple[int, int], Mapping[Path, Known]]  # (layer, call) -> what each leaf knows of the tokens it serves


class Plan:
    """By which derivation and with which options every layer is solved, for patches of one scope; and what it may fall back to.  (new)

    In this order: another derivation, which moves other parameters; where one patch serves many tokens, one scale that is only
    near, or targets that are not all reached, which the layers behind make good; in the last layer, sizes that nothing behind
    it reads.  The last layer is held to its targets, or refuses.  All of it is decided here and nowhere else.

    ``derivations`` fixes the former: a patch that serves tokens already (``served``) keeps what it gives them.
    """

    def __init__(
        self, proofs: list[Derivation], scope: str, joint: JointOptions | None = None,
        derivations: Sequence[int] | None = None, served: Served | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        self.proofs, self.scope, self.served, self.metrics = proofs, scope, served, metrics
        self.joint = joint if scope == "all" else None
        self.fixed = derivations is not None
        self.choices = list(derivations or [0] * len(proofs))
        self.first: dict[int, SideConditionFailed] = {}
        self.held: set[int] = {len(proofs) - 1}  # layers behind which nothing makes good what they miss
        self.short = self.fixed  # whether layers before the last one need not reach all their targets

    def solver(self, layer: Layer, call: int, target: LayerTarget, rows: Positions) -> LayerSweep:
        """What solves one call of a layer."""
        known = None if self.served is None else self.served[layer.index, call]
        self.held |= {layer.index} if layer.final else set()
        proof, choice = self.proofs[layer.index], self.choices[layer.index]
        options = self._options(layer.index, self.short)
        return LayerSweep(layer, call, proof, choice, target, rows, self.scope, options, known, self.metrics)

    def moves(self, layer: int) -> bool:
        """Whether a layer is solved at all: a fit may name those that are."""
        return self.joint is None or self.joint.at(layer) is not None

    def _options(self, layer: int, short: bool) -> JointOptions | None:
        return options_at(self.joint and self.joint.at(layer), layer in self.held, short)

    def after(self, failed: SideConditionFailed) -> None:
        """Go on to the layer's next derivation, then to falling short; raises the first failure when neither is left."""
        layer = failed.layer
        assert layer is not None
        first = self.first.setdefault(layer, failed)
        if failed.final:
            raise failed
        if not self.fixed and self.choices[layer] < len(self.proofs[layer].alternatives):
            self.choices[layer] += 1
            return
        changed = self._options(layer, True)
        if self.short or changed is None or not changed.may_fall_short:
            if not self.fixed:
                first.tried = f"{self.choices[layer] + 1} derivations that move different parameters"
            raise first from None
        self.short = True
        self.choices[layer] = 0


def options_at(joint: JointOptions | None, last: bool, short: bool) -> JointOptions | None:
    """How a layer is solved: all but the last one leave something to those behind them, if need be.

    What stands behind the last one is said in ``joint``.  ``short``: the layer need not reach all its targets.
    """
    if joint is None or last or not joint.exact or joint.keep_rms:
        return joint
    return replace(joint, read_by="block", may_fall_short=short)


def with_reader_of_last_layer(
    joint: JointOptions, model: nn.Module, checked: Checked, example: Mapping[str, Any]
) -> JointOptions:
    """``joint`` with what stands behind the last layer, where it matters."""
    coarse = any(torch.finfo(d).eps > COARSE for layer in checked.reading.layers[-1:] for d in layer.params.dtypes)
    if not coarse or not joint.exact or joint.keep_rms:
        return joint
    return replace(joint, read_by="norm" if sizes_are_free(model, checked, example) else "anyone")


def made_good_later(solver: LayerSweep) -> bool:
    """Whether a layer leaves something to those behind it, and is not held to its target itself."""
    return any(taken.route in (Resort.NEAREST, Resort.SHORT) for taken in solver.run.journal.routes)


def only_near(solvers: Iterable[LayerSweep]) -> bool:
    """Whether a layer gives its tokens what another scale would not give them: then no token can be added to them."""
    return any(taken.route in (Resort.NEAREST, Resort.SIZED) for s in solvers for taken in s.run.journal.routes)


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


OUTPUT_LOSS = 0.5  # the same of a whole model's output, where every layer rounds
LOSS = 0.1  # an error that is no patch any more, whatever explains it
MAGNIFIED = (
    "because no scale serves all tokens without magnifying rounding that much: patch fewer tokens at once, or a model in "
    "float64"
)
AMPLIFIED = (
    "because the route that was asked for magnifies rounding that much: take route 'balanced', or a model in float64"
)
UNDECLARED = (
    "more than rounding explains: on this input the model computes something that its expression does not have (a mask, or "
    "a switch that depends on the input)"
)
ROUNDED = (
    "which rounding to {} may explain, that of a scale which the dtype cannot hold included: take float32, or route 'balanced'; if float32 "
    "misses too, the model computes something that its expression does not have"
)
AFTER_THE_LAST_LAYER = (
    "something after the last patched layer depends on the context or on the token (a mixer, per-layer embeddings, "
    "an adapter that the runs choose differently)"
)


def refuse_unreached(solvers: list[LayerSweep], records: Sequence[LayerRecord] | None = None) -> float:
    """Raise ``NotVerified`` where a layer, patched, misses its target; else the largest relative error of a row.

    ``records`` are those of solvers that let everything else go.
    """
    if records is None:
        rows = [_relative(*errors_and_sizes(_output(s), s.run.wanted())) for s in solvers]
    else:
        rows = [_relative(r.error, r.size) for r in records]
    held: list[float] = []
    worst = torch.stack([errors.max().double().cpu() for errors in rows]).tolist()
    for solver, errors, error in zip(solvers, rows, worst, strict=True):
        if made_good_later(solver):
            continue  # the layer that makes good is held to its target
        amplifies = solver.proof.route in ("ball", "scale")  # as was asked for; what is lost is lost all the same
        held += [] if amplifies else [error]
        enough, rounding = UNREACHED.of(_dtypes(solver)), _rounding(solver)
        # one scale for many tokens may leave little to normalise
        explained = LOSS if amplifies else rounding if solver.joint is not None and solver.proof.jointly else 0.0
        if error > max(enough, min(explained, LOSS)):
            half = [str(d)[6:] for d in _dtypes(solver) if d in (torch.float16, torch.bfloat16)]
            rounded = ROUNDED.format(half[0]) if half and error <= rounding else UNDECLARED
            why = AMPLIFIED if amplifies else MAGNIFIED if error <= explained else rounded
            raise NotVerified(
                f"layer {solver.layer.index} ({solver.layer.name}), {solver.rows.name(int(errors.argmax()))}: with its "
                f"patch it misses the target run by {error:.2g} (relative), {why}; nothing was changed"
            )
    return max(held, default=0.0)


def refuse_other_output(found: Result, wanted: Result, worst: float, name: Callable[[int], str], why: str) -> None:
    """Raise ``NotVerified`` where all layers reach their targets (``worst`` says so) and the model's output (N, n) does not."""
    rough = worst > UNREACHED[torch.float32]  # half precision, or a route that amplifies: the layers' residuals say it

    def compared(first: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        _refuse_not_finite(x, name, first)
        return errors_and_sizes(x, y)

    seen = by_blocks(compared, found, wanted)
    errors = _relative(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    error, row = float(errors.max()), int(errors.argmax())
    if error > (OUTPUT_LOSS if rough else 10 * UNREACHED.get(found.dtype, UNREACHED[torch.float32])):
        raise NotVerified(
            f"every layer reaches its target{' nearly' * rough}, and the model's output at {name(row)} misses the target run by "
            f"{error:.2g} (relative): {AMPLIFIED if rough else why}; nothing was changed"
        )


def refuse_not_finite(found: Result, name: Callable[[int], str]) -> None:
    """Raise ``Overflow`` for a row of the source run's logits with NaN or infinity."""
    by_blocks(lambda first, logits: _refuse_not_finite(logits, name, first), found)


def _refuse_not_finite(logits: Tensor, name: Callable[[int], str], first: int) -> None:
    finite = torch.isfinite(logits.sum(-1, dtype=torch.promote_types(logits.dtype, torch.float32)))
    for row in (~finite).nonzero()[:, 0].tolist():
        if not bool(torch.isfinite(logits[row]).all()):  # a sum may overflow by itself
            raise Overflow(
                f"source run: the logits at {name(first + row)} are not finite; the model overflows on this input (try "
                "another dtype); nothing was changed"
            )


def _rounding(solver: LayerSweep) -> float:
    """The error that rounding explains, as the norm after the patched map magnifies it; 0 where there is none."""
    spread = [r.amplification for r in solver.run.journal.routes if r.amplification is not None]
    if not spread:
        return 0.0
    eps = max(torch.finfo(d).eps for d in _dtypes(solver) & set(UNREACHED))
    return 100 * eps * max(float(s.max()) for s in spread)


def _output(solver: LayerSweep) -> Tensor:
    assert solver.output is not None
    return solver.output


def _dtypes(solver: LayerSweep) -> set[torch.dtype]:
    return {_output(solver).dtype, *solver.told.values(), *solver.layer.params.dtypes}


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """The error of each row against its own size, (N,)."""
    floor = 1e-6 * size.max() + torch.finfo(size.dtype).tiny
    return error / torch.maximum(size, floor)
