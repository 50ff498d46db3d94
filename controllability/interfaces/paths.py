"""Places in an expression: paths of child indices from the root."""

from __future__ import annotations

from dataclasses import dataclass

from controllability.interfaces.component import Component, Sequence

Path = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A component and where it stands; a slice of a sequence keeps the paths of its parts."""

    component: Component
    path: Path = ()
    start: int = 0

    def parts(self) -> tuple[Place, ...]:
        """The places of the children."""
        return tuple(Place(child, (*self.path, self.start + i)) for i, child in enumerate(self.component.children()))

    def slice(self, start: int, stop: int) -> Place:
        """Parts start … stop of a sequence, as a place of their own."""
        assert self.component.sequential
        if stop - start == 1:
            return self.parts()[start]
        return Place(Sequence(self.component.children()[start:stop]), self.path, self.start + start)

    @property
    def inlet(self) -> Path:
        """The node whose input is this place's input."""
        chain = self.component.chain()
        return self.parts()[chain[0]].inlet if chain else self.path

    @property
    def outlet(self) -> Path:
        """The node whose output is this place's output."""
        last = self.component.outlet
        return self.path if last is None else self.parts()[last].outlet

    def describe(self) -> str:
        """The component's own description."""
        return self.component.describe()


def node(block: Component, path: Path) -> Component:
    """The component at ``path``."""
    for index in path:
        block = block.children()[index]
    return block


def leaves(block: Component, path: Path = ()) -> list[tuple[Path, Component]]:
    """Every leaf with its path, in the order of evaluation."""
    if not block.children():
        return [(path, block)]
    return [leaf for i, child in enumerate(block.children()) for leaf in leaves(child, (*path, i))]
