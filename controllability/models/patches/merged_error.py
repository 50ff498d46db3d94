"""What a merged model gives, held against the target run and against no patch at all."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import ControllabilityWarning, PatchError
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import compare_logits, result_of
from controllability.models.reading.modules import refuse_training
from controllability.models.reading.positions import pair_positions
from controllability.models.reading.tolerances import VERIFIED


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
