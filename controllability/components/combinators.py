"""How components are put together: one after the other, added, multiplied, beside a skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from controllability.arrays import Array
from controllability.errors import BadInput
from controllability.interfaces import Bijection, Component, Params


@dataclass(frozen=True)
class Identity(Component, Bijection):
    """y = x: the plain skip of a residual block."""

    def __call__(self, params: Params, x: Array) -> Array:
        return x

    def describe(self) -> str:
        return "identity"

    def invert(self, params: Params, y: Array) -> Array:
        return y


@dataclass(frozen=True)
class Sequence(Component):
    """g ∘ … ∘ f, written ``f >> … >> g``.  Nested sequences are flattened.

    >>> import numpy as np
    >>> from controllability.components.times import Times
    >>> (Times(2) >> Times(3))({}, np.ones(1))
    array([6.])
    """

    parts: tuple[Component, ...]

    def __post_init__(self) -> None:
        flat = tuple(p for part in self.parts for p in (part.parts if isinstance(part, Sequence) else (part,)))
        if len(flat) < 2:
            raise BadInput(f"a sequence needs at least two parts, got {len(flat)}")
        object.__setattr__(self, "parts", flat)

    @staticmethod
    def of(*parts: Component) -> Sequence:
        """A flat sequence of ``parts``."""
        return Sequence(parts)

    def __call__(self, params: Params, x: Array) -> Array:
        return reduce(lambda value, part: part(params, value), self.parts, x)

    def child_input(self, index: int, x: Array, output: Callable[[int], Array]) -> Array:
        return x if index == 0 else output(index - 1)

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return output(len(self.parts) - 1)

    def describe(self) -> str:
        return " >> ".join(part.describe() for part in self.parts)

    def children(self) -> tuple[Component, ...]:
        return self.parts

    @property
    def width(self) -> int | str | None:
        return next((w for p in self.parts if (w := p.width) is not None), None)


@dataclass(frozen=True)
class Sum(Component):
    """f₁(x) + … + f_k(x).  A residual block is the sum of its skip and its branch."""

    terms: tuple[Component, ...]

    def __post_init__(self) -> None:
        if len(self.terms) < 2:
            raise BadInput(f"a sum needs at least two terms, got {len(self.terms)}")

    def __call__(self, params: Params, x: Array) -> Array:
        return reduce(lambda a, b: a + b, (term(params, x) for term in self.terms))

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return reduce(lambda a, b: a + b, map(output, range(len(self.terms))))

    def describe(self) -> str:
        return " + ".join(f"({t.describe()})" if t.children() else t.describe() for t in self.terms)

    def children(self) -> tuple[Component, ...]:
        return self.terms

    @property
    def width(self) -> int | str | None:
        return next((w for t in self.terms if (w := t.width) is not None), None)


@dataclass(frozen=True)
class Product(Component):
    """f₁(x) ∘ … ∘ f_k(x), elementwise: the gated product."""

    factors: tuple[Component, ...]

    def __post_init__(self) -> None:
        if len(self.factors) < 2:
            raise BadInput(f"a product needs at least two factors, got {len(self.factors)}")

    def __call__(self, params: Params, x: Array) -> Array:
        return reduce(lambda a, b: a * b, (factor(params, x) for factor in self.factors))

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return reduce(lambda a, b: a * b, map(output, range(len(self.factors))))

    def describe(self) -> str:
        return " * ".join(f"({f.describe()})" if f.children() else f.describe() for f in self.factors)

    def children(self) -> tuple[Component, ...]:
        return self.factors

    @property
    def width(self) -> int | str | None:
        return next((w for f in self.factors if (w := f.width) is not None), None)


def residual(branch: Component, skip: Component | None = None) -> Sum:
    """skip(x) + branch(x); the skip is the identity unless given."""
    return Sum((skip or Identity(), branch))


def gated(gate: Component, up: Component, activation: Component) -> Product:
    """activation(gate(x)) ∘ up(x): the first half of a gated feed-forward network."""
    return Product((gate >> activation, up))
