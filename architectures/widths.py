"""Do the shapes of a live layer fit each other, part by part, in the declared expression?"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from controllability.interfaces import Bijection, Component, OutputControllable, Param, Params


@dataclass(frozen=True)
class Width:
    """How many numbers a position has here, and who says so."""

    size: int
    by: str


def misfits(block: Component, params: Params) -> list[str]:
    """What in ``block`` cannot be computed with parameters of these shapes; empty when all fit.

    Parts whose width is not known (a component of a user's own that does not say it) are passed over: the comparison
    with the real modules sees them.

    >>> import numpy as np
    >>> from controllability.components import Linear
    >>> up, down = (Linear(Param(n, ("h", "d"))) for n in ("up", "down"))
    >>> misfits(up >> down, {"up": np.zeros((6, 4)), "down": np.zeros((6, 4))})
    ['down has shape (6, 4), declared (h, d): it reads 4 numbers and gets 6 from linear up; as stored the other way round it would fit (layout)']
    """
    check = _Check(params)
    check.follow(block, check.first_read(block))
    return check.problems


@dataclass(frozen=True)
class _Shaped:
    """What has a shape and no numbers."""

    shape: tuple[int | str, ...]


def declared_misfits(block: Component) -> list[str]:
    """The same of the shapes that the parameters declare, as far as they are numbers.

    >>> from controllability.components import Linear
    >>> declared_misfits(Linear(Param("up", (5, 4))) >> Linear(Param("down", (4, 7))))
    ['down has shape (4, 7), declared (4, 7): it reads 7 numbers and gets 5 from linear up']
    """
    return misfits(block, {str(p): _Shaped(p.shape) for p in block.parameters()})


def _says(leaf: Component) -> bool:
    """Whether a leaf says how wide its output is; one that normalises, or can be undone, gives as much as it reads."""
    own = type(leaf).output_width is not Component.output_width
    return own or bool(leaf.normalises) or isinstance(leaf, Bijection)


def _as_wide(leaf: Component) -> bool:
    """Whether a leaf says that it gives as many numbers as it reads, however many."""
    return _says(leaf) and leaf.output_width("2n") == "2n"


class _Check:
    """Follows the width of a position through an expression and notes what does not fit."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.problems: list[str] = []

    def shape(self, param: Param) -> tuple[int | str, ...]:
        return tuple(n if isinstance(n, str) else int(n) for n in param.value(self.params).shape)

    def live(self, leaf: Any) -> Any:
        """A leaf with the shapes that its parameters have, in place of the declared ones."""
        new: dict[str, Any] = {}
        for f in fields(leaf) if is_dataclass(leaf) else ():
            value = getattr(leaf, f.name)
            if isinstance(value, Param):
                new[f.name] = replace(value, shape=self.shape(value))
            elif isinstance(value, Component):
                new[f.name] = self.live(value)
        return replace(leaf, **new) if new else leaf  # type: ignore[type-var]

    def reads(self, leaf: Component) -> Width | None:
        """What a leaf wants to read; a scale of one number takes any."""
        size = self.live(leaf).width
        known = isinstance(size, int) and not (size == 1 and _as_wide(leaf))
        return Width(size, leaf.describe()) if known else None

    def first_read(self, part: Component) -> Width | None:
        """The width of a part's input, as the first leaf that reads it says."""
        if not part.children():
            return self.reads(part)
        for i, child in enumerate(part.children() if part.in_line or part.joined_by else ()):
            if part.source_of(i) is not None and not part.in_line:
                continue
            if (found := self.first_read(child)) or (part.in_line and not _as_wide(child)):
                return found
        return None

    def follow(self, part: Component, given: Width | None) -> Width | None:
        """The width after ``part``; None where it is not known."""
        if not part.children():
            return self.leaf(part, given)
        found: dict[int, Width | None] = {}
        for i, child in enumerate(part.children() if part.in_line or part.joined_by else ()):
            source = part.source_of(i)
            found[i] = self.follow(child, given if source is None else found.get(source))
        if part.in_line or part.chosen:
            return found[max(found)]
        return self.joined(part.joined_by, [w for w in found.values() if w and w.size != 1])

    def leaf(self, part: Component, given: Width | None) -> Width | None:
        own, wanted = part.own_parameters(), self.reads(part)
        given = None if part.inputs_read() else given  # it picks an input of its own width
        if _as_wide(part):
            self.compare(own, wanted, given)
            return given or wanted
        if not _says(part) or (wanted is None and isinstance(part, OutputControllable)):
            return None  # of what is stored otherwise than declared it was said when the parameters were bound
        size = self.live(part).output_width(given.size if given else None)
        turned = given is not None and size == given.size and not part.per_expert
        fits = self.compare(own, wanted, given, "; as stored the other way round it would fit (layout)" * turned)
        for way in part.output_updates() if isinstance(part, OutputControllable) else ():
            if (
                way.kind == "bias"
                and (found := self.shape(way.param)) != (size,)
                and all(isinstance(n, int) for n in (*found, size))
            ):
                self.problems.append(
                    f"{way.param} has shape {found}, and {own[0]} of shape {self.shape(own[0])} gives {size} numbers"
                )
        if given and isinstance(size, int) and wanted is None and part.output_width("2n") == "n":
            if given.size % 2:
                self.problems.append(f"{given.by} gives {given.size} numbers, which have no two halves")
            return Width(size, f"half of {given.by}")
        news = fits or part.per_expert  # what follows from a linear map that does not fit is no news
        return Width(size, part.describe()) if isinstance(size, int) and news else None

    def compare(self, own: tuple[Param, ...], wanted: Width | None, given: Width | None, more: str = "") -> bool:
        """Whether a leaf reads what it is given, as its first parameter says."""
        fits = not (wanted and given and wanted.size != given.size)
        if wanted and given and not fits:
            declared = f", declared ({', '.join(map(str, own[0].shape))})" if own[0].shape else ""
            self.problems.append(
                f"{own[0]} has shape {self.shape(own[0])}{declared}: it reads {wanted.size} numbers and gets "
                f"{given.size} from {given.by}{more}"
            )
        return fits

    def joined(self, by: str, found: list[Width]) -> Width | None:
        """The width of a sum or a product of these."""
        if odd := next((w for w in found if w.size != found[0].size), None):
            does = "multiplies" if by == "product" else "adds"
            first = found[0]
            self.problems.append(
                f"the expression {does} {first.size} numbers ({first.by}) and {odd.size} numbers ({odd.by})"
            )
        return found[0] if found else None
