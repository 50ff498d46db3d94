"""Arrays of any kind as NumPy arrays, and what is measured of them."""

from typing import Any

import numpy as np

from controllability.arrays import Array
from controllability.deltas import Delta, LowRank


def largest(x: Array) -> Any:
    """max |x_i|, 0 for nothing."""
    return abs(x).max() if x.size else 0


def floats(x: Array) -> Array:
    """Any array as NumPy float64."""
    if hasattr(x, "detach"):
        return x.detach().cpu().double().numpy()
    return np.array([float(v) for v in x.reshape(-1)]).reshape(x.shape) if x.dtype == object else x.astype(np.float64)


def numbers(x: Array) -> Array:
    """Any array as NumPy float64, but exact and many-digit numbers as they are."""
    return x if isinstance(x, np.ndarray) and x.dtype.kind == "O" else floats(x)


def is_zero(delta: Delta) -> bool:
    """Whether a delta changes nothing."""
    parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta.value,)
    return any(not floats(part).any() for part in parts)


def per_token(x: Array, tokens: tuple[int, ...]) -> Array:
    """max |x| of every token, NumPy float64."""
    return abs(floats(x)).reshape(*tokens, -1).max(-1)
