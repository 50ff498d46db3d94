"""Parts for joint checks: functions, norms and routings of which nothing is known but their outputs."""

import math
from dataclasses import dataclass, replace

from controllability.arrays import ARITHMETICS, Array
from controllability.arrays.lazy import np, sympy
from controllability.checks.rebuilt_blocks import MANY
from controllability.deltas import Shift
from controllability.interfaces import Component, Condition, JointSolution, JointUpdate, Param, Params, Place, Update
from controllability.rules import Side, Step
from controllability.rules.schema import Assumption, UnknownRouting

SYMPY = ARITHMETICS["sympy"]
EXPERTS, D, H, ONE = 3, 2, 2, 1  # experts, width, hidden width; that of experts in a mixture
SERVED = ((0, 1), (1, 2))  # the two tokens' experts: one serves both, two serve one of them
SAME, ROUND = ((0, 1), (0, 1)), ((0, 1), (1, 2), (0, 2))  # experts of tokens whose stacked vectors depend on each other


@dataclass(frozen=True)
class UndefinedPart(Component):
    """y_t = F(x_t) + b_t with F undefined; b_t is each token's own: a premise says that any outputs can be reached."""

    name: str
    out: int
    rows: tuple[int, ...] = ()
    controlled: bool = False

    def own_parameters(self) -> tuple[Param, ...]:
        return (Param(f"parameters of {self.name}", (MANY, *self.rows, self.out)),) if self.controlled else ()

    def __call__(self, params: Params, x: Array) -> Array:
        value = np.empty((MANY, *self.rows, self.out), dtype=object)
        for place in np.ndindex(*value.shape):
            name = "_".join(map(str, (self.name, *place[1:])))
            value[place] = sympy.Function(name, real=True)(*x[place[0]].reshape(-1))
        value = SYMPY.name(value)
        return value + self.own_parameters()[0].value(params) if self.controlled else value

    def describe(self) -> str:
        return self.name

    @property
    def width(self) -> int:
        return D

    def premise(self, place: Place, side: Side) -> Step:
        """The premise: a patch with which this function gives these tokens whatever is wanted."""
        (param,) = self.own_parameters()
        solve = lambda p, x, delta: Shift(delta)  # noqa: E731
        all_ = lambda joint, p, x, delta, *_: JointSolution(Shift(delta), SYMPY.zeros_like(delta[..., :1]) + 1)  # noqa: E731
        jointly = JointUpdate((Condition("assumed", self.name),), all_, "any")
        update = Update("assumed", param, (), solve, lambda p, x, change: change.dense(), jointly)
        return Step(Assumption(side), place, (), frozenset({param}), update=update)


@dataclass(frozen=True)
class Read(UndefinedPart):
    """A function whose values are written in the token's own state, from ``start`` on: any values, which may depend on each other."""

    start: int = 0
    tokens: int = MANY

    def own_parameters(self) -> tuple[Param, ...]:
        return tuple(replace(p, shape=(self.tokens, *p.shape[1:])) for p in super().own_parameters())

    def __call__(self, params: Params, x: Array) -> Array:
        stop = self.start + math.prod((*self.rows, self.out))
        value = x.reshape(self.tokens, -1)[:, self.start : stop].reshape(self.tokens, *self.rows, self.out)
        return value + self.own_parameters()[0].value(params) if self.controlled else value

    @property
    def width(self) -> int:
        return EXPERTS + len(SERVED[0]) * ONE  # the logits, and what the chosen experts' inner functions give


@dataclass(frozen=True)
class AnyNorm(Component):
    """Each entry an undefined function of all entries of the same vector, its own the first (they are told apart by it)."""

    name: str

    def __call__(self, params: Params, x: Array) -> Array:
        value = np.empty(x.shape, dtype=object)
        for *row, i in np.ndindex(*x.shape):
            seen = x[tuple(row)]
            value[(*row, i)] = sympy.Function(f"{self.name}_{i}", real=True)(*seen[i:], *seen[:i])
        return SYMPY.name(value)

    def describe(self) -> str:
        return self.name


@dataclass(frozen=True)
class GivenRouting(UnknownRouting):
    """Shares as undefined functions of the logits and of what the routing reads; ``choice`` says which experts a token has."""

    top_k: int = 2
    choice: tuple[tuple[int, ...], ...] = SERVED

    def __call__(self, params: Params, logits: Array) -> tuple[Array, Array]:
        shares = np.empty((len(self.choice), self.top_k), dtype=object)
        beside = [entry for p in self.read for entry in np.asarray(p.value(params)).reshape(-1)]
        for t, j in np.ndindex(*shares.shape):
            shares[t, j] = sympy.Function(f"share{self.name}_{j}", real=True)(*logits[t], *beside)
        return np.array(self.choice), SYMPY.name(shares)

    def margin(self, params: Params, logits: Array) -> Array:
        return SYMPY.zeros_like(logits[..., :1]) + 1
