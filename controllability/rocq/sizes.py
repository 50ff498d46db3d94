"""Index types of a certificate: which axes have one size, found by unification, so that every size stays a variable."""

import re
from dataclasses import dataclass, field

from controllability.errors import BadInput

Size = int | str  # a variable's number, or UNIT
UNIT = "unit"
MARK = re.compile(r"⟨(\d+)⟩")


@dataclass
class Sizes:
    """Variables for sizes, those that are one size joined; a variable may be twice another (fused halves)."""

    parent: list[Size] = field(default_factory=list)
    hints: dict[int, str] = field(default_factory=dict)
    halves: dict[int, int] = field(default_factory=dict)

    def new(self, hint: str = "n") -> int:
        """A size of its own, with a wish for its name."""
        self.parent.append(len(self.parent))
        self.hints[len(self.parent) - 1] = hint
        return len(self.parent) - 1

    def find(self, size: Size) -> Size:
        """The variable that stands for a size."""
        while isinstance(size, int) and self.parent[size] != size:
            size = self.parent[size]
        return size

    def join(self, a: Size, b: Size) -> Size:
        """The one size that both are.  Raises ``BadInput`` where they cannot be."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return a
        if not isinstance(a, int):
            a, b = b, a
        if not isinstance(a, int) or (a in self.halves and not isinstance(b, int)):
            raise BadInput("the block's sizes do not fit each other: one axis is both one number and two halves")
        twice = self.halves.get(a)
        self.parent[a] = b
        if isinstance(b, int):
            if self.hints[b] == "n":
                self.hints[b] = self.hints[a]
            if twice is not None and b in self.halves:
                self.join(twice, self.halves[b])
            elif twice is not None:
                self.halves[b] = twice
        return b

    def half(self, size: Size) -> Size:
        """The size of either half of an axis."""
        whole = self.find(size)
        if not isinstance(whole, int):
            raise BadInput("one number has no halves")
        if whole not in self.halves:
            self.halves[whole] = self.new(self.hints[whole].lstrip("0123456789") or "n")
        return self.halves[whole]

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
            if size in self.halves:
                half = name(self.halves[size])
                return f"({half} + {half})"
            if size not in names:
                wish = re.sub(r"\W", "", self.hints[size], flags=re.ASCII)
                wish = wish if wish[:1].isalpha() else f"n{wish}"
                free = [wish, *(f"{wish}{i}" for i in range(2, len(self.parent) + 3))]
                names[size] = next(n for n in free if n not in taken)
                taken.add(names[size])
            return names[size]

        return MARK.sub(lambda found: name(int(found[1])), text), list(names.values())
