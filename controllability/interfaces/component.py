"""A component: a map of the last axis with named parameters, and the three ways to put components together."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, ClassVar

from controllability.arrays import Array
from controllability.errors import BadInput, too_deep
from controllability.interfaces.arguments import refuse_misfits
from controllability.interfaces.param import Param, Params

Size = int | str | None


class Component(ABC):
    """A map of the last axis with named parameters: a frozen dataclass without state.

    Raises ``BadInput`` for a field that is not what its annotation says, or not within ``bounds``.
    """

    bounds: ClassVar[Mapping[str, str]] = {}  # of fields that are numbers; see ``refuse_misfits``

    def __post_init__(self) -> None:
        refuse_misfits(self, self.bounds, Component)

    @abstractmethod
    def __call__(self, params: Params, x: Array) -> Array:
        """The value at ``x``, shape (..., in) -> (..., out)."""

    @abstractmethod
    def describe(self) -> str:
        """A short name in the user's own terms (one line, no tree)."""

    def children(self) -> "tuple[Component, ...]":
        """The parts; empty for a leaf."""
        return ()

    def own_parameters(self) -> tuple[Param, ...]:
        """The parameters that this very component reads, its parts aside."""
        return ()

    # what runs where: the facts from which a run, a picture and a width follow

    # the part whose output is its own, as it is; None where the parts are put together otherwise
    outlet: int | None = None
    # what it makes of its parts' outputs: "sum", "weighted sum" (by shares), "product"; "" for anything else
    joined_by: str = ""
    binds: tuple[int, ...] = ()  # the parts that see what ``bindings`` names; the other parts decide it

    def source_of(self, index: int) -> int | None:
        """The part whose output part ``index`` reads; None where it reads this component's own input."""
        return None

    def child_input(self, index: int, x: Array, output: Callable[[int], Array]) -> Array:
        """What part ``index`` reads, from this component's input and the outputs of other parts."""
        source = self.source_of(index)
        return x if source is None else output(source)

    def chain(self) -> tuple[int, ...]:
        """The parts from the one that reads this component's input to its ``outlet``; () where it has none."""
        found, index = (), self.outlet
        while index is not None:
            found, index = (index, *found), self.source_of(index)
        return found

    @property
    def in_line(self) -> bool:
        """Whether it is its parts, one after the other, and nothing else."""
        count = len(self.children())
        return count > 0 and not self.binds and self.chain() == tuple(range(count))

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        """This component's value from the outputs of its parts."""
        if self.outlet is None:
            raise NotImplementedError(f"{type(self).__name__} has parts but does not say how they are put together")
        return output(self.outlet)

    def bindings(self, params: Params, output: Callable[[int], Array]) -> Params:
        """Values that this component names for its parts (a mixture: the chosen experts); none by default."""
        return {}

    def choice_margin(self, params: Params, output: Callable[[int], Array]) -> Array:
        """How far ``bindings`` is from another choice, (..., 1), where it is one."""
        raise NotImplementedError(f"{type(self).__name__} does not say how far it is from another choice")

    def feeds(self, earlier: int, later: int) -> bool:
        """Whether a change inside part ``earlier`` reaches what part ``later`` reads."""
        if later in self.binds and earlier not in self.binds:
            return True
        source = self.source_of(later)
        return source is not None and (source == earlier or self.feeds(earlier, source))

    # what it is, where a rule or a picture has to know

    is_skip = False  # it passes its input on as it is
    sequential = False  # its parts run one after the other, so that it can be cut between any two
    scales = False  # it multiplies its input, entry by entry, by a parameter: the scale after a norm
    offset = 0  # what is added to its parameter to make the scale (Gemma stores m − 1)
    has_module = True  # whether a live module of its own computes it, where it has parameters
    positions: int = 0  # of how many positions it reads a window, its own the last; 0 where it reads its own only
    per_expert = False  # it computes expert by expert, one row for each chosen one
    # which of a block's several inputs it picks; None for what takes the one that it is given
    reads_input: int | None = None
    input_name: str | None = None  # what it calls that input, "" for no name; None where it takes all that it is given
    mixes = False  # what it gives at a position hangs on others, by itself or by what is no part of the block
    normalises: str = ""  # how it normalises its input, "rms" or "layer"; "" where it does not
    norm_epsilon: Any = 0  # what it adds under the root, where it normalises
    chosen: int = 0  # how many of its experts serve a token; 0 where there are none to choose from
    choice_words: str = ""  # how it chooses its experts

    @property
    def module(self) -> str:
        """The live module that computes this leaf, by the name of its parameters; '' if none."""
        own = self.own_parameters() if self.has_module else ()
        return own[0].name.rpartition(".")[0] if own else ""

    def inputs_read(self) -> "dict[int, Size]":
        """Which of a block's several inputs it reads, and how wide each is."""
        return {} if self.reads_input is None else {self.reads_input: self.width}

    # sizes

    @property
    def width(self) -> int | str | None:
        """The size of the input's last axis, where the component knows it."""
        return next((w for c in self.children() if (w := c.width) is not None), None)

    def output_width(self, width: Size) -> Size:
        """The size of the output's last axis for an input of size ``width``; None where it is not known."""
        sizes = [part.output_width(self.child_width(i, width)) for i, part in enumerate(self.children())]
        if self.outlet is not None:
            return sizes[self.outlet]
        wide = [size for size in sizes if size not in (1, "one", None)]  # one number is spread over all features
        return next(iter(wide or sizes), width)

    def child_width(self, index: int, width: Size) -> Size:
        """The size of what part ``index`` reads, for an input of size ``width``."""
        source = self.source_of(index)
        if source is None:
            return width
        return self.children()[source].output_width(self.child_width(source, width))

    # the expression as data

    def map_children(self, change: "Callable[[int, Component], Component]") -> "Component":
        """This component with ``change(i, part)`` in place of each part.

        A dataclass that keeps its parts in its fields, in their order, need not override it.  Raises ``BadInput`` where the parts
        are kept elsewhere, or a part is not taken.
        """
        children = self.children()
        if not children:
            return self
        count, changes = 0, dict[str, Any]()
        for name in (f.name for f in fields(self)) if is_dataclass(self) else ():
            value = getattr(self, name)
            held = value if isinstance(value, tuple) else (value,)
            parts = bool(held) and all(isinstance(part, Component) for part in held)
            if parts and held == children[count : count + len(held)]:
                new = tuple(change(count + i, part) for i, part in enumerate(held))
                changes[name] = new if isinstance(value, tuple) else new[0]
                count += len(held)
        if count != len(children):
            raise BadInput(f"{type(self).__name__} does not keep its parts in its fields: give it a map_children")
        try:
            return replace(self, **changes)  # type: ignore[type-var]
        except TypeError as error:  # it takes other arguments than its fields
            raise BadInput(f"{type(self).__name__} cannot be made anew from its fields: {error}") from None

    def map_held(self, change: Callable[[Any], Any]) -> "Component":
        """This component with ``change(x)`` in place of what it computes with itself and is no part: a routing, a gate's activation."""
        return self

    def with_bias(self, bias: Param) -> "Component | None":
        """This component with a bias of its own; None where it has one, or takes none."""
        return None

    def parameters(self) -> frozenset[Param]:
        """Every parameter that the component or one of its parts reads."""
        return frozenset(self.own_parameters()).union(*(c.parameters() for c in self.children()))

    def __rshift__(self, other: "Component") -> "Sequence":
        """``f >> g`` computes g(f(x))."""
        return Sequence.of(self, other)

    def __add__(self, other: "Component") -> "Sum":
        """``f + g`` computes f(x) + g(x)."""
        return Sum((self, other))

    def __mul__(self, other: "Component") -> "Product":
        """``f * g`` computes f(x) ∘ g(x)."""
        return Product((self, other))


