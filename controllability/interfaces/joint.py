"""One patch for many tokens: what is asked for, how it is solved, what comes back.  (theory 5)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from controllability.arrays import Array
from controllability.deltas import Delta
from controllability.interfaces.condition import Condition
from controllability.interfaces.param import Params

if TYPE_CHECKING:
    from controllability.solvers.served_tokens import Known


@dataclass(frozen=True)
class JointOptions:
    """How many tokens are solved for at once: exactly, or by least squares.

    ``ridge`` > 0 weighs ‖ΔW‖² against the tokens' errors, ``rank`` bounds the rank of every ΔW; either makes the patch a fit, and
    no target is promised.  ``keep_rms`` refuses to let the RMS before a norm move.  ``read_by`` says who reads the block's output:
    a later block that reaches its own target whatever this one gives (theory 1b: the last one decides), so that
    where only a scale that magnifies rounding is exact, the nearest one is taken; or a norm alone, to which a token's size
    does not count.  ``may_fall_short``: before such a block, targets that cannot all be reached are reached as nearly as can be.
    """

    ridge: float = 0.0
    rank: int | None = None
    keep_rms: bool = False
    read_by: Literal["anyone", "block", "norm"] = "anyone"
    may_fall_short: bool = False

    @property
    def exact(self) -> bool:
        """Whether every token's target is to be reached."""
        return not self.ridge and self.rank is None

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, JSON-ready."""
        return {"ridge": self.ridge, "rank": self.rank, "keep_rms": self.keep_rms}


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
