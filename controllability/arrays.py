"""The dozen operations in which NumPy, torch, SymPy, exact rationals and mpmath differ.

Everything else in the package is written once with ``+ - * / @`` on arrays whose last axis holds
the features and whose leading axes, if any, run over tokens.  SymPy expressions, fractions and
50-digit numbers live in NumPy object arrays, so the same code runs on them.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from controllability.errors import BadInput, NotExact

Array = Any  # numpy.ndarray (float or object) or torch.Tensor


class Arithmetic:
    """NumPy floats; the other arithmetics override what differs."""

    kind = "numpy"
    exact = False

    def machine_epsilon(self, x: Array) -> float:
        """Relative spacing of the numbers in ``x``; 0 in exact arithmetics."""
        return float(np.finfo(x.dtype).eps)

    def number(self, value: Any) -> Any:
        """A Python, SymPy or rational constant as a scalar of this arithmetic."""
        return float(value)

    def array(self, values: Any, like: Array | None = None) -> Array:
        """``values`` as an array of this arithmetic, on the device of ``like``."""
        return np.asarray(values, dtype=np.float64)

    def lift(self, x: Array) -> Array:
        """``x`` in the precision in which patches are solved (half precisions become float32)."""
        return x

    def as_stored(self, x: Array, like: Array) -> Array:
        """``x`` after the rounding that storing it with the dtype of ``like`` costs."""
        return x

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def arctanh(self, x: Array) -> Array:
        return np.arctanh(x)

    def erf(self, x: Array) -> Array:
        from scipy.special import erf

        return erf(x)

    def sigmoid(self, x: Array) -> Array:
        from scipy.special import expit

        return expit(x)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        return np.where(condition, a, b)

    def sum(self, x: Array) -> Array:
        """Sum over the features, keeping the axis."""
        return x.sum(axis=-1, keepdims=True)

    def max(self, x: Array) -> Array:
        """Largest feature, keeping the axis."""
        return x.max(axis=-1, keepdims=True)

    def min(self, x: Array) -> Array:
        """Smallest feature, keeping the axis."""
        return x.min(axis=-1, keepdims=True)

    def smallest(self, x: Array) -> Array:
        """Smallest |feature|, keeping the axis; in symbols the product, which is 0 exactly when one is."""
        return self.min(self.magnitude(x))

    def mean(self, x: Array) -> Array:
        """Mean over the features, keeping the axis."""
        return self.sum(x) / x.shape[-1]

    def is_zero(self, x: Array) -> Array:
        """Boolean array: which entries are (known to be) zero."""
        return x == 0

    def any(self, x: Array) -> bool:
        return bool(x.any())

    def all(self, x: Array) -> bool:
        return bool(x.all())

    def zeros_like(self, x: Array) -> Array:
        return x * 0

    def linear(self, x: Array, weight: Array) -> Array:
        """``x Wᵀ`` for ``x`` of shape (..., in) and ``weight`` of shape (out, in)."""
        return x @ weight.swapaxes(-1, -2)

    def activation(self, name: str, x: Array) -> Array | None:
        """A fused kernel for a named activation, or None where the formula is to be used."""
        return None

    def tidy(self, x: Array) -> Array:
        """The same value in a normal form, where the arithmetic has one."""
        return x

    def name(self, x: Array) -> Array:
        """The same value, from here on treated as given: symbols get a name for it."""
        return x

    def to_float(self, x: Array) -> Any:
        """Python float of a one-element array; None when it is not a number."""
        return float(np.asarray(x).reshape(()))

    def magnitude(self, x: Array) -> Array:
        return abs(x)


class ObjectArithmetic(Arithmetic):
    """Object arrays whose elements know ``+ - * /``; scalar functions are applied one by one."""

    def machine_epsilon(self, x: Array) -> float:
        return 0.0

    def array(self, values: Any, like: Array | None = None) -> Array:
        source = np.asarray(values, dtype=object)
        flat = [self.number(v) for v in source.reshape(-1)]
        result = np.empty(len(flat), dtype=object)
        result[:] = flat
        return result.reshape(source.shape)

    def each(self, function: Any, x: Array) -> Array:
        x = np.asarray(x, dtype=object)
        result = np.empty(x.size, dtype=object)
        result[:] = [function(v) for v in x.reshape(-1)]
        return result.reshape(x.shape)

    def is_zero(self, x: Array) -> Array:
        return np.asarray(x == 0, dtype=bool)

    def scalar(self, name: str, value: Any) -> Any:
        """One of sqrt, exp, tanh, atanh, erf on one element."""
        raise NotImplementedError

    def sqrt(self, x: Array) -> Array:
        return self.each(lambda v: self.scalar("sqrt", v), x)

    def exp(self, x: Array) -> Array:
        return self.each(lambda v: self.scalar("exp", v), x)

    def tanh(self, x: Array) -> Array:
        return self.each(lambda v: self.scalar("tanh", v), x)

    def arctanh(self, x: Array) -> Array:
        return self.each(lambda v: self.scalar("atanh", v), x)

    def erf(self, x: Array) -> Array:
        return self.each(lambda v: self.scalar("erf", v), x)

    def sigmoid(self, x: Array) -> Array:
        return self.number(1) / (self.number(1) + self.exp(-x))

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        return np.where(np.asarray(condition, dtype=bool), a, b)


class RationalArithmetic(ObjectArithmetic):
    """``fractions.Fraction``: exact, with square roots of perfect squares only."""

    kind = "rational"
    exact = True

    def number(self, value: Any) -> Any:
        return value if isinstance(value, Fraction) else Fraction(value)

    def scalar(self, name: str, value: Any) -> Any:
        value = Fraction(value)
        if name == "sqrt" and value >= 0:
            top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
            if top * top == value.numerator and bottom * bottom == value.denominator:
                return Fraction(top, bottom)
        if name != "sqrt" and value == 0:
            return Fraction(int(name == "exp"))
        raise NotExact(
            f"{name}({value}) is not rational; use SymPy or mpmath numbers, or choose the instance so that it is"
        )


class MpmathArithmetic(ObjectArithmetic):
    """mpmath numbers, in the precision of the caller's ``mpmath.workdps``."""

    kind = "mpmath"

    def machine_epsilon(self, x: Array) -> float:
        import mpmath

        return float(mpmath.mp.eps)

    def number(self, value: Any) -> Any:
        import mpmath

        if isinstance(value, Fraction):
            return mpmath.mpf(value.numerator) / value.denominator
        return mpmath.mpf(value)

    def scalar(self, name: str, value: Any) -> Any:
        import mpmath

        return getattr(mpmath, name)(value)


