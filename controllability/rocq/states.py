"""States of a certificate: one vector, one for each token of a joint proof, each chosen expert, or each position of a window."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from controllability.interfaces import Param
from controllability.rocq.formula import NOW, Point, Writer
from controllability.rocq.sizes import UNIT, Rows, Size


@dataclass(frozen=True)
class Level:
    """What a state has one vector for: nothing, each token t, each row j; and the choice of experts inside a mixture.

    ``positions`` are those of a window. A state has a vector for each, and what is computed from it one, now, the last.
    """

    tokens: Size | None = None
    rows: Size | None = None
    experts: Size = UNIT
    choice: str = ""  # of one token, or a function of the token
    positions: Size | None = None

    def axes(self, w: Writer) -> list[tuple[str, str]]:
        """Index variables and their types, outermost first."""
        found = [("t", w.sizes.mark(self.tokens))] if self.tokens is not None else []
        return found + ([("j", w.sizes.mark(self.rows))] if self.rows is not None else [])

    @property
    def joint(self) -> bool:
        """Whether there are many tokens."""
        return self.tokens is not None

    def at(self, text: str) -> str:
        """A state's vector at the index variables."""
        indices = ["t"] * self.joint + ["j"] * (self.rows is not None) + [NOW] * (self.positions is not None)
        return f"({' '.join((text, *indices))})" if indices else text

    def over(self, w: Writer, body: str) -> str:
        """The state with this vector at the index variables."""
        for name, kind in reversed(self.axes(w)):
            body = f"(fun {name} : {kind} => {body})"
        return body.replace(NOW, "(inr tt)")

    def kind(self, w: Writer, vector: str) -> str:
        """The type of a state of such vectors."""
        axes = [
            *(kind for _, kind in self.axes(w)),
            *([] if self.positions is None else [w.sizes.mark(self.positions)]),
        ]
        return " -> ".join((*axes, vector))

    def outside(self) -> "Level":
        """The level around a mixture."""
        return replace(self, rows=None, choice="")

    def point(self, names: Mapping[Param, str]) -> Point:
        """Where a vector of this state is."""
        choice = f"({self.choice} t)" if self.joint and self.choice else self.choice
        rows = UNIT if self.rows is None else self.rows
        return Point(names, choice, "j" if self.rows is not None else "", rows, self.experts)


def vector(w: Writer, size: Any) -> str:
    """The type of a vector, of rows, or of a tuple of vectors."""
    if isinstance(size, Rows):
        return f"{w.sizes.mark(size.count)} -> vec {w.sizes.mark(size.size)}"
    if isinstance(size, tuple):
        first, *rest = (f"vec {w.sizes.mark(s)}" for s in size)
        for one in rest:
            first = f"({first} * {one})"
        return first
    return f"vec {w.sizes.mark(size)}"
