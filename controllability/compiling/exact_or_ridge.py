"""Exact where the set fits into one patch, least squares where it does not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from controllability.arrays.one_line import OneLine
from controllability.compiling.strengths import EXACT, Strength, name_of
from controllability.compiling.token_sets import Sample, begin_alike, padded, positions, repeated
from controllability.compiling.yardstick import Yardstick
from controllability.deltas import LowRank
from controllability.errors import ControllabilityError, NotControllable, NotVerified, SideConditionFailed
from controllability.models.model_patch import ModelPatch
from controllability.models.patch_model import patch_model
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.target_run import Progress

EXACTLY = ("output", "input-output")  # Theorem 1b holds more tokens, and moves less of the model elsewhere
FITTED = "output"  # with the first maps as well, texts outside the set were further off (docs/compiling.md)
NEARLY = 100.0  # tolerances within which an exact solution that rounding spoils is still worth more than a fit


@dataclass(frozen=True)
class Wish:
    """What was asked of the patch.

    ``via`` None: the first of ``EXACTLY`` that is exact, or else ``FITTED``.  ``ridge`` None: exact, or else a λ that is chosen;
    0: exact or refused; more: this λ.  ``pinned``: the first token keeps its state, and with it what
    attention parks there.  ``place`` is the half of a layer that takes the patch.
    """

    via: str | None = None
    rank: int | None = None
    ridge: float | None = None
    keep_rms: bool = False
    pinned: bool = True
    place: str | None = None

    @property
    def exact_only(self) -> bool:
        """Whether a set that does not fit is to be refused."""
        return self.ridge == 0 or self.keep_rms


@dataclass(frozen=True)
class ExactAttempt:
    """An exact patch that was not to be had: what was tried, why it failed, and the certificate of that as JSON-ready data.

    ``patch`` is one that was solved exactly and misses by little more than ``tolerance``, ``missed`` by how much.
    """

    wish: Wish
    reason: str
    certificate: dict[str, Any] | None
    error: ControllabilityError
    patch: ModelPatch | None = None
    missed: float = float("inf")

    @property
    def one_less(self) -> bool:
        """Whether it failed on the scale after a norm, where a single token can be the obstacle."""
        return isinstance(self.error, NotVerified) or (self.certificate or {}).get("kind") == "farkas"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "via": self.wish.via, "first_token_kept": self.wish.pinned, "reason": self.reason, "certificate": self.certificate,
        }  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Solution(OneLine):
    """The patch and how it was come by; ``wish`` says with which theorem, and whether the first token was pinned."""

    patch: ModelPatch
    wish: Wish
    exact: bool
    ridge: float
    attempts: tuple[ExactAttempt, ...] = ()
    plan: Strength | None = None

    @property
    def strength(self) -> str:
        """What was asked for, in a word."""
        return EXACT if self.plan is None else name_of(self.plan)

    @property
    def rounded(self) -> bool:
        """Solved exactly, but rounding leaves more than counts as verified."""
        return any(attempt.patch is self.patch for attempt in self.attempts)


def solve(model: Any, queries: Yardstick, wish: Wish, progress: Progress) -> Solution | tuple[ExactAttempt, ...]:
    """The exact patch of the queries, or the least squares with the λ that was asked for; what was tried where there is no exact one.

    Raises ``SideConditionFailed``, ``NotControllable`` or ``NotVerified`` where nothing less than exact was wanted.
    """
    wish = replace(wish, pinned=begin_alike(queries.samples))
    if ridge := wish.ridge:
        wish = replace(wish, via=wish.via or FITTED)
        return Solution(patch_of(model, repeated(queries.samples), wish, progress), wish, False, float(ridge))
    attempts: list[ExactAttempt] = []
    for via in (wish.via,) if wish.via else EXACTLY:
        for pinned in dict.fromkeys((wish.pinned, False)):
            now = replace(wish, via=via, pinned=pinned)
            found = exactly(model, queries, now, progress)
            if isinstance(found, ModelPatch):
                return Solution(found, now, True, 0.0, tuple(attempts))
            attempts.append(found)
            if not found.one_less:
                break
    if wish.exact_only:
        raise attempts[0].error
    nearest = min(attempts, key=lambda attempt: attempt.missed)
    if nearest.patch is not None:
        return Solution(nearest.patch, nearest.wish, False, 0.0, tuple(attempts))
    return tuple(attempts)


def exactly(model: Any, queries: Yardstick, wish: Wish, progress: Progress) -> ModelPatch | ExactAttempt:
    """The exact patch within the rank that was asked for, verified on the queries one by one; or why there is none."""
    allowed = tolerance(model)
    try:
        patch = patch_of(model, queries.samples, replace(wish, rank=None, ridge=0.0), progress)
        if wish.rank is not None and rank_of(patch) > wish.rank:
            raise SideConditionFailed(
                f"the exact patch has rank {rank_of(patch)}, more than {wish.rank}", "the whole model", None,
                hint="allow a higher rank, or least squares",
            )  # fmt: skip
    except (SideConditionFailed, NotControllable, NotVerified) as failed:
        certificate = getattr(failed, "certificate", None)
        return ExactAttempt(wish, str(failed).splitlines()[0], certificate and certificate.to_dict(), failed)
    with patch.applied(model):
        missed = queries.measure(model, alone=True).relative_error
    if missed <= allowed:
        return patch
    reason = (
        f"solved exactly, but one query at a time it misses the contextual model's logits by {missed:.2g} (relative; {allowed:g} "
        "counts as verified): rounding is magnified too much; try float64"
    )
    near = missed <= min(0.1, NEARLY * allowed)
    return ExactAttempt(
        wish, reason, None, NotVerified(reason), patch if near else None, missed if near else float("inf")
    )


def patch_of(model: Any, samples: Sequence[Sample], wish: Wish, progress: Progress) -> ModelPatch:
    """One set of weights for all tokens of the samples; ``via`` and ``ridge`` of the wish are decided."""
    target, source = (padded(samples, side, device=next(model.parameters()).device) for side in ("target", "source"))
    return patch_model(
        model, target, source, scope="all", via=str(wish.via),
        positions=positions(samples, wish.pinned), ridge=float(wish.ridge or 0), rank=wish.rank, keep_rms=wish.keep_rms, progress=progress,
        place=wish.place,
    )  # fmt: skip


def rank_of(patch: ModelPatch) -> int:
    """The largest rank of a ΔW; 0 where only vectors move."""
    return max((e.delta.left.shape[-2] for e in patch.entries if isinstance(e.delta, LowRank)), default=0)


def tolerance(model: Any) -> float:
    """The relative error within which a model of this dtype counts as verified."""
    return VERIFIED.of({p.dtype for p in model.parameters()})
