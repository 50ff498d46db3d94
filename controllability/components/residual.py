"""How components are put together: one after the other, added, multiplied, beside a skip."""

from dataclasses import dataclass

from controllability.arrays import Array
from controllability.interfaces import Bijection, Component, Params, Product, Sum


@dataclass(frozen=True)
class Identity(Component, Bijection):
    """y = x: the plain skip of a residual block."""

    is_skip = True

    def __call__(self, params: Params, x: Array) -> Array:
        return x

    def describe(self) -> str:
        return "identity"

    def invert(self, params: Params, y: Array) -> Array:
        return y


def residual(branch: Component, skip: Component | None = None) -> Sum:
    """skip(x) + branch(x); the skip is the identity unless given."""
    return Sum((skip or Identity(), branch))


def gated(gate: Component, up: Component, activation: Component) -> Product:
    """activation(gate(x)) ∘ up(x): the first half of a gated feed-forward network."""
    return Product((gate >> activation, up))
