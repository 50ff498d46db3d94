"""What a patched run notes while it solves: margins of side conditions, routes taken."""

from collections.abc import Callable
from dataclasses import dataclass, field

from controllability.arrays import Array, arithmetic
from controllability.interfaces import Condition


@dataclass(frozen=True, eq=False)
class Margin:
    """A side condition that was tested: how far each token's numbers, (..., 1), were from breaking it."""

    condition: Condition
    tokens: Array | None

    @property
    def value(self) -> float | None:
        """The smallest margin over the tokens; None when it is vacuous or symbolic."""
        if self.tokens is None:
            return None
        xp = arithmetic(self.tokens)
        smallest = xp.to_float(xp.min(self.tokens.reshape(-1)).reshape(()))
        return None if smallest is None or abs(smallest) == float("inf") else smallest


@dataclass(frozen=True, eq=False)
class RouteTaken:
    """How one normalised output was reached.

    ``amplification`` (..., 1) is None in exact arithmetics.
    """

    where: str
    route: str
    why: Callable[[], str]
    amplification: Array | None = None


@dataclass
class Journal:
    """What happened while a proof was executed: tested conditions and routes taken.

    It holds small arrays, one number a token; what is read off them is computed when somebody reads it.
    """

    margins: list[Margin] = field(default_factory=list)
    routes: list[RouteTaken] = field(default_factory=list)
    scale_seconds: float = 0.0  # spent on one scale for many tokens

    def took(self, where: str, route: str, why: Callable[[], str], amplification: Array | None = None) -> None:
        """Note how a normalised output was reached."""
        self.routes.append(RouteTaken(where, route, why, amplification))
