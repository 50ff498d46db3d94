"""A component whose parameters are read and never moved."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.components.activation import Activation
from controllability.interfaces import Bijection, Component, Condition, Param, Params, Size, leaves


@dataclass(frozen=True)
class Fixed(Component):
    """``inner`` as it is: for gains, gates and buffers that no module of their own computes with.

    It has no update, but its parameters count as read: a patch of one of them is noticed.

    >>> import numpy as np
    >>> from controllability.components.scale import Scale
    >>> Fixed(Scale(Param("gain")))({"gain": np.array([2.0])}, np.ones(1))
    array([2.])
    """

    inner: Component
    has_module = False

    def __call__(self, params: Params, x: Array) -> Array:
        return self.inner(params, x)

    def describe(self) -> str:
        return f"fixed {self.inner.describe()}"

    def own_parameters(self) -> tuple[Param, ...]:
        return tuple(sorted(self.inner.parameters(), key=str))

    def map_held(self, change: Callable[[Any], Any]) -> "Fixed":
        return replace(self, inner=change(self.inner))

    def inputs_read(self) -> dict[int, Size]:
        return {index: size for _, leaf in leaves(self.inner) for index, size in leaf.inputs_read().items()}

    @property
    def width(self) -> int | str | None:
        return self.inner.width

    def output_width(self, width: Size) -> Size:
        return self.inner.output_width(width)


@dataclass(frozen=True)
class Blend(Component):
    """μ∘f(x) + (1 − μ)∘g(x) with a stored μ (1, 1, d), nothing of which moves: RWKV's mix of a position with the one before.

    >>> import numpy as np
    >>> from controllability.components.select import Select
    >>> Blend(Select(0), Select(1), Param("mu"))({"mu": np.full((1, 1, 2), 0.25)}, (np.zeros(2), np.ones(2)))
    array([0.75, 0.75])
    """

    first: Component
    second: Component
    weight: Param
    has_module = False

    def __call__(self, params: Params, x: Array) -> Array:
        stored = self.weight.value(params)
        mu = arithmetic(stored).lift(stored)[0, 0]
        return mu * self.first(params, x) + (1 - mu) * self.second(params, x)

    def describe(self) -> str:
        return f"blend of ({self.first.describe()}) and ({self.second.describe()}) by {self.weight}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.weight, *sorted(self.first.parameters() | self.second.parameters(), key=str))

    def inputs_read(self) -> dict[int, Size]:
        parts = (*leaves(self.first), *leaves(self.second))
        return {index: size for _, leaf in parts for index, size in leaf.inputs_read().items()}

    def map_held(self, change: Callable[[Any], Any]) -> "Blend":
        return replace(self, first=change(self.first), second=change(self.second))

    def output_width(self, width: Size) -> Size:
        return self.first.output_width(width)


@dataclass(frozen=True)
class Gate(Component, Bijection):
    """y = φ(g)·x with a learned number g of shape (1,) or (): tanh gates of cross-attention layers.

    >>> import numpy as np
    >>> Gate(Param("g"), "identity")({"g": np.array([3.0])}, np.ones(2))
    array([3., 3.])
    """

    weight: Param
    activation: str = "identity"
    has_module = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Activation(self.activation)

    def __call__(self, params: Params, x: Array) -> Array:
        return self._factor(params) * x

    def _factor(self, params: Params) -> Array:
        return Activation(self.activation)(params, self.weight.value(params).reshape(-1)[:1])

    def invert(self, params: Params, y: Array) -> Array:
        return y / self._factor(params)

    def image_conditions(self) -> tuple[Condition, ...]:
        hint = f"a closed gate lets nothing through: open {self.weight}, or steer after it (a bias)"
        return (Condition(f"the gate {self.weight} is not closed", self.describe(), hint=hint),)

    def image_margin(self, params: Params, y: Array) -> Array:
        factor = self._factor(params)
        return arithmetic(factor).smallest(factor)

    def describe(self) -> str:
        return f"gate {self.activation} {self.weight}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.weight,)
