"""A bias on its own: the last part of a LayerNorm."""

from dataclasses import dataclass

from controllability.arrays import Array
from controllability.components.updates import offset
from controllability.interfaces import Bijection, Component, Param, Params, Steerable, Update


@dataclass(frozen=True)
class Bias(Component, Steerable, Bijection):
    """y = x + b.  x, b: (..., d).

    It moves by an offset (rules I-bias, O-bias).

    >>> import numpy as np
    >>> Bias(Param("b")).steer_output({"b": np.zeros(2)}, np.zeros(2), np.array([1.0, 2.0]))["b"].value
    array([1., 2.])
    """

    bias: Param
    takes_patched = True

    def __call__(self, params: Params, x: Array) -> Array:
        return x + self.bias.value(params)

    def describe(self) -> str:
        return f"bias {self.bias}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.bias,)

    @property
    def width(self) -> int | str | None:
        return self.bias.shape[0] if self.bias.shape else None

    def updates(self) -> tuple[Update, ...]:
        return (offset(self, self.bias),)

    def invert(self, params: Params, y: Array) -> Array:
        return y - self.bias.value(params)
