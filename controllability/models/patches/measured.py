"""What a patch does, measured: merged, against the target; on disturbed states; with some of its layers alone."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import errors_and_sizes, quotient
from controllability.errors import BadInput, ControllabilityError, ControllabilityWarning, PatchError
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.parts import select
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import known_reading
from controllability.models.reading.heads import Result, Runs, by_blocks, compare_results, without_logits
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import compare_logits, result_of
from controllability.models.reading.model_facts import refuse_training
from controllability.models.reading.positions import pair_positions
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.report import Sensitivity
from controllability.rendering.figure import Lines, Panel
from controllability.rendering.study import Study


@dataclass(frozen=True)
class MergedError:
    """A merged model against the target run, at the paired positions: errors relative unless called logit errors.

    ``unpatched`` is the error of the model without the patch; ``applied`` that of the sweep itself, whose patch was not
    rounded and whose layers make good for each other (None for a loaded patch); ``top1`` the share of positions whose
    first choice is the target's.
    """

    relative_error: float
    max_logit_error: float
    unpatched: float | None
    applied: float | None
    top1: float

    def __str__(self) -> str:
        beside = {"applied": self.applied, "without a patch": self.unpatched}
        known = "".join(f", {name}: {value:.2g}" for name, value in beside.items() if value is not None)
        return (
            f"merged: relative error {self.relative_error:.2g}{known}; largest logit error "
            f"{self.max_logit_error:.2g}, first choice as in the target at {self.top1:.0%} of the positions"
        )


@dataclass(frozen=True, eq=False)
class Before:
    """What the target run and the source run without the patch give at the paired positions, (N, vocabulary) each."""

    wanted: Tensor
    unpatched: Tensor

    def compare(self, patch: PatchRecord, model: nn.Module) -> None:
        """Measure what the merge did, for ``patch.merged``.  Warns where it misses its target; a fit, by more than unmerged."""
        found = patch.merged = _compared(patch, at_source(patch, model), self.wanted, self.unpatched)
        fits = patch.joint is not None and not patch.joint.exact
        unmerged = float("inf") if found.applied is None else found.applied  # of a loaded patch it is not known
        allowed = VERIFIED[getattr(torch, patch.report.dtype)] + (unmerged if fits else 0.0)
        near = found.relative_error <= allowed
        if not near or (found.top1 < 1 and not fits):
            close = "the target is nearly reached, and" if near else "it misses its target:"
            warnings.warn(
                f"the patch is in the weights now; {close} {str(found).removeprefix('merged: ')}. Undo it with "
                "mp.unmerge(model); mp.applied(model) does not round",
                ControllabilityWarning, stacklevel=5,
            )  # fmt: skip


def before_merging(patch: PatchRecord, model: nn.Module) -> Before:
    """What is to be compared with the merged model: one source run, and a target run where the patch was loaded."""
    wanted = _wanted(patch)
    if wanted is None:
        inputs = patch.inputs
        rows = pair_positions(inputs["target"], inputs["source"], patch.scope, inputs["positions"])[1]
        wanted = rows.of(result_of(model(**without_cache(model, inputs["target"]))))
    return Before(wanted, at_source(patch, model))


def merged_error(patch: PatchRecord, model: nn.Module) -> MergedError:
    """Run the merged model on the patch's own source and hold it against the target run's logits.

    Raises ``PatchError`` when the patch is not merged into ``model``, or was loaded: the target's logits are not saved.
    """
    if patch._merged_into is not uncompiled(model):
        raise PatchError("this patch is not merged into this model: merge it first")
    wanted = _wanted(patch)
    if wanted is None:
        raise PatchError("a loaded patch does not hold the target's logits: compare with `controllability verify`")
    refuse_training(model)
    with own_modes(model):
        return _compared(patch, at_source(patch, model), wanted)


def _compared(patch: PatchRecord, found: Tensor, wanted: Tensor, unpatched: Tensor | None = None) -> MergedError:
    merged = compare_logits(found, wanted)
    plain = None if unpatched is None else compare_logits(unpatched, wanted).relative_error
    if plain is None and patch.merged is not None:
        plain = patch.merged.unpatched
    swept = None if patch.logits is None else compare_logits(at_pairs(patch.logits, patch), wanted).relative_error
    return MergedError(merged.relative_error, merged.max_logit_error, plain, swept, merged.top1_agreement)


def at_source(patch: PatchRecord, model: nn.Module) -> Tensor:
    """The logits of a source run at the paired positions, (N, vocabulary)."""
    return at_pairs(result_of(model(**without_cache(model, patch.inputs["source"]))), patch)


def _wanted(patch: PatchRecord) -> Tensor | None:
    """The target's logits, one row a pair: without the NaN that stands where a sample has fewer."""
    wanted = patch.target_logits
    return wanted[~wanted.isnan().all(-1)] if wanted is not None and wanted.ndim == 3 else wanted


