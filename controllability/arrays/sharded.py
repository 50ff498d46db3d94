"""Tensors whose features are split over devices (``DTensor``): what no longer is split is a plain tensor again.

So an all-reduce is sent where a sum over split features is taken, one number a token, and nowhere else.
"""

from collections.abc import Callable
from typing import Any

from controllability.arrays.base import Array
from controllability.arrays.tensors import TorchArithmetic


def plain(value: Any) -> Any:
    """The whole tensor, where every device holds it or a summand of it; a slice stays a slice."""
    placements = getattr(value, "placements", None)
    if placements is None or any(p.is_shard() for p in placements):
        return value
    return value.full_tensor()


def gathered(value: Any) -> Any:
    """The whole tensor on every device, a slice too; what is no ``DTensor`` as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _plainly(name: str) -> "Callable[..., Array]":
    return lambda self, *args, **kwargs: plain(getattr(TorchArithmetic, name)(self, *args, **kwargs))


class ShardedArithmetic(TorchArithmetic):
    """``DTensor``s beside plain tensors, which every device holds whole."""

    sum, max, min, mean, largest = (_plainly(name) for name in ("sum", "max", "min", "mean", "largest"))
    linear, matmul = _plainly("linear"), _plainly("matmul")

    def numbers(self, x: Array) -> Any:
        return super().numbers(gathered(x))

    def any(self, x: Array) -> bool:
        return bool(gathered(x.any()))

    def all(self, x: Array) -> bool:
        return bool(gathered(x.all()))

    def to_float(self, x: Array) -> Any:
        return float(gathered(x))


def here(value: Any) -> Any:
    """The slice that this device holds, as a plain tensor that shares its memory; what is no ``DTensor`` as it is."""
    return getattr(value, "_local_tensor", value)
