"""Random component trees: every component, shared and sliced parameters, dead branches, zero scales."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from controllability.components import (
    XIELU,
    AboveMean,
    Activation,
    Bias,
    Blend,
    Clamp,
    Collapse,
    Correction,
    ExpertLinear,
    Fixed,
    Gate,
    Glu,
    Identity,
    InverseRms,
    Joined,
    Linear,
    Mixed,
    Mixture,
    Normalize,
    NormalizeEach,
    Product,
    Remixed,
    Routing,
    Scale,
    Select,
    Sequence,
    Share,
    SoftCap,
    Spread,
    Streams,
    Sum,
    Swish,
    Taps,
    Times,
    Window,
    gated,
)
from controllability.interfaces import Component, Layout, Param

D = 3  # the width, and the number of experts: so that any tree may be a router
HALF = 2  # the experts' hidden width
DEEPEST = 6
ACTIVATIONS = ("identity", "relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu", "tanh", "sigmoid")


@dataclass
class Grower:
    """Draws trees that map (…, 3) to (…, 3); ``values`` are the parameters' numbers.

    ``leaves`` bounds the size: when they are used up only leaves grow.
    """

    rng: random.Random
    values: dict[str, np.ndarray] = field(default_factory=dict)
    sharing: float = 0.12
    leaves: int = 12
    known: list[Param] = field(default_factory=list)

    def parameter(self, *shape: int) -> Param:
        known = [param for param in self.known if param.shape == shape]
        if known and self.rng.random() < self.sharing:
            return self.rng.choice(known)
        if self.rng.random() < 0.06:
            return self.slice(*shape)
        return self.fresh(self.draw(*shape))

    def fresh(self, value: np.ndarray) -> Param:
        name = f"p{len(self.values)}"
        self.values[name] = value
        self.known.append(Param(name, value.shape))
        return self.known[-1]

    def slice(self, *shape: int) -> Param:
        """Half of a fused tensor; the other half, and one that overlaps both, may be drawn later."""
        name, rows = f"f{len(self.values)}", shape[0]
        self.values[name] = self.draw(2 * rows, *shape[1:])
        starts = (0, rows, 1) if rows > 1 else (0, rows)
        self.known += [Param(name, shape, (slice(start, start + rows),)) for start in starts]
        return self.known[-len(starts)]

    def draw(self, *shape: int) -> np.ndarray:
        value, chance = self.nonzero(*shape), self.rng.random()
        if chance < 0.05:
            value[:] = 0  # a dead branch, or a scale that lets nothing through
        elif chance < 0.1:
            value.reshape(-1)[self.rng.randrange(value.size)] = 0
        return value

    def nonzero(self, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        numbers = [self.rng.choice((-1, 1)) * self.rng.uniform(0.3, 1.5) for _ in range(count)]
        return np.array(numbers).reshape(shape)

    def maybe(self, chance: float, *shape: int) -> Param | None:
        return self.parameter(*shape) if self.rng.random() < chance else None

    def activation(self) -> Component:
        kind = self.rng.choice((*ACTIVATIONS, "swish", "xielu", "cubic"))
        if kind == "cubic":
            return Activation(kind, coefficients=(0, 1, Fraction(1, 2), Fraction(-1, 4)))
        if kind == "xielu":
            return XIELU(*(self.parameter(1) for _ in range(4)))
        return Swish(1.7) if kind == "swish" else Activation(kind)

    def leaf(self) -> Component:
        self.leaves -= 1
        kind = self.rng.choice((
            "linear", "linear", "linear", "biased", "in_out", "scale", "scale", "bias", "act", "act", "norm", "rms",
            "layer", "cap", "times", "identity", "gate", "fixed",
        ))  # fmt: skip
        if kind in ("linear", "in_out"):
            return Linear(self.parameter(D, D), layout="in_out" if kind == "in_out" else "out_in")
        if kind == "biased":
            return Linear(self.parameter(D, D), self.parameter(D))
        if kind == "scale":
            return Scale(self.parameter(D), offset=self.rng.choice((0, 1)))
        if kind == "bias":
            return Bias(self.parameter(D))
        if kind == "act":
            return self.activation()
        if kind == "norm":
            return Normalize(self.rng.choice(("rms", "rms", "layer")), self.rng.choice((1e-6, 1e-2)))
        if kind in ("rms", "layer"):
            norm = Normalize(kind, 1e-2) >> Scale(self.parameter(D), self.rng.choice((0, 1)))
            return norm >> Bias(self.parameter(D)) if self.rng.random() < 0.4 else norm
        if kind == "cap":
            return SoftCap(self.rng.choice((2.0, 30.0)))
        if kind == "gate":
            return Gate(self.parameter(1), self.rng.choice(("identity", "tanh")))
        if kind == "fixed":
            return Fixed(self.tree(1))
        return Times(self.rng.choice((-0.5, 2.0, 0.125))) if kind == "times" else Identity()

    def tree(self, depth: int) -> Component:
        if depth <= 0 or self.leaves <= 0 or self.rng.random() < 0.15:
            return self.leaf()
        kind = self.rng.choice((
            "sequence", "sequence", "sequence", "sum", "residual", "residual", "product", "mixture", "mixture",
            "beside", "glu", "narrow", "new",
        ))  # fmt: skip
        if kind == "new":
            return self.streams(depth - 1)
        if kind == "sequence":
            return Sequence.of(*(self.tree(depth - 1) for _ in range(self.rng.randint(2, 4))))
        if kind == "residual":
            return Sum((Identity(), self.tree(depth - 1)))
        if kind == "mixture":
            return self.mixture(depth - 1)
        if kind == "beside":  # shared experts, first or last
            pair = [self.mixture(depth - 1), self.tree(depth - 1)]
            self.rng.shuffle(pair)
            return Sum(tuple(pair))
        if kind == "glu":
            first, last = Linear(self.parameter(2 * HALF, D), self.maybe(0.3, 2 * HALF)), self.parameter(D, HALF)
            return first >> self.glu() >> Linear(last)
        if kind == "narrow":  # one number for all features: the gate of shared experts
            one = Linear(self.parameter(1, D), self.maybe(0.3, 1))
            gate = one >> Activation("sigmoid") if self.rng.random() < 0.7 else one
            return self.rng.choice((Product, Product, Sum))((gate, self.tree(depth - 1)))
        parts = tuple(self.tree(depth - 1) for _ in range(self.rng.choice((2, 2, 3))))
        return (Sum if kind == "sum" else Product)(parts)

    def streams(self, depth: int) -> Component:
        """Two streams that become one, an active stream that is corrected, taps behind a window, a factor without parameters."""
        self.leaves -= 3
        kind = self.rng.choice(("spread", "remixed", "normed", "corrected", "taps", "sized", "clamp", "above", "blend"))
        if kind == "blend":
            return Blend(self.tree(depth), self.tree(depth), self.fresh(self.draw(1, 1, D)))
        if kind == "corrected":
            gains = Linear(self.parameter(2, D)) >> Times(0.125) >> self.activation()
            return Correction(self.tree(depth), self.tree(depth), gains)
        if kind == "taps":  # of one position: the trees' judges take tokens by themselves
            return self.tree(depth) >> Window(1) >> Taps(self.parameter(D, 1, 1), self.rng.choice((0, 1)), 0.5)
        if kind == "sized":
            return Product((self.tree(depth), InverseRms(1e-2)))
        if kind in ("clamp", "above"):
            return self.tree(depth) >> (Clamp(-0.7, 0.7) if kind == "clamp" else AboveMean(0.2))
        wide: Component = Linear(self.parameter(2 * D, D))
        if kind == "normed":
            values = wide >> NormalizeEach(2, 1e-2) >> Scale(self.parameter(2 * D)) >> Streams(2)
            weights = Joined() >> Linear(self.parameter(2 * D, 2 * D)) >> Activation("sigmoid") >> Streams(2)
            return Collapse(values, weights)
        streams = wide >> Streams(2)
        if kind == "remixed":
            streams = Remixed(Linear(self.parameter(4, D)), streams)
        values = Spread(streams, Linear(self.parameter(2, D)), self.tree(depth))
        return Collapse(values, Joined() >> Linear(self.parameter(2, 2 * D)) >> Activation("sigmoid"), 0.125)

    def glu(self) -> Component:
        clamp = {"limit": 0.7, "shift": 1} if self.rng.random() < 0.2 else {}
        return Glu(self.activation(), self.rng.choice(("gate_up", "up_gate", "interleaved")), **clamp)

    def experts(self, out: int, into: int) -> ExpertLinear:
        if self.rng.random() < 0.3:
            return ExpertLinear(self.parameter(D, into, out), self.maybe(0.3, D, out), "in_out")
        if self.rng.random() < 0.2:
            return ExpertLinear(self.parameter(D * out, into), None, stacked=D)
        return ExpertLinear(self.parameter(D, out, into), self.maybe(0.3, D, out))

    def routing(self) -> Routing:
        k = self.rng.choice((1, 2, 2, D))
        if k == 2 and self.rng.random() < 0.1:
            return Routing(k, "sparsemixer", jitter=0.1)
        return Routing(
            k, self.rng.choice(("softmax", "sigmoid", "identity")), after=self.rng.random() < 0.3,
            correction=self.maybe(0.2, D), per_expert=self.maybe(0.15, D), scaling=self.rng.choice((1, 2.5)),
            renormalise=self.rng.choice((None, None, 1, 2)), eps=0.15, choose_logits=self.rng.random() < 0.2,
            groups=(D, 2) if k == 2 and self.rng.random() < 0.2 else None, group_best=1,
            cap=self.rng.choice((None, None, None, 2.0)), skip=k == 1 and self.rng.random() < 0.2,
        )  # fmt: skip

    def mixture(self, depth: int) -> Mixture:
        self.leaves -= 3
        routing = self.routing()
        if routing.score == "sparsemixer":  # its scores are relative to the largest logit, which must not be 0
            router: Component = Linear(self.parameter(D, D), self.fresh(self.nonzero(D)))
        elif self.rng.random() < 0.7:
            router = Linear(self.parameter(D, D), self.maybe(0.2, D))
        else:
            router = self.tree(depth)
        first, width = self.inner(depth)
        share_first = self.rng.random() < 0.2
        last: Component = self.experts(D, width)
        if self.rng.random() < 0.1:
            last = last >> self.leaf()
        return Mixture(router, routing, Share() >> first if share_first else first, last, weighted=not share_first)

    def inner(self, depth: int) -> tuple[Component, int]:
        """The experts' first maps and the width that they end in."""
        kind = self.rng.choice(("plain", "plain", "glu", "gated", "before", "between", "bare"))
        if kind == "glu":
            return self.experts(2 * HALF, D) >> self.glu(), HALF
        if kind == "gated":
            return gated(self.experts(HALF, D), self.experts(HALF, D), self.activation()), HALF
        if kind == "before":  # a norm, a latent map, a mixture of its own
            return self.tree(depth) >> self.experts(HALF, D) >> self.activation(), HALF
        if kind == "between":  # one map for all chosen experts
            return self.experts(D, D) >> self.tree(depth), D
        if kind == "bare":
            return self.tree(depth), D
        return self.experts(HALF, D) >> self.activation(), HALF

    def block(self, depth: int) -> Component:
        """A tree, or a parallel block of two inputs."""
        if self.rng.random() < 0.85:
            return self.tree(depth)
        x, a = Select(0, "x", D), self.rng.choice((Select, Select, Mixed))(1, "a", D)
        branch = Sequence.of(self.rng.choice((x, x, x, a)), self.tree(depth))
        terms = [x, a, branch] if self.rng.random() < 0.8 else [x, branch, Sequence.of(a, self.tree(depth - 1))]
        return Sum(tuple(terms))

    def frozen(self, block: Component) -> list[str]:
        """What must not move: a few parameters, half of them, or all but a few."""
        names = sorted(map(str, block.parameters()))
        chance = self.rng.random()
        if chance < 0.4:
            return [name for name in names if self.rng.random() < 0.1]
        if chance < 0.5:
            return [name for name in names if self.rng.random() < 0.5]
        free = self.rng.sample(names, min(len(names), self.rng.choice((1, 1, 2, 3))))
        return [name for name in names if name not in free]


