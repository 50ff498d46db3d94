"""Side conditions: a statement about numbers, and how far they are from breaking it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from controllability.arrays import Array, arithmetic
from controllability.errors import SideConditionFailed


@dataclass(frozen=True)
class Condition:
    """A side condition: a statement about numbers, where it is made, and how far they are from breaking it.

    ``margin(x, delta)`` returns one number a token, shape (..., 1), positive when the condition holds;
    ``x`` is the input of the component and ``delta`` the wanted change of its output.  ``hint`` is what to do
    where it fails, or a function of the margin that says so.
    """

    statement: str
    where: str
    margin: Callable[[Array, Array], Array] | None = field(default=None, compare=False, repr=False)
    hint: str | Callable[[float], str] = field(default="", compare=False, repr=False)

    def failed(
        self, margin: float | None, position: int | None = None, tokens: tuple[int, ...] = (), tried: str = ""
    ) -> SideConditionFailed:
        """The error where it fails, at row ``position`` of tokens that stand in an array of shape ``tokens``."""
        hint = self.hint if isinstance(self.hint, str) else self.hint(float("nan") if margin is None else margin)
        return SideConditionFailed(self.statement, self.where, margin, position, tried, hint, tokens)


def measure(condition: Condition, x: Array, delta: Array) -> Array | None:
    """The margin of every token, (..., 1); None when it is vacuous or symbolic.

    Raises ``SideConditionFailed`` with the first offending position.
    """
    if condition.margin is None:
        return None
    xp = arithmetic(x, delta)
    found = condition.margin(x, delta)
    margins = found.reshape(-1)
    if xp.symbolic:
        zeros = xp.is_zero(margins)
        if not zeros.any():
            return None  # generic symbols: assumed, and listed with the proof
        raise condition.failed(0.0, int(zeros.argmax()))
    held = margins > 0
    if not xp.all(held):  # NaN breaks a condition too
        bad = int((~held).nonzero()[0].reshape(-1)[0])
        raise condition.failed(xp.to_float(margins[bad]), bad, tuple(found.shape[:-1]))
    return found
