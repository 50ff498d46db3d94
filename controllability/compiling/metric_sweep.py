"""One set of weights that carries a context over to other wordings and leaves other text alone: a fit in the metric of ordinary text.

Layer by layer, on the run that is patched so far, each map in the layers of a ``Strength`` is asked for what its layer lacks of the
contextual model's state (theory 7).  The first token is held where it is: every text begins with it, and much attention rests on it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from controllability.arrays.sharded import gathered
from controllability.compiling.refine import refined
from controllability.compiling.strengths import Strength
from controllability.compiling.token_sets import Prefix, Sample, padded, positions
from controllability.compiling.yardstick import Yardstick
from controllability.deltas import LowRank
from controllability.interfaces import FitRows, JointOptions
from controllability.models.model_patch import ModelPatch
from controllability.models.moments import Moments
from controllability.models.patches.solve import solve
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import Progress

FIRST = 10.0  # how many tokens' weight the first ones have together
EVEN = 0.1  # of the mean gap, that a token counts where the context changes nothing


def fitted(
    model: Any, queries: Yardstick, strength: Strength, rank: int | None, moments: Moments | None, progress: Progress,
    past: SharedPast | None = None, place: str | None = None,
) -> ModelPatch:  # fmt: skip
    """The patch.  ``rank`` bounds the rank of every ΔW; ``past`` is the context, run already."""
    samples, device = queries.samples, next(model.parameters()).device
    target, source = (padded(samples, side, device=device) for side in ("target", "source"))
    layers = strength.layers(len(checked_reading(model, place=place).reading.layers))
    joint = JointOptions(rank=rank, damping=strength.damping, rows=fit_rows(queries, strength), layers=layers)
    record = solve(
        model, target, source, "all", "output", "auto", positions(samples), progress, joint, moments, past, place,
    )  # fmt: skip
    patch = ModelPatch.of(record)
    return refined(model, queries, patch, strength.refine, progress) if strength.refine else patch


def drifts(model: Any, patch: ModelPatch) -> dict[str, float]:
    """√(tr(ΔW C ΔWᵀ)/tr(W C Wᵀ)), exact: how much ordinary text feels the change of each map, beside what the map gives there."""
    found = {}
    for entry in patch.entries:
        metric, delta = patch.metrics.get(entry.param.name), entry.delta
        if metric is None or type(delta) is not LowRank or entry.param.index:
            continue
        W = gathered(model.get_parameter(entry.param.name).detach()).float()
        W = W.mT if delta.transposed else W
        C, left, right = metric.second.to(W), delta.left.to(W), delta.right.to(W)
        change = ((left @ left.mT).double() * (right @ C @ right.mT).double()).sum()
        whole = (W @ C * W).sum(dtype=torch.float64)
        found[entry.param.name] = float((change.clamp_min(0) / whole).sqrt())
    return found


def fit_rows(queries: Yardstick, strength: Strength) -> FitRows:
    """How every token of every sample counts: by the KL that the context makes there, and a little anyway.

    One that begins several samples counts where it comes first.  The first ones stay, with the weight of ``FIRST`` mean tokens in all.
    """
    samples, gaps = queries.samples, [gap.kl for gap in queries.gaps]
    mean = float(torch.cat(gaps).mean()) or 1.0
    seen: set[Prefix] = set()
    firsts = {prefix for sample in samples for prefix in sample.prefixes() if len(prefix) <= sample.first}
    held = {p for s, hard in zip(samples, hard_ones(samples, strength), strict=True) if hard for p in s.prefixes()}
    weights, hard = [], []
    for sample, gap in zip(samples, gaps, strict=True):
        own = [0.0] * sample.first + [(float(kl) / mean + EVEN) * sample.weight for kl in gap]
        for prefix, weight in zip(sample.prefixes(), own, strict=True):
            weight = FIRST * (1 + EVEN) / len(firsts) if prefix in firsts else weight
            weights.append(0.0 if prefix in seen else weight)
            hard.append(prefix in held and prefix not in firsts)
            seen.add(prefix)
    stay = [len(prefix) <= sample.first for sample in samples for prefix in sample.prefixes()]
    return FitRows(tuple(weights), tuple(stay), tuple(hard) if any(hard) else None)


def hard_ones(samples: Sequence[Sample], strength: Strength) -> list[bool]:
    """Which queries the last block reaches exactly, where no norm stands behind its map: those that say so, or else all.

    A strength whose last layers do not close what the others leave has those alone that say so.
    """
    said = [sample.hard for sample in samples]
    return said if any(said) or not strength.closing else [True] * len(said)
