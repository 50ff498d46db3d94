"""A component: a map of the last axis with named parameters, and the three ways to put components together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from controllability.arrays import Array
from controllability.errors import BadInput
from controllability.interfaces.param import Param, Params


class Component(ABC):
    """A map of the last axis with named parameters: a frozen dataclass without state."""

    @abstractmethod
    def __call__(self, params: Params, x: Array) -> Array:
        """The value at ``x``, shape (..., in) -> (..., out)."""

    @abstractmethod
    def describe(self) -> str:
        """A short name in the user's own terms (one line, no tree)."""

    def children(self) -> tuple[Component, ...]:
        """The parts; empty for a leaf."""
        return ()

    def own_parameters(self) -> tuple[Param, ...]:
        """The parameters that this very component reads, its parts aside."""
        return ()

    def child_input(self, index: int, x: Array, output: Callable[[int], Array]) -> Array:
        """What part ``index`` reads, from this component's input and the outputs of other parts."""
        return x

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        """This component's value from the outputs of its parts."""
        raise NotImplementedError(f"{type(self).__name__} has parts but does not say how they are put together")

    def bindings(self, params: Params, output: Callable[[int], Array]) -> Params:
        """Values that this component names for its parts (a mixture: the chosen experts); none by default."""
        return {}

    @property
    def module(self) -> str:
        """The live module that computes this leaf, by the name of its parameters; '' if none."""
        own = self.own_parameters()
        return own[0].name.rpartition(".")[0] if own else ""

    @property
    def width(self) -> int | str | None:
        """The size of the input's last axis, where the component knows it."""
        return None

    def parameters(self) -> frozenset[Param]:
        """Every parameter that the component or one of its parts reads."""
        return frozenset(self.own_parameters()).union(*(c.parameters() for c in self.children()))

    def __rshift__(self, other: Component) -> Sequence:
        """``f >> g`` computes g(f(x))."""
        return Sequence.of(self, other)

    def __add__(self, other: Component) -> Sum:
        """``f + g`` computes f(x) + g(x)."""
        return Sum((self, other))

    def __mul__(self, other: Component) -> Product:
        """``f * g`` computes f(x) ∘ g(x)."""
        return Product((self, other))


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
