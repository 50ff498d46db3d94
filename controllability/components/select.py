"""One of several inputs of a block: a parallel block reads the layer's input and what attention adds."""

from dataclasses import dataclass
from typing import Any

from controllability.arrays import Array
from controllability.interfaces import Component, Params, Size


@dataclass(frozen=True)
class Select(Component):
    """y = x_index of a tuple of inputs (x_0, x_1, …), each (..., d).

    >>> import numpy as np
    >>> Select(1, "attention")({}, (np.zeros(2), np.ones(2)))
    array([1., 1.])
    """

    index: int
    name: str = ""
    size: int | str | None = "d"
    bounds = {"index": "≥ 0"}

    def __call__(self, params: Params, x: Any) -> Array:
        return x[self.index]

    def describe(self) -> str:
        return f"input {self.name or self.index}"

    @property
    def reads_input(self) -> int:
        return self.index

    @property
    def input_name(self) -> str:
        return self.name

    def output_width(self, width: Size) -> Size:
        return self.size

    @property
    def width(self) -> int | str | None:
        return self.size


@dataclass(frozen=True)
class Mixed(Select):
    """x_index, made by whatever mixes positions: attention, a scan, a shift, a convolution.  (theory 8)

    Theorem 1b asks nothing of it: the run shows its value, and only what stands behind it moves.

    >>> import numpy as np
    >>> Mixed(1, "attention").describe()
    'attention (reads other positions)'
    """

    mixes = True

    def describe(self) -> str:
        return f"{self.name or f'input {self.index}'} (reads other positions)"
