"""The last line of defence: a patched run that is nowhere near its target met something that nobody declared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from controllability.arrays import errors_and_sizes
from controllability.errors import NotVerified, Overflow
from controllability.models.reading.heads import Result, by_blocks
from controllability.models.reading.tolerances import UNREACHED
from controllability.models.sweep.fallbacks import made_good_later
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.records import LayerRecord

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