class Combinator(Component):
    """A component made of parts: what each reads (``source_of``, ``child_input``) and ``assemble`` say what it computes."""

    def __call__(self, params: Params, x: Array) -> Array:
        values: dict[int, Array] = {}
        named: dict[str, Any] = {}

        def output(index: int) -> Array:
            if index not in values:
                seen = bound() if index in self.binds else params
                values[index] = self.children()[index](seen, self.child_input(index, x, output))
            return values[index]

        def bound() -> Params:
            if not named:
                named.update({**params, **self.bindings(params, output)})
            return named

        try:
            for index in self.chain():  # the first first: asked for backwards, each would wait inside the next
                output(index)
            return self.assemble(bound() if self.binds else params, output)
        except RecursionError:
            raise too_deep() from None


@dataclass(frozen=True)
class Sequence(Combinator):
    """g ∘ … ∘ f, written ``f >> … >> g``.  Nested sequences are flattened.

    >>> import numpy as np
    >>> from controllability.components.times import Times
    >>> (Times(2) >> Times(3))({}, np.ones(1))
    array([6.])
    """

    parts: tuple[Component, ...]
    sequential = True

    def __post_init__(self) -> None:
        super().__post_init__()
        flat = tuple(p for part in self.parts for p in (part.parts if isinstance(part, Sequence) else (part,)))
        if len(flat) < 2:
            raise BadInput(f"a sequence needs at least two parts, got {len(flat)}")
        object.__setattr__(self, "parts", flat)

    @staticmethod
    def of(*parts: Component) -> "Sequence":
        """A flat sequence of ``parts``."""
        return Sequence(parts)

    def source_of(self, index: int) -> int | None:
        return index - 1 if index else None

    @property
    def outlet(self) -> int:
        return len(self.parts) - 1

    def describe(self) -> str:
        return " >> ".join(part.describe() for part in self.parts)

    def children(self) -> tuple[Component, ...]:
        return self.parts


class _Elementwise(Combinator):
    """Parts that read the same, their outputs put together entry by entry."""

    sign: ClassVar[str]
    operation: ClassVar[Callable[[Array, Array], Array]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(parts := self.children()) < 2:
            kept = next(name for name, value in vars(self).items() if value is parts)
            raise BadInput(f"a {self.joined_by} needs at least two {kept}, got {len(parts)}")

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return reduce(type(self).operation, map(output, range(len(self.children()))))

    def describe(self) -> str:
        return f" {self.sign} ".join(f"({p.describe()})" if p.children() else p.describe() for p in self.children())


@dataclass(frozen=True)
class Sum(_Elementwise):
    """f₁(x) + … + f_k(x).  A residual block is the sum of its skip and its branch."""

    terms: tuple[Component, ...]
    joined_by, sign, operation = "sum", "+", operator.add

    def children(self) -> tuple[Component, ...]:
        return self.terms


@dataclass(frozen=True)
class Product(_Elementwise):
    """f₁(x) ∘ … ∘ f_k(x), elementwise: the gated product."""

    factors: tuple[Component, ...]
    joined_by, sign, operation = "product", "*", operator.mul

    def children(self) -> tuple[Component, ...]:
        return self.factors
