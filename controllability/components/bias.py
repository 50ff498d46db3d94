"""A bias on its own: the last part of a LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

from controllability.arrays import Array
from controllability.components.updates import one_bias
from controllability.deltas import Delta, Shift
from controllability.interfaces import Bijection, Component, Param, Params, Steerable, Update


@dataclass(frozen=True)
class Bias(Component, Steerable, Bijection):
    """y = x + b.  x, b: (..., d).

    Rules I-bias, O-bias: Δb = gap, with no condition.  Source: [G] `lem:output_bias`.

    >>> import numpy as np
    >>> Bias(Param("b")).steer_output({"b": np.zeros(2)}, np.zeros(2), np.array([1.0, 2.0]))["b"].value
    array([1., 2.])
    """

    bias: Param

    def __call__(self, params: Params, x: Array) -> Array:
        return x + self.bias.value(params)

    def describe(self) -> str:
        return f"bias {self.bias}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.bias,)

    @property
    def width(self) -> int | str | None:
        return self.bias.shape[0] if self.bias.shape else None

    def updates(self, side: str) -> tuple[Update, ...]:
        shift = one_bias(f"{side}-bias", self.bias, self.describe())
        return (Update(f"{side}-bias", self.bias, (), _gap, _effect, shift),)

    def invert(self, params: Params, y: Array) -> Array:
        return y - self.bias.value(params)


def _gap(params: Params, x: Array, delta: Array) -> Delta:
    return Shift(delta)


def _effect(x: Array, delta: Delta) -> Array:
    assert isinstance(delta, Shift)
    return delta.value
