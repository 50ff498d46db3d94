"""Random component trees: every component, shared and frozen parameters, dead branches, zero scales."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from controllability.components import (
    Activation,
    Bias,
    Identity,
    Linear,
    Normalize,
    Product,
    Scale,
    Sequence,
    SoftCap,
    Sum,
    Times,
)
from controllability.interfaces import Component, Param

D = 3
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

    def leaf(self) -> Component:
        kind = self.rng.choice(("linear", "linear", "linear", "biased", "in_out", "scale", "scale", "bias", "act", "act", "norm", "cap", "times", "identity"))  # fmt: skip
        if kind in ("linear", "in_out"):
            return Linear(self.parameter(D, D), layout="in_out" if kind == "in_out" else "out_in")
        if kind == "biased":
            return Linear(self.parameter(D, D), self.parameter(D))
        if kind == "scale":
            return Scale(self.parameter(D), offset=self.rng.choice((0, 1)))
        if kind == "bias":
            return Bias(self.parameter(D))
        if kind == "act":
            return Activation(self.rng.choice(ACTIVATIONS))
        if kind == "norm":
            return Normalize(self.rng.choice(("rms", "rms", "layer")), self.rng.choice((1e-6, 1e-2)))
        if kind == "cap":
            return SoftCap(self.rng.choice((2.0, 30.0)))
        return Times(self.rng.choice((-0.5, 2.0))) if kind == "times" else Identity()

    def tree(self, depth: int) -> Component:
        if depth <= 0 or self.rng.random() < 0.15:
            return self.leaf()
        kind = self.rng.choice(("sequence", "sequence", "sequence", "sum", "residual", "residual", "product"))
        if kind == "sequence":
            return Sequence.of(*(self.tree(depth - 1) for _ in range(self.rng.randint(2, 4))))
        if kind == "residual":
            return Sum((Identity(), self.tree(depth - 1)))
        return (Sum if kind == "sum" else Product)((self.tree(depth - 1), self.tree(depth - 1)))
