"""One patch for many tokens: what is asked for, how it is solved, what comes back.  (theory 5)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from controllability.arrays import Array
from controllability.deltas import Delta
from controllability.interfaces.condition import Condition
from controllability.interfaces.param import Params

if TYPE_CHECKING:
    from controllability.solvers.metric_fit import Drift
    from controllability.solvers.served_tokens import Known


@dataclass(frozen=True)
class JointOptions:
    """How many tokens are solved for at once: exactly, or by least squares.

    ``ridge`` > 0 weighs ‖ΔW‖² against the tokens' errors, ``rank`` bounds the rank of every ΔW; either makes the patch a fit, and
    no target is promised.  ``keep_rms`` refuses to let the RMS before a norm move.  ``read_by`` says who reads the block's output:
    a later block that reaches its own target whatever this one gives (theory 1b: the last one decides), so that
    where only a scale that magnifies rounding is exact, the nearest one is taken; or a norm alone, to which a token's size
    does not count.  ``may_fall_short``: before such a block, targets that cannot all be reached are reached as nearly as can be.

    ``damping`` ν leaves the scales m behind norms alone: each map is asked for the part m∘g/(m² + ν·mean m²) of what the branch lacks,
    g; the mean error of the tokens, by ``weights``, stands against λ·tr(ΔW Σ ΔWᵀ) (theory 7).  ``layers`` (index, λ, ν) are the only ones that move then.
    """

    ridge: float = 0.0
    rank: int | None = None
    keep_rms: bool = False
    damping: float | None = None
    weights: tuple[float, ...] | None = None
    layers: tuple[tuple[int, float, float], ...] | None = None
    drift: Drift | None = None  # how much ordinary text feels a change of the matrix at hand
    read_by: Literal["anyone", "block", "norm"] = "anyone"
    may_fall_short: bool = False

    @property
    def exact(self) -> bool:
        """Whether every token's target is to be reached."""
        return not self.ridge and self.rank is None and self.damping is None and self.layers is None

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, JSON-ready."""
        names = "ridge", "rank", "keep_rms", "damping", "weights", "layers"
        return {name: getattr(self, name) for name in names if name in names[:3] or getattr(self, name) is not None}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> JointOptions:
        """What ``to_dict`` gave, also as JSON has it."""
        layers, weights = data.get("layers"), data.get("weights")
        held = {"layers": layers and tuple(map(tuple, layers)), "weights": weights and tuple(weights)}
        return JointOptions(**{**data, **{name: value for name, value in held.items() if value}})

    def shares(self, count: int) -> np.ndarray:
        """The weights of ``count`` rows, which add up to 1: inside a mixture every token has several."""
        held = np.ones(count) if self.weights is None else np.repeat(self.weights, count // len(self.weights))
        return held / held.sum()

    def at(self, layer: int) -> JointOptions | None:
        """How a layer is solved; None where it does not move."""
        if self.layers is None:
            return self
        return next(
            (replace(self, ridge=ridge, damping=nu) for index, ridge, nu in self.layers if index == layer), None
        )


@dataclass(frozen=True, eq=False)
class JointSolution:
    """One delta for all tokens, and the margin of each, (T, 1): positive where its target is reached.

    ``known`` is what the solver must be given again to add tokens to these.
    """

    delta: Delta
    margin: Array
    known: Known | None = None


@dataclass(frozen=True)
class JointUpdate:
    """One change of the parameter for many tokens; axis 0 of every array runs over the tokens.

    ``solve(joint, params, x, delta, raw, served)`` finds the delta that adds ``delta`` (T, out) to ``raw`` (T, out), the outputs as
    they are at ``x`` (T, in), and serves the tokens ``known`` from before as well.  It raises ``SideConditionFailed`` with a certificate where no delta does.  ``max_tokens`` names how many tokens
    in general position it serves.
    """

    conditions: tuple[Condition, ...]
    solve: Callable[[JointOptions, Params, Array, Array, Array, Known | None], JointSolution]
    max_tokens: int | str
