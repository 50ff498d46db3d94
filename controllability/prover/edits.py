"""Changing an expression: another component at a place, another parameter, names and sizes of what is new."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from controllability.components.glu import Glu
from controllability.components.linear import Linear
from controllability.components.mixture import ExpertLinear, Mixture
from controllability.components.normalisation import Normalize
from controllability.components.residual import Identity
from controllability.components.scale import Scale
from controllability.components.select import Select
from controllability.interfaces import Component, Param, Path, Sequence, leaves, node

ROOM = 60  # characters of one component in a message

Size = int | str | None


def nodes(block: Component, path: Path = ()) -> Iterator[tuple[Path, Component]]:
    """The component and everything below it, with paths."""
    yield path, block
    for i, child in enumerate(block.children()):
        yield from nodes(child, (*path, i))


def above(block: Component, path: Path) -> Iterator[tuple[int, Component]]:
    """(index of the way down, component) for everything around ``path``."""
    return ((path[i], node(block, path[:i])) for i in range(len(path)))


def with_node(block: Component, path: Path, new: Component) -> Component | None:
    """``block`` with another component at ``path``; None where a combinator cannot be rebuilt from its parts."""
    if not path:
        return new
    child = with_node(block.children()[path[0]], path[1:], new)
    return None if child is None else _with_child(block, path[0], child)


def _with_child(parent: Component, index: int, new: Component) -> Component | None:
    """A combinator keeps its parts in fields of its dataclass, in their order."""
    if not is_dataclass(parent):
        return None
    seen: list[Component] = []
    changes: dict[str, Any] = {}
    for f in fields(parent):
        value = getattr(parent, f.name)
        held = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(part, Component) for part in held):
            continue
        if len(seen) <= index < len(seen) + len(held):
            parts = tuple(new if len(seen) + i == index else part for i, part in enumerate(held))
            changes[f.name] = parts if isinstance(value, tuple) else parts[0]
        seen += held
    if len(seen) != len(parent.children()) or any(a is not b for a, b in zip(seen, parent.children(), strict=True)):
        return None
    try:
        return replace(parent, **changes)
    except (TypeError, ValueError):  # it takes other arguments than its fields, or does not take this part
        return None


def replace_param(part: Any, old: Param, new: Param) -> Any:
    """A leaf, or what it holds, that reads ``new`` instead of ``old``; None where it does not hold it in its fields."""
    if not is_dataclass(part) or isinstance(part, type):
        return None
    changes: dict[str, Any] = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, Param):
            inner = new if value == old else None
        elif is_dataclass(value) and not isinstance(value, type) and value not in _children(part):
            inner = replace_param(value, old, new)
        else:
            continue
        if inner is not None:
            changes[f.name] = inner
    return replace(part, **changes) if changes else None


def _children(part: Any) -> tuple[Component, ...]:
    return part.children() if isinstance(part, Component) else ()


def fresh(block: Component, name: str) -> str:
    """``name``, or the first of name_2, name_3, … that no parameter of the block has."""
    taken = {p.name for p in block.parameters()}
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def stem(part: Component) -> str:
    """What new names begin with: 'mlp.down.' for a component of the module mlp.down, 'down.' for a parameter called down; '' if it has neither."""
    own = part.own_parameters()
    name = part.module or (own[0].name if own else "")
    return f"{name}." if name else ""


def shape_of(*sizes: Size) -> tuple[int | str, ...]:
    """The shape of a parameter, or () where a size is not known."""
    return tuple(s for s in sizes if s is not None) if None not in sizes else ()


def width_before(block: Component, path: Path) -> Size:
    """The size of what enters the component at ``path``, as far as shapes tell."""
    width, here = block.width, block
    for index in path:
        if isinstance(here, Sequence) or (isinstance(here, Mixture) and index == 2):
            before = here.children()[:index] if isinstance(here, Sequence) else (here.children()[1],)
            for part in before:
                width = _out(part, width)
        here = here.children()[index]
    return width


def width_after(block: Component, path: Path) -> Size:
    """The size of what leaves the component at ``path``."""
    return _out(node(block, path), width_before(block, path))


def _out(component: Component, width: Size) -> Size:
    """The size of a component's output, for an input of size ``width``."""
    if isinstance(component, Linear | ExpertLinear):
        shape = component.weight.shape
        if isinstance(component, ExpertLinear) and component.stacked:
            return shape[0] // component.stacked if shape and isinstance(shape[0], int) else None
        return shape[-2 if component.layout == "out_in" else -1] if shape else None
    if isinstance(component, Glu):
        return width // 2 if isinstance(width, int) else str(width).removeprefix("2") if width else None
    if isinstance(component, Select):
        return component.size
    if isinstance(component, Sequence | Mixture):
        for part in component.children()[1 if isinstance(component, Mixture) else 0 :]:
            width = _out(part, width)
        return width
    sizes = [_out(part, width) for part in component.children()]
    wide = [s for s in sizes if s not in (1, "one", None)]  # one number is spread over all features
    return next(iter(wide or sizes), width)


def last_norm(block: Component) -> Path | None:
    """Where the last normalisation ends: at its scale, if it has one."""
    found: Path | None = None
    everything = leaves(block)
    for (path, leaf), (next_path, scale) in zip(everything, [*everything[1:], ((), Identity())], strict=True):
        if isinstance(leaf, Normalize):
            found = next_path if isinstance(scale, Scale) and next_path[:-1] == path[:-1] else path
    return found


def short(text: str) -> str:
    """A description that fits into a message: its beginning and its end, cut between parts or between words."""
    if len(text) > ROOM:
        for cut in (" >> ", " "):
            start, end = text[: ROOM // 2].rpartition(cut)[0], text[-ROOM // 2 :].partition(cut)[2]
            if start and end:
                return f"{start}{cut}…{cut}{end}"
    return text
