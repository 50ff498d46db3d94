"""How strongly a context is compiled: which layers move, and what a change costs there.  (theory 7)"""

import math
from dataclasses import dataclass

from controllability.errors import BadInput

EXACT = "exact"  # every token of the queries is reproduced, whatever it costs elsewhere


@dataclass(frozen=True)
class Strength:
    """The layers from ``first`` to ``last`` (shares of the depth, 0 … 1) move, each with λ = ``ridge`` and ν = ``damping``.

    λ weighs what ordinary text feels against the queries' mean error, ν leaves what a small scale alone could give to later
    layers.  The last ``closing`` layers move too, with ``closing_ridge`` and ``closing_damping``: what the others left, they make good.  ``refine``
    gradient steps go on from there (three passes over the queries each).

    >>> STRENGTHS["gentle"].layers(18)[0], len(STRENGTHS["gentle"].layers(18))
    ((6, 30.0, 0.1), 12)
    >>> [index for index, *_ in STRENGTHS["balanced"].layers(18)]
    [6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17]
    """

    ridge: float
    damping: float
    first: float = 0.33
    last: float = 0.83
    closing: int = 0
    closing_ridge: float = 0.03
    closing_damping: float = 0.003
    refine: int = 0

    def __post_init__(self) -> None:
        numbers = self.ridge, self.damping, self.closing_ridge, self.closing_damping
        for value in (*numbers, self.first, self.last):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise BadInput(f"a strength is made of finite numbers from 0 on, got {value!r}")
        if not self.first < self.last <= 1:
            raise BadInput(
                f"the layers of a strength go from {self.first!r} to {self.last!r}: give two shares, 0 ≤ first < last ≤ 1"
            )
        if isinstance(self.closing, bool) or not isinstance(self.closing, int) or self.closing < 0:
            raise BadInput(f"the number of closing layers must be a whole number from 0 on, got {self.closing!r}")
        if isinstance(self.refine, bool) or not isinstance(self.refine, int) or self.refine < 0:
            raise BadInput(f"refine must be a whole number of steps from 0 on, got {self.refine!r}")

    def layers(self, count: int) -> tuple[tuple[int, float, float], ...]:
        """(index, λ, ν) of every layer that moves, of ``count``."""
        first = min(round(self.first * count), count - 1)
        middle = range(first, max(first + 1, round(self.last * count)))
        closing = range(max(0, count - self.closing), count)
        moved = {i: (float(self.ridge), float(self.damping)) for i in middle}
        moved |= {i: (float(self.closing_ridge), float(self.closing_damping)) for i in closing}
        return tuple((i, *moved[i]) for i in sorted(moved))


STRENGTHS = {
    "gentle": Strength(30.0, 0.1, last=1.0),
    "balanced": Strength(20.0, 0.1, closing=2),
    "strong": Strength(1.0, 0.03, closing=2, closing_ridge=0.003, closing_damping=0.0003),
}


def name_of(strength: Strength) -> str:
    """Its name, or "by hand"."""
    return next((name for name, known in STRENGTHS.items() if known == strength), "by hand")


def strength_of(given: str | Strength) -> Strength | None:
    """The strength of that name; None for "exact".  Raises ``BadInput`` for any other."""
    if isinstance(given, Strength):
        return given
    if not isinstance(given, str) or given not in (*STRENGTHS, EXACT):
        raise BadInput(f"unknown strength {given!r}: choose {', '.join(STRENGTHS)} or {EXACT}")
    return STRENGTHS.get(given)
