"""Where a live model computes the leaves of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controllability.interfaces import Component, Layout, Path, leaves


@dataclass(frozen=True)
class Tap:
    """Where a live model computes some leaves: a module, a weight inside one, or a stage of its experts.

    ``kind`` is module (its first argument goes in, its output comes out), weight (one leaf, wherever the module's
    forward computes with its parameter), first or last (the experts' first or last matrices).
    """

    module: str
    paths: tuple[Path, ...]
    kind: str = "module"
    mixture: Path | None = None

    @property
    def inlet(self) -> Path:
        """The node whose input goes in."""
        return self.paths[0]

    @property
    def outlet(self) -> Path:
        """The node whose output comes out."""
        return self.paths[-1]


def taps(block: Component, sites: Mapping[str, str] | None = None) -> tuple[Tap, ...]:
    """Group consecutive leaves that one module computes; ``sites`` names modules that are tapped at their weight."""
    groups: list[tuple[str, list[Path]]] = []
    found: list[Tap] = []
    layout = Layout.of(block)
    for path, leaf in leaves(block):
        module = leaf.module
        kind = (sites or {}).get(module, "module")
        if not module or kind == "skip":
            continue
        if leaf.per_expert:
            mixture = layout.around(path)[-1]
            stage = "last" if path[len(mixture)] == layout.nodes[mixture].binds[-1] else "first"
            found.append(Tap(module, (path,), stage, mixture))
            groups.append(("", []))
        elif kind != "weight" and groups and groups[-1][0] == module and groups[-1][1][-1][:-1] == path[:-1]:
            groups[-1][1].append(path)
            found[-1] = Tap(module, tuple(groups[-1][1]), found[-1].kind)
        else:
            groups.append((module, [path]))
            found.append(Tap(module, (path,), kind))
    return tuple(found)
