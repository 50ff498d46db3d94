"""One patch for many tokens: what is asked for, how it is solved, what comes back.  (theory 5)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from controllability.arrays import Array
from controllability.arrays.lazy import np
from controllability.deltas import Delta
from controllability.interfaces.condition import Condition
from controllability.interfaces.param import Params

if TYPE_CHECKING:
    from controllability.solvers.metric_fit import Drift
    from controllability.solvers.served_tokens import Known


@dataclass(frozen=True)
class FitRows:
    """How every token of a fit counts: its weight; whether it is to ``stay`` as it is; whether it is ``hard``, reached exactly."""

    weights: tuple[float, ...]
    stay: tuple[bool, ...] | None = None
    hard: tuple[bool, ...] | None = None

    def arrays(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shares, which add up to 1, stay, hard) of ``count`` rows: inside a mixture every token has several."""
        times, none = count // len(self.weights), (False,) * len(self.weights)
        shares, stay, hard = (np.repeat(held, times) for held in (self.weights, self.stay or none, self.hard or none))
        return shares / shares.sum(), stay, hard

    def among(self, kept: np.ndarray) -> FitRows:
        """Those of the rows that are ``kept`` (T · times,), of which a token has several."""
        parts = self.arrays(len(kept))
        return FitRows(*(tuple(part[kept].tolist()) for part in parts))


@dataclass(frozen=True)
class JointOptions:
    """How many tokens are solved for at once: exactly, or by least squares.

    ``ridge`` > 0 weighs ‖ΔW‖² against the tokens' errors, ``rank`` bounds the rank of every ΔW; either makes the patch a fit, and
    no target is promised.  ``keep_rms`` refuses to let the RMS before a norm move.  ``read_by`` says who reads the block's output:
    a later block that reaches its own target whatever this one gives (theory 1b: the last one decides), so that
    where only a scale that magnifies rounding is exact, the nearest one is taken; or a norm alone, to which a token's size
    does not count.  ``may_fall_short``: before such a block, targets that cannot all be reached are reached as nearly as can be.

    ``damping`` ν leaves the scales m behind norms alone: each map is asked for the part m∘g/(m² + ν·mean m²) of what the branch lacks,
    g; the mean error of the tokens, as its ``rows`` count, stands against λ·tr(ΔW Σ ΔWᵀ) (theory 7).  ``layers`` (index, λ, ν) are the only ones that move then.
    """

    ridge: float = 0.0
    rank: int | None = None
    keep_rms: bool = False
    damping: float | None = None
    rows: FitRows | None = None
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
        names = "ridge", "rank", "keep_rms", "damping", "layers"
        held = {name: getattr(self, name) for name in names if name in names[:3] or getattr(self, name) is not None}
        return held | ({} if self.rows is None else {"rows": asdict(self.rows)})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> JointOptions:
        """What ``to_dict`` gave, also as JSON has it."""
        layers, rows = data.get("layers"), data.get("rows")
        held = {
            "layers": layers and tuple(map(tuple, layers)),
            "rows": rows and FitRows(**{name: value and tuple(value) for name, value in rows.items()}),
        }
        return JointOptions(**{**data, **{name: value for name, value in held.items() if value}})

    def at(self, layer: int) -> JointOptions | None:
        """How a layer is solved; None where it does not move."""
        if self.layers is None:
            return self
        found = next(((ridge, nu) for index, ridge, nu in self.layers if index == layer), None)
        if found is None:
            return None
        last = layer == max(index for index, *_ in self.layers)  # what others leave, it makes good
        rows = self.rows if last or self.rows is None else replace(self.rows, hard=None)
        return replace(self, ridge=found[0], damping=found[1], rows=rows)


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
