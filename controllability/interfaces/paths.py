"""Places in an expression: paths of child indices from the root."""

from dataclasses import dataclass

from controllability.errors import BadInput
from controllability.interfaces.component import Component, Sequence, Size
from controllability.interfaces.param import Param

Path = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A component and where it stands; a slice of a sequence keeps the paths of its parts."""

    component: Component
    path: Path = ()
    start: int = 0

    def parts(self) -> "tuple[Place, ...]":
        """The places of the children."""
        return tuple(Place(child, (*self.path, self.start + i)) for i, child in enumerate(self.component.children()))

    def slice(self, start: int, stop: int) -> "Place":
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


@dataclass(frozen=True)
class Layout:
    """What a block says of itself, asked once: its nodes by path, where each reads, its parameters, its inputs."""

    nodes: dict[Path, Component]
    leaves: frozenset[Path]
    source: dict[Path, Path | None]  # the node whose output a node reads; None where it reads its parent's input
    binding: tuple[tuple[Path, tuple[int, ...]], ...]  # nodes that name values for some of their parts
    parameters: tuple[Param, ...]
    inputs: tuple[Size, ...]  # how wide each input is, where it is known; more than one for parallel blocks
    width: Size

    @staticmethod
    def of(block: Component) -> "Layout":
        """Walk through the block once."""
        nodes: dict[Path, Component] = {}
        source: dict[Path, Path | None] = {}
        binding: list[tuple[Path, tuple[int, ...]]] = []
        pending: list[tuple[Path, Component]] = [((), block)]
        for path, component in pending:
            nodes[path] = component
            for i, child in enumerate(component.children()):
                at = component.source_of(i)
                if at is not None and not 0 <= at < i:
                    raise BadInput(
                        f"{component.describe()}: part {i} reads part {at}; a part can read only one before it"
                    )
                source[*path, i] = None if at is None else (*path, at)
                pending.append(((*path, i), child))
            if (*path, 0) in source and (binds := component.binds):
                binding.append((path, binds))
        leaves = frozenset(path for path in nodes if (*path, 0) not in source)
        read = {index: size for path in leaves for index, size in nodes[path].inputs_read().items()}
        inputs = tuple(read.get(i, block.width) for i in range(1 + max(read, default=0)))
        parameters = tuple(sorted(block.parameters(), key=str))
        return Layout(nodes, leaves, source, tuple(binding), parameters, inputs, block.width)

    def around(self, path: Path) -> list[Path]:
        """The nodes above ``path`` that name values for it, the outermost first."""
        deeper = [(at, binds) for at, binds in self.binding if len(at) < len(path) and path[: len(at)] == at]
        return [at for at, binds in deeper if path[len(at)] in binds]


def leaves(block: Component, path: Path = ()) -> list[tuple[Path, Component]]:
    """Every leaf with its path, in the order of evaluation."""
    if not block.children():
        return [(path, block)]
    return [leaf for i, child in enumerate(block.children()) for leaf in leaves(child, (*path, i))]
