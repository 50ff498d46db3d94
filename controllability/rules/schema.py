"""What a rule says, as something that can be executed: its own shape, with undefined functions for the parts.

A rule concludes that a component is controllable from premises about its parts.  Its schema is that
component with every part an undefined function, and a premise replaced by the bare assumption that a
patch exists.  If the rule's own ``construct`` reaches its conclusion there, it does so for all parts.
"""

from dataclasses import dataclass
from typing import Any

from controllability.arrays import Array
from controllability.arrays.lazy import sympy
from controllability.components.routing import Routing
from controllability.deltas import PatchedMatrix, Shift
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Component, Param, Params, Place, Update
from controllability.rules.base import Attempt, Rule, Schema, Search, Side, Step, Target
from controllability.symbolic.indexed import IndexedArray


def undefined(name: str, shape: tuple[Any, ...], *read: Array, distinct: bool = False) -> IndexedArray:
    """name(read): an array that is known to be the same whenever what it reads is the same.

    ``distinct`` says that no two entries of its last axis are equal, as no expert is chosen twice.
    """
    from controllability.symbolic.array_names import tag

    places = IndexedArray.named("x", shape).entry.args if any(n != 1 for n in shape) else ()
    head = sympy.Function(name, real=True, **({"distinct": True} if distinct else {}))
    return IndexedArray(shape, head(*map(tag, read), *places))


@dataclass(frozen=True)
class Unknown(Component):
    """y = F(x; its parameters), F an undefined function.  x: (..., d), y: (*rows, out), or like x without ``out``."""

    name: str
    rows: tuple[Any, ...] = ()
    out: int | str | None = "d"

    def __call__(self, params: Params, x: Any) -> Array:
        read: list[Any] = [*x] if isinstance(x, tuple | list) else [x]
        for param in self.own_parameters():
            value = param.value(params)
            read.append(value.dense() if isinstance(value, PatchedMatrix) else value)
        shape = read[0].shape if self.out is None else (*map(sympy_size, self.rows), sympy_size(self.out))
        return undefined(self.name, shape, *read)

    def describe(self) -> str:
        return self.name

    @property
    def width(self) -> int | str | None:
        return "d" if self.out is not None else None


@dataclass(frozen=True)
class Unseeing(Component):
    """y = c, whatever the input is."""

    name: str

    def __call__(self, params: Params, x: Array) -> Array:
        return undefined(self.name, (sympy_size("d"),))

    def describe(self) -> str:
        return self.name

    @property
    def width(self) -> int | str | None:
        return "d"


def sympy_size(name: int | str) -> Any:
    """A named size as a symbol; a number as it is."""
    return sympy.Symbol(name, integer=True, positive=True) if isinstance(name, str) else name


@dataclass(frozen=True)
class Assumed(Unknown):
    """An undefined function that a premise says is controllable on one ``side``."""

    side: Side = "input"

    def own_parameters(self) -> tuple[Param, ...]:
        assert self.out is not None
        return (Param(f"parameters of {self.name}", (*self.rows, self.out)),)

    def premise(self, place: Place) -> Step:
        """The premise: a patch of this function exists."""
        shift, shifted = lambda params, x, delta: Shift(delta), lambda params, x, change: change.value
        update = Update("assumed", self.own_parameters()[0], (), shift, shifted)
        return Step(Assumption(self.side), place, (), frozenset(self.own_parameters()), update=update)


class Assumption(Rule):
    """The rule of a premise: asked on the input side it can do nothing but repeat the target run."""

    name = statement = when = patch = source = "assumed"

    def __init__(self, side: Side) -> None:
        self.side = side

    def derive(self, place: Place, prover: Search) -> Attempt:
        return Attempt()

    def schema(self, step: Step) -> Schema:
        return Schema(step.place.component, (step,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        assert step.update is not None
        assert isinstance(run, SchemaRun)
        run.asked.append((step, wanted))
        run.steer(step.place.path, Goal(step.update, wanted))


class SchemaRun(PatchedRun):
    """A patched run of a schema, which remembers what the premises were asked for."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: list[tuple[Step, Target]] = []


@dataclass(frozen=True)
class UnknownRouting(Routing):
    """Chosen experts and shares as undefined functions of the logits and of what the routing reads."""

    top_k: int = 1
    read: tuple[Param, ...] = ()
    name: str = ""  # what is added to the names of the functions

    def __call__(self, params: Params, logits: Array) -> tuple[Array, Array]:
        given = [logits, *(p.value(params) for p in self.read)]
        shape = (sympy.Symbol(f"k{self.name}", integer=True, positive=True),)
        experts = undefined(f"expert{self.name}", shape, *given, distinct=True)
        return experts, undefined(f"share{self.name}", shape, *given)

    def margin(self, params: Params, logits: Array) -> Array:
        return IndexedArray((1,), logits.entry * 0 + 1)

    def parameters(self) -> tuple[Param, ...]:
        return self.read

    def describe(self) -> str:
        return "any routing"


def schema(component: Component, *paths: tuple[int, ...], update: Update | None = None) -> Schema:
    """The schema whose premises are the assumed functions at ``paths``."""
    premises = []
    for path in paths:
        part = component
        for index in path:
            part = part.children()[index]
        assert isinstance(part, Assumed)
        premises.append(part.premise(Place(part, path)))
    return Schema(component, tuple(premises), update)


def index_of(step: Step, part: Place) -> int:
    """Which child of ``step``'s component ``part`` is, or stands in."""
    return part.outlet[len(step.place.path)] - step.place.start


def terms(step: Step, assumed: dict[int, Component]) -> tuple[Component, ...]:
    """The children of ``step``'s component: assumed ones, and undefined functions for the rest."""
    count = len(step.place.component.children())
    return tuple(assumed.get(i, Unknown(f"s{i + 1}")) for i in range(count))