class SympyArithmetic(ObjectArithmetic):
    """SymPy expressions, kept in a normal form; see ``controllability.symbols``."""

    kind = "sympy"
    exact = True

    def number(self, value: Any) -> Any:
        import sympy

        if isinstance(value, Fraction):
            return sympy.Rational(value.numerator, value.denominator)
        if isinstance(value, float):
            return sympy.Rational(repr(value))
        return sympy.sympify(value)

    def scalar(self, name: str, value: Any) -> Any:
        import sympy

        if name == "sqrt":  # equal radicands must look equal, or their roots do not cancel
            value = self.tidy(np.array([value], dtype=object))[0]
        return getattr(sympy, name)(value)

    def linear(self, x: Array, weight: Array) -> Array:
        return self.name(x @ weight.swapaxes(-1, -2))

    def max(self, x: Array) -> Array:
        raise NotExact("symbols have no order: take another route than one that compares sizes")

    min = max

    def smallest(self, x: Array) -> Array:
        return x.prod(axis=-1, keepdims=True)

    def magnitude(self, x: Array) -> Array:
        return self.each(abs, x)

    def tidy(self, x: Array) -> Array:
        from controllability.symbols import normal_form

        return self.each(normal_form, x)

    def name(self, x: Array) -> Array:
        from controllability.symbols import named

        return self.each(named, x)

    def to_float(self, x: Array) -> Any:
        value = np.asarray(x, dtype=object).reshape(())[()]
        return float(value) if getattr(value, "is_number", False) else None


