"""Values put together by weights that are computed from these very values: how several streams become one."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from controllability.arrays import Array, arithmetic
from controllability.components.streams import Spread
from controllability.interfaces import Combinator, Component, Params, Path, Size


class SelfWeighted(Combinator):
    """A value whose weights read what they weigh; once they are fixed, it is affine in what its *carrier* gives.

    The weights are the last part.
    """

    nonzero: ClassVar[str]  # the condition under which the carrier reaches everything

    @property
    @abstractmethod
    def carrier(self) -> Path:
        """Where the part stands that is asked for an output: a path below this component."""

    @property
    @abstractmethod
    def shapes(self) -> "dict[Path, tuple[tuple[str, ...], str]]":
        """What the parts below give, (rows, features): of the carrier, the weights, and all that stands beside them."""

    @abstractmethod
    def weighed(self, weights: Array, value: Callable[[Path], Array]) -> Array:
        """What weighs the carrier's output with these weights: no entry may be 0.

        ``value(path)`` is the output of a part below; of the carrier what it gives as it is.
        """

    @abstractmethod
    def asked(self, wanted: Array, weights: Array, value: Callable[[Path], Array]) -> Array:
        """What the carrier must give for ``wanted`` to come out with these weights."""


@dataclass(frozen=True)
class Collapse(SelfWeighted):
    """Σ_n (w_n + ``least``)∘V_n with w = ``weights(V)``.  V: (..., n, d); w: (..., n), or (..., n, d) with a weight for each feature.

    >>> import numpy as np
    >>> from controllability.components import Activation, Identity
    >>> relu = Activation("relu")
    >>> Collapse(Identity(), relu)({}, np.array([[1.0, -2.0], [3.0, 4.0]]))
    array([10., 16.])
    """

    values: Component
    weights: Component
    least: Any = 0
    nonzero = "the weights of what is written do not cancel"

    def children(self) -> tuple[Component, ...]:
        return (self.values, self.weights)

    def source_of(self, index: int) -> int | None:
        return 0 if index else None

    def describe(self) -> str:
        return f"weighted sum of {self.values.describe()}"

    def output_width(self, width: Size) -> Size:
        return self.values.output_width(width)

    def _full(self, weights: Array, values: Array) -> Array:
        weights = weights if weights.ndim == values.ndim else weights[..., None]
        return weights + arithmetic(weights).number(self.least)

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return (self._full(output(1), output(0)) * output(0)).sum(-2)

    @property
    def carrier(self) -> Path:
        return (0, 2) if isinstance(self.values, Spread) else (0,)

    @property
    def shapes(self) -> dict[Path, tuple[tuple[str, ...], str]]:
        if self.carrier == (0,):
            return {(0,): (("n",), "d"), (1,): (("n",), "d")}
        return {(0, 0): (("n",), "d"), (0, 1): ((), "n"), (0, 2): ((), "d"), (1,): ((), "n")}

    def weighed(self, weights: Array, value: Callable[[Path], Array]) -> Array:
        """With V = S + b⊗u: Σ w_n b_n; else Σ (w_n V_n)²."""
        xp = arithmetic(weights)
        if self.carrier == (0, 2):
            write = xp.lift(value((0, 1)))[..., None]
            return (self._full(weights, write) * write).sum(-2)
        part = self._full(weights, value((0,))) * xp.lift(value((0,)))
        return (part * part).sum(-2)

    def asked(self, wanted: Array, weights: Array, value: Callable[[Path], Array]) -> Array:
        """With V = S + b⊗u: u = (wanted − Σ w_n S_n)/Σ w_n b_n; else the V that is nearest in relative terms."""
        xp, room = arithmetic(wanted, weights), self.weighed(weights, value)
        held = xp.lift(value((0, 0) if self.carrier == (0, 2) else (0,)))
        part = self._full(weights, held) * held
        missing = xp.tidy(wanted - part.sum(-2)) / room
        return missing if self.carrier == (0, 2) else held + held * part * missing[..., None, :]


@dataclass(frozen=True)
class Correction(SelfWeighted):
    """p + (1 + g_0)(a − p) with g = ``gains(a)``: AltUp's active stream.  ``activated`` a and ``prediction`` p: (..., d).

    >>> import numpy as np
    >>> from controllability.components import Select, Times
    >>> Correction(Select(0), Select(1), Times(1))({}, (np.array([1.0]), np.array([3.0])))
    array([9.])
    """

    prediction: Component
    activated: Component
    gains: Component
    carrier: ClassVar[Path] = (1,)  # type: ignore[misc]
    nonzero = "the gain of the correction is not 0"

    def children(self) -> tuple[Component, ...]:
        return (self.prediction, self.activated, self.gains)

    def source_of(self, index: int) -> int | None:
        return 1 if index == 2 else None

    def describe(self) -> str:
        return f"{self.prediction.describe()} corrected by {self.activated.describe()}"

    def output_width(self, width: Size) -> Size:
        return self.activated.output_width(width)

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return output(0) + (1 + output(2)[..., :1]) * (output(1) - output(0))

    @property
    def shapes(self) -> dict[Path, tuple[tuple[str, ...], str]]:
        return {(0,): ((), "d"), (1,): ((), "d"), (2,): ((), "n")}

    def weighed(self, weights: Array, value: Callable[[Path], Array]) -> Array:
        """1 + g_0."""
        return 1 + weights[..., :1]

    def asked(self, wanted: Array, weights: Array, value: Callable[[Path], Array]) -> Array:
        """a = p + (wanted − p)/(1 + g_0)."""
        prediction = value((0,))
        return prediction + (wanted - prediction) / self.weighed(weights, value)
