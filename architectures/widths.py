"""Do the shapes of a live layer fit each other, part by part, in the declared expression?"""

from __future__ import annotations

from dataclasses import dataclass

from controllability.components import (
    Activation,
    Bias,
    ExpertLinear,
    Fixed,
    Glu,
    Identity,
    Linear,
    Mixture,
    Normalize,
    Product,
    Scale,
    Select,
    Sequence,
    SoftCap,
    Sum,
    Swish,
    Times,
)
from controllability.interfaces import Component, Param, Params

SAME = (Activation, Identity, Normalize, SoftCap, Swish, Times)  # as wide after as before


@dataclass(frozen=True)
class Width:
    """How many numbers a position has here, and who says so."""

    size: int
    by: str


def misfits(block: Component, params: Params) -> list[str]:
    """What in ``block`` cannot be computed with parameters of these shapes; empty when all fit.

    Parts whose width is not known (a component of a user's own) are passed over: the comparison with the real
    modules sees them.

    >>> import numpy as np
    >>> up, down = (Linear(Param(n, ("h", "d"))) for n in ("up", "down"))
    >>> misfits(up >> down, {"up": np.zeros((6, 4)), "down": np.zeros((6, 4))})
    ['down has shape (6, 4), declared (h, d): it reads 4 numbers and gets 6 from linear up; as stored the other way round it would fit (layout)']
    """
    check = _Check(params)
    check.follow(block, _first_read(block, check))
    return check.problems


def _first_read(block: Component, check: _Check) -> Width | None:
    """The width of the block's input, as the first part that reads it says."""
    if isinstance(block, Linear | Scale | Bias):
        return check.reads(block)
    if isinstance(block, Sequence):
        for part in block.children():
            if (found := _first_read(part, check)) or not isinstance(part, SAME):
                return found
        return None
    if isinstance(block, Mixture):
        return _first_read(block.children()[0], check)
    if isinstance(block, Sum | Product):
        return next((w for part in block.children() if (w := _first_read(part, check))), None)
    return None


class _Check:
    """Follows the width of a position through an expression and notes what does not fit."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.problems: list[str] = []

    def shape(self, param: Param) -> tuple[int, ...]:
        return tuple(int(n) for n in param.value(self.params).shape)

    def reads(self, leaf: Linear | Scale | Bias) -> Width | None:
        """What a leaf wants to read."""
        shape = self.shape(leaf.own_parameters()[0])
        if isinstance(leaf, Linear):
            return Width(shape[-1 if leaf.layout == "out_in" else 0], leaf.describe()) if len(shape) == 2 else None
        return Width(shape[0], leaf.describe()) if len(shape) == 1 and shape != (1,) else None

    def follow(self, part: Component, given: Width | None) -> Width | None:
        """The width after ``part``; None where it is not known."""
        if isinstance(part, Linear):
            return self.linear(part, given)
        if isinstance(part, Scale | Bias):
            wanted = self.reads(part)
            self.compare(part.own_parameters()[0], wanted, given)
            return given or wanted
        if isinstance(part, SAME):
            return given
        if isinstance(part, Select):
            return given if part.index == 0 else None
        if isinstance(part, Fixed):
            return self.follow(part.inner, given)
        if isinstance(part, Glu):
            if given and given.size % 2:
                self.problems.append(f"{given.by} gives {given.size} numbers, which have no two halves")
            return Width(given.size // 2, f"half of {given.by}") if given else None
        if isinstance(part, Sequence):
            for inner in part.parts:
                given = self.follow(inner, given)
            return given
        if isinstance(part, Sum | Product):
            return self.together(part, given)
        if isinstance(part, Mixture):
            self.follow(part.router, given)
            return self.follow(part.last, self.follow(part.inner, given))
        if isinstance(part, ExpertLinear) and part.stacked is None and len(shape := self.shape(part.weight)) == 3:
            out, into = shape[1:] if part.layout == "out_in" else shape[:0:-1]
            self.compare(part.weight, Width(into, part.describe()), given)
            return Width(out, part.describe())
        return None

    def linear(self, part: Linear, given: Width | None) -> Width | None:
        shape = self.shape(part.weight)
        if len(shape) != 2:
            return None  # said already, when the parameters were bound
        out, into = shape if part.layout == "out_in" else shape[::-1]
        turned = "; as stored the other way round it would fit (layout)" if given and out == given.size else ""
        fits = self.compare(part.weight, Width(into, part.describe()), given, turned)
        if part.bias is not None and (found := self.shape(part.bias)) != (out,):
            self.problems.append(
                f"{part.bias} has shape {found}, and {part.weight} of shape {shape} gives {out} numbers"
            )
        return Width(out, part.describe()) if fits else None  # what follows from it is no news

    def compare(self, param: Param, wanted: Width | None, given: Width | None, more: str = "") -> bool:
        fits = not (wanted and given and wanted.size != given.size)
        if wanted and given and not fits:
            declared = f", declared ({', '.join(map(str, param.shape))})" if param.shape else ""
            self.problems.append(
                f"{param} has shape {self.shape(param)}{declared}: it reads {wanted.size} numbers and gets "
                f"{given.size} from {given.by}{more}"
            )
        return fits

    def together(self, part: Sum | Product, given: Width | None) -> Width | None:
        found = [w for inner in part.children() if (w := self.follow(inner, given)) and w.size != 1]
        odd = next((w for w in found if w.size != found[0].size), None)
        if odd:
            does = "adds" if isinstance(part, Sum) else "multiplies"
            first = found[0]
            self.problems.append(
                f"the expression {does} {first.size} numbers ({first.by}) and {odd.size} numbers ({odd.by})"
            )
        return found[0] if found else None