def at_pairs(logits: Any, patch: PatchRecord) -> Tensor:
    """The logits of the paired positions, one row a pair; as they are, where a run gives other rows."""
    rows, books = patch.rows, logits.shape[0] // patch.rows.shape[0]
    if logits.ndim == 3 and books > 1:
        rows = rows.repeated(books)  # one row of logits for each codebook
    return rows.of(logits) if logits.ndim == 3 and logits.shape[:2] == rows.shape else logits


SEED = 0
FLOAT32 = torch.finfo(torch.float32).eps  # the norms of a float64 model run in float32


def sensitivity_of(patch: PatchRecord, model: nn.Module | None = None) -> Sensitivity:
    """What was measured of a patch; measured now if it has not been, on ``model`` or the one that it was made on."""
    known = patch.measured
    if known is not None and (known.patched is not None or (model is None and patch._model is None)):
        return known
    try:
        found = measure_sensitivity(patch, model if model is not None else patch.model())
    except PatchError as error:
        return Sensitivity(None, None, str(error))
    if found.patched is not None:  # else perhaps it can be measured later
        patch.measured = found
    return found


def measure_sensitivity(patch: PatchRecord, model: nn.Module) -> Sensitivity:
    """Disturb the states of a source run with the patch and of one without: two short passes each.

    The disturbance is ε^⅔ for a dtype of machine epsilon ε: far above its rounding and still small.  Where it cannot be measured
    the ``note`` of the result says why.
    """
    model = uncompiled(model)
    with own_modes(model):
        try:
            plain = _magnified(patch, model)
            with applied(patch, model):
                patched = _magnified(patch, model)
        except (ControllabilityError, RuntimeError, TypeError, ValueError) as error:
            return Sensitivity(None, None, str(error).splitlines()[0] if str(error) else type(error).__name__)
    finite = all(number < float("inf") for number in (plain, patched))
    return Sensitivity(patched, plain) if finite and plain else Sensitivity(None, None, "a disturbed run is not finite")


def _magnified(patch: PatchRecord, model: nn.Module) -> float:
    """The relative change of the logits over that of the states."""
    source = patch.inputs["source"]
    with Runs(model, without_logits(model, [source])) as run:

        def at_source() -> Result:
            found = run(source)
            return replace(found, held=at_pairs(found.held, patch))

        clean = at_source()
        size = max(torch.finfo(clean.dtype).eps, FLOAT32) ** (2 / 3)
        disturbed = _Disturbed(size)
        with HookStack() as installation:
            for name in dict.fromkeys(layer.name for layer in known_reading(model, patch.report.place).layers):
                installation.disturb(model.get_submodule(name), disturbed)
            noisy = at_source()
    if not disturbed.times:
        raise ControllabilityError("no layer of this model takes its state where it could be disturbed")
    blocks = by_blocks(lambda _, x, y: torch.stack([v.max() for v in errors_and_sizes(x, y)]), noisy, clean)
    return quotient(*torch.stack(blocks).amax(0).tolist()) / size


