"""What writing a patch into the weights costs: W + ΔW has to be rounded to the numbers the model can store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controllability.errors import PatchError

if TYPE_CHECKING:
    from controllability.models.model_patch import ModelPatch


@dataclass(frozen=True)
class Rounding:
    """One merged parameter.  E is what was stored less W + ΔW, z the input that the patch was solved for.

    ``relative``: ‖E‖ / ‖ΔW‖, above 1 where rounding moves the weights more than the patch does.  ``missed``: max |E z| /
    max |(W + ΔW) z|, what the map misses at its token (the largest over the chosen experts); None for vectors and
    for deltas of more than one input.  Both are 0 where nothing wider than the stored dtype could tell.
    """

    parameter: str
    relative: float
    missed: float | None


@dataclass
class Loss:
    """Adds up, block by block, what one parameter loses."""

    squares: float = 0.0
    missed: float | None = None
    _miss: list[Tensor] = field(default_factory=list)
    _reach: list[Tensor] = field(default_factory=list)

    def vector(self, lost: Tensor) -> None:
        """E of a bias or a scale."""
        self.squares += float(lost.double().square().sum())

    def block(self, lost: Tensor, exact: Tensor, x: Tensor | None) -> None:
        """E and W + ΔW of some rows, and the input of the map: its effect there is added to ``effect``."""
        self.squares += float(lost.double().square().sum())
        if x is not None:
            self._miss.append(lost @ x)
            self._reach.append(exact @ x)

    def finish(self, summed: bool) -> None:
        """A matrix is done: its blocks' effects are parts of one vector, or (stored transposed) terms of a sum."""
        if not self._miss:
            return
        miss, reach = (torch.stack(parts).sum(0) if summed else torch.cat(parts) for parts in (self._miss, self._reach))
        largest = float(reach.abs().max())
        if largest:
            self.missed = max(self.missed or 0.0, float(miss.abs().max()) / largest)
        self._miss, self._reach = [], []

    def of(self, parameter: str, size: float) -> Rounding:
        """The result; ``size`` is ‖ΔW‖."""
        return Rounding(parameter, self.squares**0.5 / size if size else 0.0, self.missed)


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
def merged_error(patch: ModelPatch, model: nn.Module) -> MergedError:
    """Run the merged model on the patch's own source and hold it against the target run's logits.

    Raises ``PatchError`` when the patch is not merged into ``model``, or was loaded: the target's logits are not saved.
    """
    from controllability.models.hooks import uncompiled
    from controllability.models.running import result_of, without_cache

    if patch._merged_into is not uncompiled(model):
        raise PatchError("this patch is not merged into this model: merge it first")
    if patch.target_logits is None or patch.logits is None:
        raise PatchError("a loaded patch does not hold the target's logits: compare with `controllability verify`")
    found = result_of(model(**without_cache(model, patch.inputs["source"])))
    found, applied, wanted = (_at_pairs(x, patch).double() for x in (found, patch.logits, patch.target_logits))
    size = max(float(wanted.abs().max()), torch.finfo(torch.float64).tiny)
    error = float((found - wanted).abs().max())
    return MergedError(
        error / size, error, float((applied - wanted).abs().max()) / size,
        float((found.argmax(-1) == wanted.argmax(-1)).double().mean()),
    )  # fmt: skip


def _at_pairs(logits: Any, patch: ModelPatch) -> Tensor:
    """The logits of the paired positions; the target's are kept there already, unless every position has a pair."""
    at_positions = logits.ndim == 3 and logits.shape[:2] == patch.rows.shape
    return patch.rows.of(logits) if at_positions else logits