def nodes(part: Component, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Component]]:
    """The component and everything below it, with paths; not what ``Fixed`` and ``Blend`` keep to themselves."""
    yield path, part
    for i, child in enumerate(part.children()):
        yield from nodes(child, (*path, i))


@dataclass(frozen=True)
class Case:
    """One random tree with its numbers and what is asked of it."""

    seed: int
    block: Component
    values: dict[str, np.ndarray]
    frozen: list[str]
    options: dict[str, Any]
    states: np.ndarray  # source and target, inputs, tokens, features

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.block.describe()}  frozen {self.frozen} {self.options}"

    def state(self, run: int, make: Callable[[Any], Any] = np.asarray) -> Any:
        inputs = [make(x) for x in self.states[run]]
        return tuple(inputs) if len(inputs) > 1 else inputs[0]

    def function(self, make: Callable[[Any], Any] = np.asarray) -> Callable[[Mapping[str, Any]], Any]:
        """The block as a function of its parameters, at the source state."""
        state = self.state(0, make)
        return lambda params: self.block(params, state)

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """What may move: neither frozen nor read by ``Fixed`` components and blends alone."""
        read = {p for _, c in nodes(self.block) if not isinstance(c, Fixed | Blend) for p in c.own_parameters()}
        return tuple(sorted((p for p in read if p.name not in self.frozen and str(p) not in self.frozen), key=str))

    @cached_property
    def still(self) -> dict[str, np.ndarray]:
        """The entries that are frozen."""
        return self.entries(p for p in self.block.parameters() if p.name in self.frozen or str(p) in self.frozen)

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """The entries that may move."""
        return {name: free & ~self.still[name] for name, free in self.entries(self.params).items()}

    def entries(self, params: Iterable[Param]) -> dict[str, np.ndarray]:
        masks = {name: np.zeros(value.shape, dtype=bool) for name, value in self.values.items()}
        for param in params:
            masks[param.name][(*param.index, ...)] = True
        return masks


def grown(seed: int) -> Case:
    rng = random.Random(seed)
    grower = Grower(rng)
    block = grower.block(rng.randint(1, DEEPEST))
    options = {
        "via": rng.choice(("input-output", "output")),
        "route": rng.choice(("auto", "auto", "scale", "secular", "uniform", "ball")),
    }
    states = np.random.default_rng(seed).normal(size=(2, len(Layout.of(block).inputs), 2, D))
    if rng.random() < 0.05:
        states[0, 0, 0] = 0
    return Case(seed, block, grower.values, grower.frozen(block), options, states)