class TorchArithmetic(Arithmetic):
    """torch tensors of any dtype on any device; solving happens in float32 or better."""

    kind = "torch"

    def machine_epsilon(self, x: Array) -> float:
        return float(self.torch.finfo(x.dtype).eps)

    @functools.cached_property
    def torch(self) -> Any:
        import torch

        return torch

    def array(self, values: Any, like: Array | None = None) -> Array:
        if like is None:
            return self.torch.as_tensor(values)
        return self.torch.as_tensor(values, dtype=like.dtype, device=like.device)

    def lift(self, x: Array) -> Array:
        return x.float() if x.dtype in (self.torch.float16, self.torch.bfloat16) else x

    def as_stored(self, x: Array, like: Array) -> Array:
        return x.to(like.dtype).to(x.dtype)

    def sqrt(self, x: Array) -> Array:
        return x.sqrt() if hasattr(x, "sqrt") else math.sqrt(x)

    def exp(self, x: Array) -> Array:
        return x.exp()

    def tanh(self, x: Array) -> Array:
        return x.tanh()

    def arctanh(self, x: Array) -> Array:
        return x.atanh()

    def erf(self, x: Array) -> Array:
        return x.erf()

    def sigmoid(self, x: Array) -> Array:
        return x.sigmoid()

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        return self.torch.where(condition, a, b)

    def sum(self, x: Array) -> Array:
        return x.sum(-1, keepdim=True)

    def max(self, x: Array) -> Array:
        return x.amax(-1, keepdim=True)

    def min(self, x: Array) -> Array:
        return x.amin(-1, keepdim=True)

    def linear(self, x: Array, weight: Array) -> Array:
        dtype = self.torch.promote_types(x.dtype, weight.dtype)
        return self.torch.nn.functional.linear(x.to(dtype), weight.to(dtype))

    def activation(self, name: str, x: Array) -> Array | None:
        functional = self.torch.nn.functional
        kernels = {
            "silu": functional.silu,
            "relu": functional.relu,
            "gelu": functional.gelu,
            "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
        }
        return kernels[name](x) if name in kernels else None

    def to_float(self, x: Array) -> Any:
        return float(x)


_NUMPY, _RATIONAL, _MPMATH, _SYMPY, _TORCH = (
    Arithmetic(),
    RationalArithmetic(),
    MpmathArithmetic(),
    SympyArithmetic(),
    TorchArithmetic(),
)
ARITHMETICS: dict[str, Arithmetic] = {a.kind: a for a in (_NUMPY, _RATIONAL, _MPMATH, _SYMPY, _TORCH)}


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
    torch = sys.modules.get("torch")
    found: Arithmetic | None = None
    for x in arrays:
        if torch is not None and isinstance(x, torch.Tensor):
            return _TORCH
        kind = _numpy_kind(x)
        # symbols absorb fractions, everything absorbs plain floats
        if found is None or found is _NUMPY or (found is _RATIONAL and kind is _SYMPY):
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
    for kind in (_SYMPY, _MPMATH, _RATIONAL):
        if kind in kinds:
            return kind
    raise AssertionError("unreachable")


def _element_kind(value: Any) -> Arithmetic:
    if isinstance(value, (Fraction, int)):
        return _RATIONAL
    sympy, mpmath = sys.modules.get("sympy"), sys.modules.get("mpmath")
    if sympy is not None and isinstance(value, sympy.Basic):
        return _SYMPY
    if mpmath is not None and isinstance(value, mpmath.mpf):
        return _MPMATH
    raise BadInput(
        f"cannot compute with elements of type {type(value).__name__}; use floats, Fraction, SymPy or mpmath"
    )


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
    found, wanted = xp.lift(found), xp.lift(wanted)
    difference = xp.magnitude(found - wanted).reshape(-1)
    largest = xp.to_float(xp.max(difference).reshape(()))
    scale = xp.to_float(xp.max(xp.magnitude(wanted).reshape(-1)).reshape(()))
    if largest == 0:
        return 0.0
    return largest / scale if scale else math.inf


def stack(rows: Sequence[Array]) -> Array:
    """Stack along a new first axis."""
    if arithmetic(rows[0]) is _TORCH:
        return _TORCH.torch.stack(list(rows))
    return np.stack(rows)
