"""The dozen operations in which NumPy, torch, SymPy, exact rationals and mpmath differ.

Everything else in the package is written once with ``+ - * / @`` on arrays whose last axis holds
the features and whose leading axes, if any, run over tokens.  SymPy expressions, fractions and
50-digit numbers live in NumPy object arrays, so the same code runs on them.
"""

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from controllability.arrays.base import Arithmetic as Arithmetic, Array as Array
from controllability.arrays.lazy import np
from controllability.arrays.objects import MpmathArithmetic, RationalArithmetic
from controllability.arrays.sharded import ShardedArithmetic
from controllability.arrays.tensors import TorchArithmetic
from controllability.errors import BadInput

Test = Callable[[Any], bool]

FLOAT_CONSTANT = "a constant that is written as a float (0.1) makes exact numbers inexact; in a component write arithmetic(x).number(Fraction(1, 10))"
ARITHMETICS: dict[str, Arithmetic] = {}
_ARRAYS: list[tuple[Test, Arithmetic]] = []  # whose arrays are told by the array
_ELEMENTS: list[tuple[Test, Arithmetic]] = []  # told by what they hold; a later one absorbs those before it


def register(kind: Arithmetic, array: Test | None = None, element: Test | None = None) -> None:
    """Make an arithmetic known: its own arrays pass ``array``, or NumPy object arrays hold what passes ``element``."""
    ARITHMETICS[kind.kind] = kind
    if array is not None:
        _ARRAYS.append((array, kind))
    if element is not None:
        _ELEMENTS.append((element, kind))


def arithmetic(*arrays: Array) -> Arithmetic:
    """The arithmetic in which ``arrays`` live.  No library is imported that is not loaded already.

    Raises ``BadInput`` for anything that is not an array of a known kind.

    >>> import numpy as np
    >>> arithmetic(np.zeros(3)).kind
    'numpy'
    >>> from fractions import Fraction
    >>> arithmetic(np.array([Fraction(1, 2)], dtype=object)).kind
    'rational'
    """
    found: Arithmetic | None = None
    for test, kind in _ARRAYS:
        if any(test(x) for x in arrays):
            return kind
    for x in arrays:
        kind = _numpy_kind(x)
        # symbols absorb fractions, everything absorbs plain floats
        if found is None or found is _NUMPY or (found is _RATIONAL and kind.symbolic):
            found = kind
    if found is None:
        raise BadInput("no array given: expected NumPy arrays (float or object) or torch tensors")
    return found


def _numpy_kind(x: Array) -> Arithmetic:
    if not isinstance(x, np.ndarray):
        raise BadInput(f"expected a NumPy array or a torch tensor, got {type(x).__name__}")
    if x.dtype.kind == "f":
        return _NUMPY
    if x.dtype != object or x.size == 0:
        raise BadInput(f"expected floating point numbers or objects, got an array of {x.dtype} with shape {x.shape}")
    kinds = {_element_kind(v) for v in x.reshape(-1)}
    return next(kind for _, kind in reversed(_ELEMENTS) if kind in kinds)


def _element_kind(value: Any) -> Arithmetic:
    for test, kind in _ELEMENTS:
        if test(value):
            return kind
    kind = type(value).__name__
    hint = FLOAT_CONSTANT if isinstance(value, float) else "use floats, Fraction, SymPy or mpmath"
    raise BadInput(f"cannot compute with elements of type {kind}: {hint}")


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _is_sharded(x: Any) -> bool:
    return hasattr(x, "placements") and _is_tensor(x)


def _is_mpmath(value: Any) -> bool:
    mpmath = sys.modules.get("mpmath")
    return mpmath is not None and isinstance(value, mpmath.mpf)


_NUMPY, _RATIONAL = Arithmetic(), RationalArithmetic()
register(_NUMPY)
register(_RATIONAL, element=lambda value: isinstance(value, Fraction | int))
register(MpmathArithmetic(), element=_is_mpmath)
register(ShardedArithmetic(), array=_is_sharded)
register(TorchArithmetic(), array=_is_tensor)


def tidy(x: Array) -> Array:
    """The value in a normal form, where its arithmetic has one."""
    xp = arithmetic(x)
    return xp.tidy(x) if xp.symbolic or xp.exact else x


def dot(a: Array, b: Array) -> Array:
    """Inner product over the features, keeping the axis: (..., n), (..., n) -> (..., 1)."""
    return arithmetic(a, b).sum(a * b)


def relative_error(found: Array, wanted: Array) -> float:
    """The one error measure: max |difference| / max |target|.

    >>> import numpy as np
    >>> relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
    0.25
    """
    xp = arithmetic(found, wanted)
    return quotient(*(xp.to_float(xp.max(x.reshape(-1)).reshape(())) for x in errors_and_sizes(found, wanted)))


def errors_and_sizes(found: Array, wanted: Array) -> tuple[Array, Array]:
    """(max |difference|, max |target|) of each row: (..., n), (..., n) -> (...), (...).

    ``relative_error`` divides the largest of the one by the largest of the other; who wants it row by row divides these.
    """
    xp = arithmetic(found, wanted)
    found, wanted = xp.lift(found), xp.lift(wanted)
    return xp.largest(found - wanted)[..., 0], xp.largest(wanted)[..., 0]


def quotient(error: float, size: float) -> float:
    """``error`` relative to ``size``: 0 where nothing is missed, infinite where something is and the target is 0."""
    if error == 0:
        return 0.0
    return error / size if size else math.inf
