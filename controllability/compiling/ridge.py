"""Choosing λ of the least squares by what comes out on texts that it was not fitted to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from controllability.compiling.token_sets import Sample, beginnings
from controllability.compiling.yardstick import Yardstick
from controllability.errors import ControllabilityError, NotControllable, NotVerified, SideConditionFailed
from controllability.models.model_patch import ModelPatch
from controllability.models.sweep.target_run import Progress

GRID = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = 3

Solve = Callable[[Sequence[Sample], float], ModelPatch]


@dataclass(frozen=True)
class RidgeChoice:
    """The λ with the smallest mean KL on ``judged_on``; ``tried`` has a row {ridge, kl, top1_agreement} for each, in order."""

    ridge: float
    judged_on: str
    tried: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def choose_ridge(
    model: Any, solve: Solve, queries: Yardstick, heldout: Yardstick | None, progress: Progress,
    grid: Sequence[float] = GRID,
) -> RidgeChoice:  # fmt: skip
    """Try every λ of ``grid``: fitted to the queries and judged on ``heldout``; without that, queries are left out in turn.

    A single query cannot be judged: it gets the smallest λ.  Raises the last ``SideConditionFailed`` (or ``NotControllable``)
    if no λ has a solution.
    """
    if heldout is not None:
        folds, judged_on = [(list(queries.samples), heldout)], "held-out queries"
    else:
        folds = [*_folds(queries)]
        judged_on = f"queries left out in turn, {len(folds)} folds"
    if not folds:
        return RidgeChoice(min(grid), "nothing: the queries cannot be split", [])
    rows: list[dict[str, Any]] = []
    failed: ControllabilityError | None = None
    for i, ridge in enumerate(grid):
        try:
            found = [_judged(model, solve(samples, ridge), left_out) for samples, left_out in folds]
        except (SideConditionFailed, NotControllable, NotVerified) as error:
            failed = error
            rows.append({"ridge": ridge, "kl": None, "top1_agreement": None})
        else:
            kl, top1 = (sum(column) / len(found) for column in zip(*found, strict=True))
            rows.append({"ridge": ridge, "kl": kl, "top1_agreement": top1})
        progress("choosing λ", i + 1, len(grid))
    solved = [row for row in rows if row["kl"] is not None]
    if not solved:
        assert failed is not None
        raise failed
    return RidgeChoice(min(solved, key=lambda row: (row["kl"], -row["ridge"]))["ridge"], judged_on, rows)


def _judged(model: Any, patch: ModelPatch, left_out: Yardstick) -> tuple[float, float]:
    with patch.applied(model):
        found = left_out.measure(model)
    return found.kl, found.top1_agreement


def _folds(queries: Yardstick) -> Iterator[tuple[list[Sample], Yardstick]]:
    """(samples to fit, texts to judge); tokens that the fit knows are not judged, and a fold without others is none."""
    count = len(queries.samples)
    for k in range(min(FOLDS, count) if count > 1 else 0):
        kept = [sample for i, sample in enumerate(queries.samples) if i % FOLDS != k]
        known = beginnings(kept)
        left_out = [i for i in range(k, count, FOLDS) if queries.samples[i].source not in known]
        if kept and left_out:
            yield kept, queries.part(left_out, known)
