"""Linear maps, with and without a bias, in both storage orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from controllability.arrays import Array, arithmetic, dot
from controllability.components.updates import one_bias, one_matrix
from controllability.deltas import Delta, LowRank, PatchedMatrix, Shift
from controllability.interfaces import Component, Condition, Param, Params, Steerable, Update


@dataclass(frozen=True)
class Linear(Component, Steerable):
    """y = W x (+ b).  x: (..., in), y: (..., out).

    ``layout`` says how W is stored: "out_in" as in ``torch.nn.Linear``, "in_out" as in Conv1D.
    Rules I-linear, O-linear: ΔW = gap xᵀ/‖x‖², the unique solution of least Frobenius norm, for
    x ≠ 0; I-bias, O-bias: Δb = gap, always.  Source: [D] Thm 2.2; [G] Lemmas on weight and bias.

    >>> import numpy as np
    >>> params = {"W": np.eye(2)}
    >>> patch = Linear(Param("W")).steer_input(params, np.array([1.0, 1.0]), np.array([3.0, 1.0]))
    >>> (params["W"] + patch["W"].dense()) @ np.array([1.0, 1.0])
    array([3., 1.])
    """

    weight: Param
    bias: Param | None = None
    layout: Literal["out_in", "in_out"] = "out_in"

    def __call__(self, params: Params, x: Array) -> Array:
        weight = self.weight.value(params)
        base = weight.base if isinstance(weight, PatchedMatrix) else weight
        xp = arithmetic(x, base)
        y = xp.linear(x, base.swapaxes(-1, -2) if self.layout == "in_out" else base)
        if isinstance(weight, PatchedMatrix):
            y = y + weight.delta.effect(x)
        if self.bias is not None:
            bias = self.bias.value(params)
            assert not isinstance(bias, PatchedMatrix)
            y = y + bias
        return y

    def describe(self) -> str:
        return f"linear {self.weight}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def width(self) -> int | str | None:
        if len(self.weight.shape) != 2:
            return None
        return self.weight.shape[1 if self.layout == "out_in" else 0]

    def updates(self, side: str) -> tuple[Update, ...]:
        bias = f"give {self.describe()} a bias" if self.bias is None else f"let {self.bias} move"
        hint = f"{bias}: it moves the output whatever the input is"
        nonzero = Condition(f"the input of {self.weight} is not zero", self.describe(), _size, hint)
        joint = one_matrix(
            f"{side}-linear", self.weight, self.describe(), self.width, transposed=self.layout == "in_out"
        )
        ways = [Update(f"{side}-linear", self.weight, (nonzero,), self._rank_one, _low_rank_effect, joint)]
        if self.bias is not None:
            shift = one_bias(f"{side}-bias", self.bias, self.describe())
            ways.append(Update(f"{side}-bias", self.bias, (), _shift_by_gap, _shift_effect, shift))
        return tuple(ways)

    def _rank_one(self, params: Params, x: Array, delta: Array) -> Delta:
        xp = arithmetic(x)
        if xp.exact:
            right = x / dot(x, x)
        else:  # x/‖x‖² without squaring a number that is too large or too small to be squared
            size = xp.largest(x)
            unit = x / size
            right = unit / (dot(unit, unit) * size)
        return LowRank(delta[..., None, :], right[..., None, :], transposed=self.layout == "in_out")


def _size(x: Array, delta: Array) -> Array:
    xp = arithmetic(x)
    return dot(x, x) if xp.exact else xp.largest(x)


def _low_rank_effect(x: Array, delta: Delta) -> Array:
    assert isinstance(delta, LowRank)
    return delta.effect(x)


def _shift_by_gap(params: Params, x: Array, delta: Array) -> Delta:
    return Shift(delta)


def _shift_effect(x: Array, delta: Delta) -> Array:
    assert isinstance(delta, Shift)
    return delta.value
