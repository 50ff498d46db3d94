"""Changing an expression: another component at a place, another parameter, names and sizes of what is new."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from controllability.errors import BadInput
from controllability.interfaces import Component, Param, Path, Size, leaves, node

ROOM = 60  # characters of one component in a message


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
    if child is None:
        return None
    try:
        return block.map_children(lambda i, part: child if i == path[0] else part)
    except (BadInput, ValueError):  # it keeps its parts elsewhere, or does not take this one
        return None


def replace_param(part: Any, old: Param, new: Param) -> Any:
    """A leaf, or what it holds, that reads ``new`` instead of ``old``; None where it does not hold it in its fields."""
    if not is_dataclass(part) or isinstance(part, type):
        return None
    changes, parts = dict[str, Any](), part.children() if isinstance(part, Component) else ()
    for f in fields(part):
        value = getattr(part, f.name)
        if isinstance(value, Param):
            inner = new if value == old else None
        elif is_dataclass(value) and not isinstance(value, type) and value not in parts:
            inner = replace_param(value, old, new)
        else:
            continue
        if inner is not None:
            changes[f.name] = inner
    return replace(part, **changes) if changes else None


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
        width, here = here.child_width(index, width), here.children()[index]
    return width


def width_after(block: Component, path: Path) -> Size:
    """The size of what leaves the component at ``path``."""
    return node(block, path).output_width(width_before(block, path))


def last_norm(block: Component) -> Path | None:
    """Where the last normalisation ends: at its scale, if it has one."""
    found: Path | None = None
    everything = leaves(block)
    for (path, leaf), (next_path, scale) in zip(everything, [*everything[1:], ((), everything[-1][1])], strict=True):
        if leaf.normalises:
            found = next_path if scale.scales and next_path[:-1] == path[:-1] else path
    return found


def short(text: str) -> str:
    """A description that fits into a message: its beginning and its end, cut between parts or between words."""
    if len(text) > ROOM:
        for cut in (" >> ", " "):
            start, end = text[: ROOM // 2].rpartition(cut)[0], text[-ROOM // 2 :].partition(cut)[2]
            if start and end:
                return f"{start}{cut}…{cut}{end}"
    return text
