"""Second moments of what every matrix of a model reads on ordinary text: the metric in which other inputs feel a patch least.

Source: theory 7; the metric is that of ROME and MEMIT [Meng et al.].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from architectures.reading import Layer, Reading, Tap
from controllability.deltas import LowRank
from controllability.errors import BadInput
from controllability.interfaces import node, updates_of
from controllability.solvers.metric_fit import NO_MOMENTS, Drift

SHRINK = 0.1  # weight of the identity in Σ: no direction of which the texts say nothing is free


@dataclass(frozen=True, eq=False)
class Metric:
    """Σ = (1 − a)·C·n/tr C + a·I of what one matrix reads; ΔW solved for L⁻¹x, with Σ = LLᵀ, has the least tr(ΔW Σ ΔWᵀ)."""

    second: Tensor  # C (n, n)

    @property
    def sigma(self) -> Tensor:
        """Σ (n, n), float64."""
        C = self.second.double()
        scaled = C * ((1 - SHRINK) * len(C) / C.diagonal().sum())
        return scaled + SHRINK * torch.eye(len(C), dtype=C.dtype, device=C.device)

    @property
    def condition(self) -> float:
        """The largest eigenvalue of Σ beside the smallest, n³ operations each time; Σ is shrunk, so at most n/SHRINK."""
        sigma = self.sigma
        sizes = torch.linalg.eigvalsh(sigma) if sigma.isfinite().all() else sigma.new_zeros(1)
        if not sizes[0] > 0:
            raise BadInput(NO_MOMENTS)
        return float(sizes[-1] / sizes[0])

    @cached_property
    def factor(self) -> Tensor:
        """L (n, n), lower triangular, float64."""
        factor, failed = torch.linalg.cholesky_ex(self.sigma)
        if failed:
            raise BadInput(NO_MOMENTS)
        return factor

    @property
    def drift(self) -> Drift:
        """How much the texts feel a change of the matrix."""
        return self._drift

    @cached_property
    def _drift(self) -> Drift:
        return Drift(self.second.double().cpu().numpy())

    def seen(self, x: Tensor) -> Tensor:
        """L⁻¹x for rows x (…, n), in float64."""
        factor = self.factor.to(x.device)
        rows = x.double().reshape(-1, x.shape[-1])
        return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT.reshape(x.shape)

    def back(self, change: LowRank, like: Tensor) -> LowRank:
        """ΔW that reads x, from the one that reads L⁻¹x; in the precision of ``like``."""
        right = change.right.reshape(-1, change.right.shape[-1]).double()
        found = torch.linalg.solve_triangular(self.factor.to(right.device), right, upper=False, left=False)
        return replace(change, left=change.left.to(like.dtype), right=found.reshape(change.right.shape).to(like.dtype))


@dataclass(frozen=True, eq=False)
class Moments:
    """C = E[x xᵀ] of every matrix that a patch may move, by the parameter's name; each token counts by the direction it reads.

    So a few tokens of massive activations (attention sinks) do not count for all others.  ``tokens`` says over how many.
    """

    metrics: Mapping[str, Metric]
    tokens: int

    @property
    def condition(self) -> dict[str, float]:
        """The condition number of Σ of every matrix, by the parameter's name; computed each time it is asked for."""
        return {name: metric.condition for name, metric in self.metrics.items()}

    def refuse_other(self, reading: Reading) -> None:
        """Raise ``BadInput`` unless these are moments of this model's matrices, and of no others."""
        strange = set(self.metrics)
        for layer in reading.layers:
            for name in matrices(layer):
                strange.discard(name)
                width = layer.params[name].shape
                metric = self.metrics.get(name)
                if metric is None or metric.second.shape not in [(n, n) for n in width]:
                    raise BadInput(f"moments: there are none that fit {name}: they are of another model, or place")
                finite = bool(metric.second.sum().isfinite())
                if not finite or not float(metric.second.diagonal().sum()) > 0:
                    raise BadInput(f"moments: those of {name} are zero or not finite: make them anew on other texts")
        if strange:
            raise BadInput(f"moments: nothing here moves a matrix {min(strange)}: they are of another model, or place")

    def __repr__(self) -> str:
        return f"Moments({len(self.metrics)} matrices, {self.tokens} tokens)"


def matrices(layer: Layer, tap: Tap | None = None) -> list[str]:
    """The full names of the matrices behind one tap, or all of them, that a patch may move, experts' own ones left out."""
    paths = [path for each in (layer.taps if tap is None else [tap]) for path in each.paths]
    updates = [update for path in paths for update in updates_of(node(layer.block, path), "input", "output")]
    return list(dict.fromkeys(update.param.name for update in updates if update.kind == "linear"))


def refuse_other_than_moments(given: object) -> None:
    """Raise ``BadInput`` for what is neither None nor the moments that ``second_moments`` gives."""
    if not isinstance(given, Moments | None):
        raise BadInput(f"moments must be what second_moments gave, got {type(given).__name__}")
