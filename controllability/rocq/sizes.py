"""Index types of a certificate: which axes have one size, found by unification, so that every size stays a variable."""

import re
from dataclasses import dataclass, field
from typing import Any

from controllability.errors import BadInput

Size = int | str  # a variable's number, or UNIT
UNIT = "unit"
MARK = re.compile(r"⟨(\d+)⟩")


@dataclass(frozen=True)
class Rows:
    """The size of a state of rows, each a vector."""

    count: Size
    size: Size


@dataclass
class Sizes:
    """Variables for sizes, those that are one size joined; a variable may be a sum or a product of two others."""

    parent: list[Size] = field(default_factory=list)
    hints: dict[int, str] = field(default_factory=dict)
    parts: dict[int, tuple[str, Size, Size]] = field(default_factory=dict)  # of a variable: (+ or *, a, b)
    numbers: dict[int, int] = field(default_factory=dict)  # of a variable, where it is known

    def new(self, hint: str = "n") -> int:
        """A size of its own, with a wish for its name."""
        self.parent.append(len(self.parent))
        self.hints[len(self.parent) - 1] = hint
        return len(self.parent) - 1

    def find(self, size: Any) -> Any:
        """The variable that stands for a size."""
        while isinstance(size, int) and self.parent[size] != size:
            size = self.parent[size]
        return size

    def join(self, a: Any, b: Any) -> Any:
        """The one size that both are.  Raises ``BadInput`` where they cannot be."""
        if isinstance(a, Rows) and isinstance(b, Rows):
            return Rows(self.join(a.count, b.count), self.join(a.size, b.size))
        a, b = self.find(a), self.find(b)
        if a == b:
            return a
        if not isinstance(a, int):
            a, b = b, a
        known = [self.numbers[s] for s in (a, b) if s in self.numbers]
        if not isinstance(a, int) or (a in self.parts and not isinstance(b, int)) or len({*known}) > 1:
            raise BadInput("the block's sizes do not fit each other: one axis has two sizes, or is cut in two ways")
        self.parent[a] = b
        if isinstance(b, int):
            if self.hints[b] == "n":
                self.hints[b] = self.hints[a]
            if known:
                self.numbers[b] = known[0]
            if a in self.parts:
                self.cut(b, *self.parts[a])
        return b

    def cut(self, size: Size, sign: str, a: Size, b: Size) -> None:
        """Say that a size is a + b, or a·b.  Raises ``BadInput`` where it is something else."""
        whole = self.find(size)
        if not isinstance(whole, int):
            raise BadInput("one number has no parts")
        if whole in self.parts:
            if self.parts[whole][0] != sign:
                raise BadInput("the block's sizes do not fit each other: one axis is cut in two ways")
            self.join(self.parts[whole][1], a)
            self.join(self.parts[whole][2], b)
        else:
            self.parts[whole] = (sign, a, b)

    def half(self, size: Size) -> Size:
        """The size of either half of an axis."""
        whole = self.find(size)
        one = self.new(self.hints[whole].lstrip("0123456789") or "n") if isinstance(whole, int) else size
        self.cut(size, "+", one, one)
        return self.find(one)

    def counted(self, hint: str, number: int) -> Size:
        """A size that is a known number."""
        size = self.new(hint)
        self.numbers[size] = number
        return size

    def mark(self, size: Size) -> str:
        """What stands for a size in a text until every size is known."""
        return f"⟨{size}⟩" if isinstance(size, int) else size

    def resolve(self, text: str, taken: set[str]) -> tuple[str, list[str]]:
        """The text with names for its sizes, and those names; ``taken`` names are not used."""
        names: dict[int, str] = {}

        def name(size: Size) -> str:
            size = self.find(size)
            if not isinstance(size, int):
                return size
            if size in self.parts:
                sign, a, b = self.parts[size]
                return f"({name(a)} {sign} {name(b)})"
            if size not in names:
                wish = re.sub(r"\W", "", self.hints[size], flags=re.ASCII)
                wish = wish if wish[:1].isalpha() else f"n{wish}"
                free = [wish, *(f"{wish}{i}" for i in range(2, len(self.parent) + 3))]
                names[size] = next(n for n in free if n not in taken)
                taken.add(names[size])
            return names[size]

        return MARK.sub(lambda found: name(int(found[1])), text), list(names.values())
