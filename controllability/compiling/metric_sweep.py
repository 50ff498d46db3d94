"""One set of weights that carries a context over to other wordings and leaves other text alone: a fit in the metric of ordinary text.

Layer by layer, on the run that is patched so far, each map in the layers of a ``Strength`` is asked for what its layer lacks of the
contextual model's state (theory 7).  The first token is held where it is: every text begins with it, and much attention rests on it.
"""

from collections.abc import Sequence
from typing import Any

from controllability.compiling.strengths import Strength
from controllability.compiling.token_sets import Prefix, Sample, padded, positions
from controllability.deltas import LowRank
from controllability.interfaces import FitRows, JointOptions
from controllability.models.model_patch import ModelPatch
from controllability.models.moments import Moments
from controllability.models.patches.solve import solve
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.sweep.target_run import Progress

FIRST = 10.0  # how many tokens' weight the first ones have together


def fitted(
    model: Any, samples: Sequence[Sample], strength: Strength, rank: int | None, moments: Moments | None, progress: Progress
) -> ModelPatch:  # fmt: skip
    """The patch.  ``rank`` bounds the rank of every ΔW."""
    target, source = (padded(samples, side, device=next(model.parameters()).device) for side in ("target", "source"))
    layers = strength.layers(len(checked_reading(model).reading.layers))
    joint = JointOptions(rank=rank, damping=strength.damping, rows=FitRows(weights(samples)), layers=layers)
    record = solve(
        model, target, source, "all", "output", "auto", positions(samples), progress, joint, moments,
    )  # fmt: skip
    return ModelPatch.of(record)


def drifts(model: Any, patch: ModelPatch) -> dict[str, float]:
    """√(tr(ΔW C ΔWᵀ)/tr(W C Wᵀ)), exact: how much ordinary text feels the change of each map, beside what the map gives there."""
    found = {}
    for entry in patch.entries:
        metric, delta = patch.metrics.get(entry.param.name), entry.delta
        if metric is None or type(delta) is not LowRank or entry.param.index:
            continue
        W = model.get_parameter(entry.param.name).detach().double()
        W = W.mT if delta.transposed else W
        C, left, right = metric.second.to(W), delta.left.to(W), delta.right.to(W)
        change, whole = ((left @ left.mT) * (right @ C @ right.mT)).sum(), (W @ C * W).sum()
        found[entry.param.name] = float((change.clamp_min(0) / whole).sqrt())
    return found


def weights(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Of every token of every sample: one that begins several samples counts where it comes first, the first ones ``FIRST`` in all."""
    seen: set[Prefix] = set()
    firsts = {prefix for sample in samples for prefix in sample.prefixes() if len(prefix) <= sample.first}
    found = []
    for sample in samples:
        for prefix in sample.prefixes():
            weight = FIRST / len(firsts) if prefix in firsts else float(sample.weight)
            found.append(0.0 if prefix in seen else weight)
            seen.add(prefix)
    return tuple(found)