class _Disturbed:
    """A state with every entry off by a random part of its size; the same draws for every run."""

    def __init__(self, size: float) -> None:
        self.size, self.times = size, 0
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, state: Any) -> Any:
        if not isinstance(state, Tensor) or not state.is_floating_point() or state.ndim < 3:
            return state
        self.times += 1
        noise = torch.randn(state.shape, generator=self.generator).to(state.device)
        return (state * (1 + self.size * noise)).to(state.dtype)


def warn_if_fragile(patch: PatchRecord, done: str, model: nn.Module | None = None) -> None:
    """Say of a fragile patch what to expect of it where it is not the very run that it was made in."""
    found, dtype = sensitivity_of(patch, model), getattr(torch, patch.report.dtype)
    if found.fragile:
        warnings.warn(
            f"{done} a patch that is exact here and fragile elsewhere: a small disturbance grows {found.ratio:.2g} times as much as "
            f"without it, so expect a relative error of about {found.expected(dtype):.1g} in {str(dtype).removeprefix('torch.')} "
            "(route 'balanced', the default, is far calmer)",
            ControllabilityWarning, stacklevel=4,
        )  # fmt: skip


KINDS = "alone", "left out", "from below", "from above"


@dataclass(frozen=True, repr=False)
class Ablation(Study):
    """``rows``, four a layer: kind, layer, and for the model with only these layers patched the largest logit difference (relative to the
    largest logit) and the largest KL, in nats: ``error`` and ``kl`` against the contextual model, ``error_plain`` and ``kl_plain`` against
    the plain one; ``top1`` is the share of positions with the contextual model's likeliest token.  ``without`` is the plain model's own row.
    """

    rows: Sequence[dict[str, Any]]
    without: dict[str, Any]
    title = "What the patches of some layers do"

    def records(self) -> list[dict[str, Any]]:
        return [*self.rows]

    def panels(self) -> Sequence[Panel]:
        lines = {kind: [row["error"] for row in self.rows if row["kind"] == kind] for kind in KINDS}
        layers = [row["layer"] for row in self.rows if row["kind"] == KINDS[0]]
        return [Lines(self.title, "layer", "logit error against the contextual model", layers, lines)]


def ablation(patch: PatchRecord, model: nn.Module) -> Ablation:
    """See ``ModelPatch.ablation``."""
    target, source = patch.inputs["target"], patch.inputs["source"]
    if not target:
        raise BadInput(
            "this patch has no target to be held against: a part of a patch, or an adapter's, cannot be ablated"
        )
    source_rows, target_rows = pair_positions(target, source, patch.scope, patch.inputs["positions"])
    with own_modes(model), Runs(model, without_logits(model, [target, source])) as run:
        wanted, plain = run(target).at(target_rows), run(source).at(source_rows)
        rows = []
        for kind, layer, kept in _parts(sorted({entry.layer for entry in patch.entries})):
            found = plain
            if kept:
                with applied(select(patch, layers=kept), model):
                    found = run(source).at(source_rows)
            rows.append({"kind": kind, "layer": layer} | _held_against(found, wanted, plain))
    return Ablation(rows, {"kind": "without", "layer": None} | _held_against(plain, wanted, plain))


def _parts(layers: list[int]) -> Iterator[tuple[str, int, list[int]]]:
    for layer in layers:
        alone, rest = [layer], [other for other in layers if other != layer]
        below, above = [o for o in layers if o <= layer], [o for o in layers if o >= layer]
        yield from ((kind, layer, kept) for kind, kept in zip(KINDS, (alone, rest, below, above), strict=True))


def _held_against(found: Result, wanted: Result, plain: Result) -> dict[str, float]:
    (there,), (here,) = compare_results(wanted, found), compare_results(plain, found)
    return {
        "error": there.relative_error, "kl": float(there.kl.max()), "error_plain": here.relative_error,
        "kl_plain": float(here.kl.max()), "top1": there.top1_agreement,
    }  # fmt: skip
