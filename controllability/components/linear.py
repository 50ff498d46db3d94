"""Linear maps, with and without a bias, in both storage orders."""

from dataclasses import dataclass, replace
from typing import Literal

from controllability.arrays import Array, arithmetic
from controllability.components.updates import offset, rank_one
from controllability.deltas import PatchedMatrix
from controllability.interfaces import Component, Param, Params, Size, Steerable, Update


@dataclass(frozen=True)
class Linear(Component, Steerable):
    """y = W x (+ b).  x: (..., in), y: (..., out).

    ``layout`` says how W is stored: "out_in" as in ``torch.nn.Linear``, "in_out" as in Conv1D.
    Its weight moves by a rank-one change, its bias by an offset (rules I-linear, O-linear, I-bias, O-bias).

    >>> import numpy as np
    >>> params = {"W": np.eye(2)}
    >>> patch = Linear(Param("W")).steer_input(params, np.array([1.0, 1.0]), np.array([3.0, 1.0]))
    >>> (params["W"] + patch["W"].dense()) @ np.array([1.0, 1.0])
    array([3., 1.])
    """

    weight: Param
    bias: Param | None = None
    layout: Literal["out_in", "in_out"] = "out_in"
    takes_patched = True

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

    def output_width(self, width: Size) -> Size:
        return self.weight.shape[-2 if self.layout == "out_in" else -1] if self.weight.shape else None

    def with_bias(self, bias: Param) -> "Linear | None":
        return replace(self, bias=bias) if self.bias is None else None

    def updates(self) -> tuple[Update, ...]:
        bias = f"give {self.describe()} a bias" if self.bias is None else f"let {self.bias} move"
        hint = f"{bias}: it moves the output whatever the input is"
        way = rank_one(self, self.weight, hint, transposed=self.layout == "in_out")
        return (way,) if self.bias is None else (way, offset(self, self.bias))
