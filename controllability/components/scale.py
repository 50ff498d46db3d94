"""Elementwise scale: the learned part of RMSNorm and LayerNorm, and LayerScale."""

from dataclasses import dataclass

from controllability.arrays import Array, arithmetic
from controllability.components.updates import elementwise
from controllability.deltas import Shift
from controllability.interfaces import Bijection, Component, Condition, Param, Params, Steerable, Update


@dataclass(frozen=True)
class Scale(Component, Steerable, Bijection):
    """y = (offset + w) ∘ x.  x, w: (..., d).  The effective scale is m = offset + w (Gemma stores m − 1).

    Its weight moves entry by entry (rules I-scale, O-scale).

    >>> import numpy as np
    >>> scale = Scale(Param("w"), offset=1)
    >>> scale.steer_output({"w": np.zeros(2)}, np.array([2.0, 4.0]), np.array([1.0, 1.0]))["w"].value
    array([0.5 , 0.25])
    """

    weight: Param
    offset: int = 0
    scales = takes_patched = True

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

    def updates(self) -> tuple[Update, ...]:
        return (elementwise(self, self.weight, self.moved),)

    def to_scale(self, params: Params, wanted: Array, side: int = 0) -> Shift:
        """The delta that makes the effective scale ``wanted``, or what the stored dtype can hold next to it, on either ``side``."""
        stored = self.weight.value(params)
        xp = arithmetic(stored, wanted)
        return Shift(xp.as_stored(wanted - self.offset, stored, side) - xp.lift(stored))

    def moved(self, params: Params, change: Array) -> Shift:
        """The delta that changes the effective scale by ``change``, as far as the stored dtype can hold it."""
        return self.to_scale(params, self.effective(params) + change)

    def invert(self, params: Params, y: Array) -> Array:
        return y / self.effective(params)

    def image_conditions(self) -> tuple[Condition, ...]:
        hint = f"a zero entry lets nothing through: let {self.weight} move, or add a bias after it"
        return (Condition(f"no entry of the fixed scale {self.weight} is zero", self.describe(), hint=hint),)

    def image_margin(self, params: Params, y: Array) -> Array:
        m = self.effective(params)
        return arithmetic(m).smallest(m)
