"""The contract a component fulfils: what it computes, and how its input and output are steered.

Axis names used in every docstring: ``...`` tokens (any number of leading axes), ``d`` model width,
``h`` hidden width, ``in``/``out`` the sides of one linear map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from controllability.arrays import Array, arithmetic
from controllability.deltas import Delta, PatchedMatrix, added
from controllability.errors import BadInput, SideConditionFailed

if TYPE_CHECKING:
    from controllability.components.combinators import Product, Sequence, Sum
    from controllability.jointly.known import Known

Params = Mapping[str, Array | PatchedMatrix]


@dataclass(frozen=True)
class Param:
    """A named parameter, or a slice of one (fused tensors); ``shape`` may name its sizes.

    >>> str(Param("mlp.gate_up.weight", index=(slice(0, 4),)))
    'mlp.gate_up.weight[0:4]'
    """

    name: str
    shape: tuple[int | str, ...] = field(default=(), compare=False)
    index: tuple[slice, ...] = ()

    def __str__(self) -> str:
        if not self.index:
            return self.name
        parts = ",".join(":".join("" if e is None else str(e) for e in _ends(s)) for s in self.index)
        return f"{self.name}[{parts}]"

    def __hash__(self) -> int:
        return hash(str(self))

    def value(self, params: Params) -> Any:
        """The array of this parameter, or the patched matrix.  Raises ``BadInput`` when it is missing."""
        key = str(self)
        if key in params:
            return params[key]
        if self.name not in params:
            raise BadInput(f"parameter {key} is missing; given are: {', '.join(sorted(params)) or 'none'}")
        whole = params[self.name]
        assert not isinstance(whole, PatchedMatrix)
        return whole[self.index] if self.index else whole

    def overlaps(self, other: Param) -> bool:
        """Whether the two name a common entry of one tensor."""
        if self.name != other.name:
            return False
        return all(_slices_meet(a, b) for a, b in zip(self.index, other.index, strict=False))


def _ends(s: slice) -> list[int | None]:
    return [s.start, s.stop] if s.step is None else [s.start, s.stop, s.step]


def _slices_meet(a: slice, b: slice) -> bool:
    ends = (a.start, a.stop, b.start, b.stop)
    if None in ends or min(ends) < 0:  # how long the axis is would have to be known
        return True
    return max(a.start, b.start) < min(a.stop, b.stop)


def overlap(a: frozenset[Param], b: frozenset[Param]) -> tuple[Param, ...]:
    """The parameters of ``a`` that share an entry with one of ``b``."""
    return tuple(sorted((p for p in a if any(p.overlaps(q) for q in b)), key=str))


@dataclass(frozen=True)
class Condition:
    """A side condition: a statement about numbers, where it is made, and how far they are from breaking it.

    ``margin(x, gap)`` returns one number a token, shape (..., 1), positive when the condition holds;
    ``x`` is the input of the component and ``gap`` the wanted change of its output.  ``hint`` is what to do
    where it fails, or a function of the margin that says so.
    """

    statement: str
    where: str
    margin: Callable[[Array, Array], Array] | None = field(default=None, compare=False, repr=False)
    hint: str | Callable[[float], str] = field(default="", compare=False, repr=False)

    def failed(
        self, margin: float | None, position: int | None = None, tokens: tuple[int, ...] = (), tried: str = ""
    ) -> SideConditionFailed:
        """The error where it fails, at row ``position`` of tokens that stand in an array of shape ``tokens``."""
        hint = self.hint if isinstance(self.hint, str) else self.hint(float("nan") if margin is None else margin)
        return SideConditionFailed(self.statement, self.where, margin, position, tried, hint, tokens)


@dataclass(frozen=True)
class Together:
    """How many tokens are solved for at once: exactly, or by least squares.

    ``ridge`` > 0 weighs ‖ΔW‖² against the tokens' errors, ``rank`` bounds the rank of every ΔW; either makes the patch a fit, and
    no target is promised.  ``keep_rms`` refuses to let the RMS before a norm move.  ``behind`` says who reads the block's output:
    a later block that reaches its own target whatever this one gives (theory 1b: the last one decides), so that
    where only a scale that magnifies rounding is exact, the nearest one is taken; or a norm alone, to which a token's size
    does not count.  ``short``: before such a block, targets that cannot all be reached are reached as nearly as can be.
    """

    ridge: float = 0.0
    rank: int | None = None
    keep_rms: bool = False
    behind: Literal["anyone", "block", "norm"] = "anyone"
    short: bool = False

    @property
    def exact(self) -> bool:
        """Whether every token's target is to be reached."""
        return not self.ridge and self.rank is None

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, JSON-ready."""
        return {"ridge": self.ridge, "rank": self.rank, "keep_rms": self.keep_rms}


@dataclass(frozen=True, eq=False)
class Solved:
    """One delta for all tokens, and how much room each had, (T, 1): positive where its target is reached.

    ``known`` is what the solver must be given again to add tokens to these.
    """

    delta: Delta
    room: Array
    known: Known | None = None


@dataclass(frozen=True)
class Jointly:
    """The same way for many tokens, one delta for all of them; axis 0 of every array runs over the tokens.

    ``solve(together, params, x, gap, raw, known)`` finds the delta that adds ``gap`` (T, out) to ``raw`` (T, out), the outputs as
    they are at ``x`` (T, in), and serves the tokens ``known`` from before as well.  It raises ``SideConditionFailed`` with a certificate where no delta does.  ``most`` names how many tokens
    in general position it serves.
    """

    rule: str
    conditions: tuple[Condition, ...]
    solve: Callable[[Together, Params, Array, Array, Array, Known | None], Solved]
    most: int | str


@dataclass(frozen=True)
class Steering:
    """One way to change a component's output by moving one of its parameters.

    ``solve(params, x, gap)`` returns the delta that adds ``gap`` (..., out) to the output at
    input ``x`` (..., in); ``effect(x, delta)`` is what a delta adds to the output.  ``jointly`` does it for many tokens with one delta.
    """

    rule: str
    param: Param
    conditions: tuple[Condition, ...]
    solve: Callable[[Params, Array, Array], Delta]
    effect: Callable[[Array, Delta], Array]
    jointly: Jointly | None = None


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
        from controllability.components.combinators import Sequence

        return Sequence.of(self, other)

    def __add__(self, other: Component) -> Sum:
        """``f + g`` computes f(x) + g(x)."""
        from controllability.components.combinators import Sum

        return Sum((self, other))

    def __mul__(self, other: Component) -> Product:
        """``f * g`` computes f(x) ∘ g(x)."""
        from controllability.components.combinators import Product

        return Product((self, other))


class InputControllable(ABC):
    """f with, for admissible (x, x'), parameters θ' such that f(x; θ') = f(x'; θ).  [G, Def. 3]"""

    @abstractmethod
    def input_steerings(self) -> tuple[Steering, ...]:
        """The ways to do it, the preferred one first."""

    def steer_input(self, params: Params, x: Array, x_target: Array) -> dict[str, Delta]:
        """The patch with which the output at ``x`` is what it was at ``x_target`` (same shapes).

        Raises ``SideConditionFailed`` when no way is open at these numbers.
        """
        assert isinstance(self, Component)
        gap = self(params, x_target) - self(params, x)
        return first_open(self.input_steerings(), params, x, gap)


class OutputControllable(ABC):
    """g with, for admissible x and δ, parameters φ' such that g(x; φ') = g(x; φ) + δ.  [G, Def. 4]"""

    @abstractmethod
    def output_steerings(self) -> tuple[Steering, ...]:
        """The ways to do it, the preferred one first."""

    def steer_output(self, params: Params, x: Array, delta: Array) -> dict[str, Delta]:
        """The patch that adds ``delta`` (..., out) to the output at ``x`` (..., in).

        Raises ``SideConditionFailed`` when no way is open at these numbers.
        """
        return first_open(self.output_steerings(), params, x, delta)


class Steerable(InputControllable, OutputControllable):
    """A leaf whose output is affine in its own parameters: one construction serves both sides.

    The input rule is the output rule with gap = f(x') − f(x).
    """

    @abstractmethod
    def steerings(self, side: str) -> tuple[Steering, ...]:
        """The ways to add a gap to the output; ``side`` is 'I' or 'O' and names the rule."""

    def input_steerings(self) -> tuple[Steering, ...]:
        return self.steerings("I")

    def output_steerings(self) -> tuple[Steering, ...]:
        return self.steerings("O")


class Bijection(ABC):
    """A component that can be undone on its image, its parameters staying as they are."""

    @abstractmethod
    def invert(self, params: Params, y: Array) -> Array:
        """The x with self(params, x) = y."""

    def image_conditions(self) -> tuple[Condition, ...]:
        """What must hold for a target to be in the image; none for a bijection onto everything."""
        return ()

    def image_margin(self, params: Params, y: Array) -> Array:
        """How far each target (..., d) is from leaving the image, shape (..., 1); positive inside."""
        raise NotImplementedError(f"{type(self).__name__} has image conditions but no image_margin")


def first_open(steerings: tuple[Steering, ...], params: Params, x: Array, gap: Array) -> dict[str, Delta]:
    """The delta of the first steering whose conditions hold on these numbers."""
    failure: SideConditionFailed | None = None
    for steering in steerings:
        try:
            for condition in steering.conditions:
                measure(condition, x, gap)
        except SideConditionFailed as failed:
            failure = failure or failed
            continue
        return {str(steering.param): steering.solve(params, x, gap)}
    assert failure is not None
    raise failure


def measure(condition: Condition, x: Array, gap: Array) -> Array | None:
    """The margin of every token, (..., 1); None when it is vacuous or symbolic.

    Raises ``SideConditionFailed`` with the first offending position.
    """
    if condition.margin is None:
        return None
    xp = arithmetic(x, gap)
    found = condition.margin(x, gap)
    margins = found.reshape(-1)
    if xp.symbolic:
        zeros = xp.is_zero(margins)
        if not zeros.any():
            return None  # generic symbols: assumed, and listed with the proof
        raise condition.failed(0.0, int(zeros.argmax()))
    held = margins > 0
    if not xp.all(held):  # NaN breaks a condition too
        bad = int((~held).nonzero()[0].reshape(-1)[0])
        raise condition.failed(xp.to_float(margins[bad]), bad, tuple(found.shape[:-1]))
    return found


__all__ = [
    "Bijection", "Component", "Condition", "InputControllable", "Jointly", "OutputControllable", "Param",
    "Params", "Solved", "Steerable", "Steering", "Together", "added", "first_open", "measure", "overlap",
]  # fmt: skip
