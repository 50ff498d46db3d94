"""Elementwise scale: the learned part of RMSNorm and LayerNorm, and LayerScale."""

from __future__ import annotations

from dataclasses import dataclass

from controllability.arrays import Array, arithmetic
from controllability.components.updates import one_vector
from controllability.deltas import Delta, Shift
from controllability.interfaces import Bijection, Component, Condition, Param, Params, Steerable, Update

INFINITE = float("inf")


@dataclass(frozen=True)
class Scale(Component, Steerable, Bijection):
    """y = (offset + w) ∘ x.  x, w: (..., d).  The effective scale is m = offset + w (Gemma stores m − 1).

    Rules I-scale, O-scale: Δm = gap/x, 0 where gap and x are both 0; needs gap_i = 0 wherever
    x_i = 0.  Source: [G] Thm 1 and `lem:output_elem_multiply`.

    >>> import numpy as np
    >>> scale = Scale(Param("w"), offset=1)
    >>> scale.steer_output({"w": np.zeros(2)}, np.array([2.0, 4.0]), np.array([1.0, 1.0]))["w"].value
    array([0.5 , 0.25])
    """

    weight: Param
    offset: int = 0

    def effective(self, params: Params) -> Array:
        """m = offset + w, lifted to the precision in which patches are solved."""
        stored = self.weight.value(params)
        return arithmetic(stored).lift(stored) + self.offset

    def __call__(self, params: Params, x: Array) -> Array:
        return self.effective(params) * x

    def describe(self) -> str:
        return f"scale {self.weight}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.weight,)

    @property
    def width(self) -> int | str | None:
        return self.weight.shape[0] if self.weight.shape else None

    def updates(self, side: str) -> tuple[Update, ...]:
        statement = f"no input coordinate of {self.weight} is zero where its output must change"
        hint = f"a scale cannot move a zero: add a bias after {self.describe()}"
        condition = Condition(statement, self.describe(), _smallest_needed_input, hint)
        joint = one_vector(f"{side}-scale", self.weight, self.describe(), lambda x: x, self._moved, "δ_t/x_t")
        return (Update(f"{side}-scale", self.weight, (condition,), self._quotient, _effect, joint),)

    def to_scale(self, params: Params, wanted: Array) -> Shift:
        """The delta that makes the effective scale ``wanted``, as far as the stored dtype can hold it."""
        stored = self.weight.value(params)
        xp = arithmetic(stored, wanted)
        current = xp.lift(stored)
        return Shift(xp.as_stored(wanted - self.offset, like=stored) - current)

    def _moved(self, params: Params, change: Array) -> Delta:
        return self.to_scale(params, self.effective(params) + change)

    def _quotient(self, params: Params, x: Array, delta: Array) -> Delta:
        xp = arithmetic(x, delta)
        idle = xp.is_zero(x)
        change = xp.where(idle, xp.zeros_like(delta), delta / xp.where(idle, x + 1, x))
        return self.to_scale(params, self.effective(params) + change)

    def invert(self, params: Params, y: Array) -> Array:
        return y / self.effective(params)

    def image_conditions(self) -> tuple[Condition, ...]:
        hint = f"a zero entry lets nothing through: let {self.weight} move, or add a bias after it"
        return (Condition(f"no entry of the fixed scale {self.weight} is zero", self.describe(), hint=hint),)

    def image_margin(self, params: Params, y: Array) -> Array:
        m = self.effective(params)
        return arithmetic(m).smallest(m)


def _smallest_needed_input(x: Array, delta: Array) -> Array:
    xp = arithmetic(x, delta)
    # where nothing has to change a zero does no harm: such entries count as far from zero
    far = xp.zeros_like(x) + (1 if xp.exact else INFINITE)
    return xp.smallest(xp.where(xp.is_zero(delta), far, x))


def _effect(x: Array, delta: Delta) -> Array:
    assert isinstance(delta, Shift)
    return delta.value * x
