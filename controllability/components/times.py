"""A constant factor: residual multipliers and gains."""

from dataclasses import dataclass
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.interfaces import Bijection, Component, Params


@dataclass(frozen=True)
class Times(Component, Bijection):
    """y = c·x with a constant c that is not a parameter.  x: (..., d).

    >>> import numpy as np
    >>> Times(0.5)({}, np.array([4.0]))
    array([2.])
    """

    factor: Any
    bounds = {"factor": "≠ 0"}

    def __call__(self, params: Params, x: Array) -> Array:
        return x * arithmetic(x).number(self.factor)

    def describe(self) -> str:
        return f"times {self.factor}"

    def invert(self, params: Params, y: Array) -> Array:
        return y / arithmetic(y).number(self.factor)
