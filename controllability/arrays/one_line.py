"""What an object that holds arrays shows of itself: one line, each array by its type and shape."""

from dataclasses import fields
from reprlib import Repr
from typing import Any


class _Short(Repr):
    def repr1(self, x: Any, level: int) -> str:
        if (dtype := getattr(x, "dtype", None)) is not None and hasattr(x, "shape"):
            return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, x.shape))}]"
        return super().repr1(x, level)


_SHORT = _Short()
_SHORT.maxother = _SHORT.maxstring = 60


class OneLine:
    """A dataclass (``repr=False``) that shows its fields in one line.

    >>> import numpy as np
    >>> from controllability.deltas import Shift
    >>> Shift(np.zeros((3, 4)))
    Shift(value=float64[3, 4])
    """

    def __repr__(self) -> str:
        found = (f"{f.name}={_SHORT.repr(getattr(self, f.name))}" for f in fields(self) if f.repr)  # type: ignore[arg-type]
        text = " ".join(f"{type(self).__name__}({', '.join(found)})".split())
        return text if len(text) <= 240 else f"{text[:238]}…)"
