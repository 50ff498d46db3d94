"""What writing a patch into the weights costs: W + ΔW has to be rounded to the numbers the model can store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import PatchError
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import compare_logits, result_of


@dataclass(frozen=True)
class MergedError:
    """A merged model against the target run, at the paired positions: errors relative unless called logit errors.

    ``applied`` is the error of the sweep itself, whose patch was not rounded and whose layers make good
    for each other; ``top1`` the share of positions whose first choice is the target's.
    """

    relative_error: float
    max_logit_error: float
    applied: float
    top1: float

    def __str__(self) -> str:
        return (
            f"merged: relative error {self.relative_error:.2g} (applied: {self.applied:.2g}), largest logit error "
            f"{self.max_logit_error:.2g}, first choice as in the target at {self.top1:.0%} of the positions"
        )


@torch.no_grad()
def merged_error(patch: PatchRecord, model: nn.Module) -> MergedError:
    """Run the merged model on the patch's own source and hold it against the target run's logits.

    Raises ``PatchError`` when the patch is not merged into ``model``, or was loaded: the target's logits are not saved.
    """
    if patch._merged_into is not uncompiled(model):
        raise PatchError("this patch is not merged into this model: merge it first")
    if patch.target_logits is None or patch.logits is None:
        raise PatchError("a loaded patch does not hold the target's logits: compare with `controllability verify`")
    found = result_of(model(**without_cache(model, patch.inputs["source"])))
    found, applied, wanted = (_at_pairs(x, patch) for x in (found, patch.logits, patch.target_logits))
    merged, swept = compare_logits(found, wanted), compare_logits(applied, wanted)
    return MergedError(merged.relative_error, merged.max_logit_error, swept.relative_error, merged.top1_agreement)


def _at_pairs(logits: Any, patch: PatchRecord) -> Tensor:
    """The logits of the paired positions; the target's are kept there already, unless every position has a pair."""
    at_positions = logits.ndim == 3 and logits.shape[:2] == patch.rows.shape
    return patch.rows.of(logits) if at_positions else logits
