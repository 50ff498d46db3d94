"""Random component trees: every component, shared and frozen parameters, dead branches, zero scales."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from controllability.components import (
    XIELU,
    Activation,
    Bias,
    ExpertLinear,
    Fixed,
    Gate,
    Glu,
    Identity,
    Linear,
    Mixture,
    Normalize,
    Product,
    Routing,
    Scale,
    Select,
    Sequence,
    Share,
    SoftCap,
    Sum,
    Swish,
    Times,
    gated,
)
from controllability.interfaces import Component, Param

D = 3  # the width, and the number of experts: so that any tree may be a router
HALF = 2  # the experts' hidden width
ACTIVATIONS = ("identity", "relu", "relu2", "silu", "gelu", "gelu_tanh", "tanh")


@dataclass
class Grower:
    """Draws trees that map (…, 3) to (…, 3); ``values`` are the parameters' numbers."""

    rng: random.Random
    values: dict[str, np.ndarray] = field(default_factory=dict)
    sharing: float = 0.12

    def parameter(self, *shape: int) -> Param:
        known = [name for name, value in self.values.items() if value.shape == shape]
        if known and self.rng.random() < self.sharing:
            return Param(self.rng.choice(known), shape)
        name = f"p{len(self.values)}"
        value = np.array([self.rng.choice((-1, 1)) * self.rng.uniform(0.3, 1.5) for _ in range(int(np.prod(shape)))])
        draw = self.rng.random()
        if draw < 0.05:
            value[:] = 0  # a dead branch, or a scale that lets nothing through
        elif draw < 0.1:
            value[self.rng.randrange(len(value))] = 0
        self.values[name] = value.reshape(shape)
        return Param(name, shape)

    def maybe(self, chance: float, *shape: int) -> Param | None:
        return self.parameter(*shape) if self.rng.random() < chance else None

    def activation(self) -> Component:
        kind = self.rng.choice((*ACTIVATIONS, "swish", "xielu"))
        if kind == "xielu":
            return XIELU(*(self.parameter(1) for _ in range(4)))
        return Swish(1.7) if kind == "swish" else Activation(kind)

    def leaf(self) -> Component:
        kind = self.rng.choice((
            "linear", "linear", "linear", "biased", "in_out", "scale", "scale", "bias", "act", "act", "norm", "cap",
            "times", "identity", "gate", "fixed",
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
        if kind == "cap":
            return SoftCap(self.rng.choice((2.0, 30.0)))
        if kind == "gate":
            return Gate(self.parameter(1), self.rng.choice(("identity", "tanh")))
        if kind == "fixed":
            return Fixed(self.tree(1))
        return Times(self.rng.choice((-0.5, 2.0))) if kind == "times" else Identity()

    def tree(self, depth: int) -> Component:
        if depth <= 0 or self.rng.random() < 0.15:
            return self.leaf()
        kind = self.rng.choice((
            "sequence", "sequence", "sequence", "sum", "residual", "residual", "product", "mixture", "mixture",
            "beside", "glu", "narrow",
        ))  # fmt: skip
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
        return (Sum if kind == "sum" else Product)((self.tree(depth - 1), self.tree(depth - 1)))

    def glu(self) -> Component:
        clamp = {"limit": 0.7, "shift": 1} if self.rng.random() < 0.2 else {}
        return Glu(self.activation(), self.rng.choice(("gate_up", "up_gate", "interleaved")), **clamp)

    def experts(self, out: int, into: int) -> ExpertLinear:
        if self.rng.random() < 0.3:
            return ExpertLinear(self.parameter(D, into, out), self.maybe(0.3, D, out), "in_out")
        if self.rng.random() < 0.2:
            return ExpertLinear(self.parameter(D * out, into), None, stacked=D)
        return ExpertLinear(self.parameter(D, out, into), self.maybe(0.3, D, out))

    def mixture(self, depth: int) -> Mixture:
        k = self.rng.choice((1, 2, 2, D))
        routing = Routing(
            k, self.rng.choice(("softmax", "sigmoid", "identity")), after=self.rng.random() < 0.3,
            correction=self.maybe(0.2, D), per_expert=self.maybe(0.15, D), scaling=self.rng.choice((1, 2.5)),
            renormalise=self.rng.choice((None, None, 1, 2)), eps=0.15,
        )  # fmt: skip
        router = Linear(self.parameter(D, D), self.maybe(0.2, D)) if self.rng.random() < 0.7 else self.tree(depth)
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
        x, a = Select(0, "x", D), Select(1, "a", D)
        branch = Sequence.of(self.rng.choice((x, x, x, a)), self.tree(depth))
        terms = [x, a, branch] if self.rng.random() < 0.8 else [x, branch, Sequence.of(a, self.tree(depth - 1))]
        return Sum(tuple(terms))
