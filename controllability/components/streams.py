"""Several residual streams: one long state as rows of streams, and what writes into all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.interfaces import Bijection, Combinator, Component, Params, Size


@dataclass(frozen=True)
class Streams(Component, Bijection):
    """The streams one below the other: (..., n·d) -> (..., n, d).  ``Joined`` undoes it.

    >>> import numpy as np
    >>> Streams(2)({}, np.arange(4.0))
    array([[0., 1.],
           [2., 3.]])
    """

    count: int
    bounds = {"count": "≥ 1"}

    def __call__(self, params: Params, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.count, -1)

    def invert(self, params: Params, y: Array) -> Array:
        return Joined()(params, y)

    def describe(self) -> str:
        return f"{self.count} streams"

    def output_width(self, width: Size) -> Size:
        return width // self.count if isinstance(width, int) else None


@dataclass(frozen=True)
class Joined(Component):
    """The streams one after the other: (..., n, d) -> (..., n·d).

    >>> import numpy as np
    >>> Joined()({}, np.ones((3, 2))).shape
    (6,)
    """

    def __call__(self, params: Params, x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1)

    def describe(self) -> str:
        return "streams joined"

    def output_width(self, width: Size) -> Size:
        return None


@dataclass(frozen=True)
class NormalizeEach(Component):
    """Each of ``count`` streams, (..., count·d), divided by its own √(mean(x²) + ε).

    >>> import numpy as np
    >>> NormalizeEach(2, 0.0)({}, np.array([1.0, -1.0, 5.0, 5.0]))
    array([ 1., -1.,  1.,  1.])
    """

    count: int
    eps: Any = 1e-6
    computed_by: str = field(default="", compare=False)
    bounds = {"count": "≥ 1", "eps": "≥ 0"}

    def __call__(self, params: Params, x: Array) -> Array:
        rows = Streams(self.count)(params, x)
        return Joined()(params, rows * InverseRms(self.eps)(params, rows))

    def describe(self) -> str:
        return f"normalise each of {self.count} streams"

    @property
    def module(self) -> str:
        return self.computed_by

    def output_width(self, width: Size) -> Size:
        return width


@dataclass(frozen=True)
class InverseRms(Component):
    """y = 1/√(mean(x²) + ε), one number: (..., d) -> (..., 1).

    >>> import numpy as np
    >>> InverseRms(0.0)({}, np.array([2.0, 2.0]))
    array([0.5])
    """

    eps: Any = 1e-6
    bounds = {"eps": "≥ 0"}

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        given, x = x, xp.lift(x)
        y = 1 / xp.sqrt(xp.mean(x * x) + xp.number(self.eps))
        return y if x is given else xp.array(y, like=given)

    def describe(self) -> str:
        return "1/rms"

    def output_width(self, width: Size) -> Size:
        return 1


@dataclass(frozen=True)
class Remixed(Combinator):
    """Mᵀ S: stream k becomes Σ_j M_jk S_j.  ``mix`` gives M as (..., n·n), ``streams`` S as (..., n, d).

    >>> import numpy as np
    >>> from controllability.components import Select
    >>> swap, S = np.array([0.0, 1.0, 1.0, 0.0]), np.array([[1.0], [2.0]])
    >>> Remixed(Select(0), Select(1))({}, (swap, S))
    array([[2.],
           [1.]])
    """

    mix: Component
    streams: Component

    def children(self) -> tuple[Component, ...]:
        return (self.mix, self.streams)

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        streams = output(1)
        mix = output(0).reshape(*streams.shape[:-1], -1)
        return (mix[..., None] * streams[..., None, :]).sum(-3)

    def output_width(self, width: Size) -> Size:
        return self.streams.output_width(width)

    def describe(self) -> str:
        return "streams mixed"


@dataclass(frozen=True)
class Spread(Combinator):
    """S + b⊗u: what a branch gives, (..., d), is written into every stream, (..., n, d), with weights b, (..., n).

    >>> import numpy as np
    >>> from controllability.components import Select
    >>> Spread(Select(0), Select(1), Select(2))({}, (np.zeros((2, 1)), np.array([1.0, 2.0]), np.array([5.0])))
    array([[ 5.],
           [10.]])
    """

    streams: Component
    write: Component
    branch: Component

    def children(self) -> tuple[Component, ...]:
        return (self.streams, self.write, self.branch)

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        return output(0) + output(1)[..., None] * output(2)[..., None, :]

    def output_width(self, width: Size) -> Size:
        return self.branch.output_width(width)

    def describe(self) -> str:
        return f"streams + weights ⊗ ({self.branch.describe()})"
