"""SymPy numbers in NumPy object arrays, and index notation."""

from fractions import Fraction
from typing import Any

from controllability.arrays.base import Array
from controllability.arrays.lazy import np, sympy
from controllability.arrays.objects import ObjectArithmetic
from controllability.errors import NotExact
from controllability.symbolic.array_names import assume, named_array, unused
from controllability.symbolic.definitions import named
from controllability.symbolic.indexed import IndexedArray, _broadcast, _known, concatenated
from controllability.symbolic.normal_form import normal_form
from controllability.symbolic.sums import axis_index


class SympyArithmetic(ObjectArithmetic):
    """SymPy expressions, kept in a normal form; see ``controllability.symbolic.definitions``."""

    kind = "sympy"
    exact = True
    symbolic = True

    def number(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            return sympy.Rational(value.numerator, value.denominator)
        if isinstance(value, float):
            return sympy.Rational(repr(value))
        return sympy.sympify(value)

    def scalar(self, name: str, value: Any) -> Any:
        if name == "sqrt":  # equal radicands must look equal, or their roots do not cancel
            value = normal_form(value)
        return getattr(sympy, name)(value)

    def matmul(self, a: Array, b: Array) -> Array:
        return self.tidy(a @ b)  # the coefficient zᵀz/‖z‖² becomes 1 here, before it meets anything large

    def linear(self, x: Array, weight: Array) -> Array:
        return self.name(x @ weight.swapaxes(-1, -2))

    def max(self, x: Array) -> Array:
        raise NotExact("symbols have no order: take another route than one that compares sizes")

    min = max

    def minimum(self, x: Array, bound: Any) -> Array:
        return self.each(lambda v: sympy.Min(v, self.number(bound)), x)

    def top(self, x: Array, k: int) -> Array:
        # symbols have no order: the experts are numbered so that the first k are chosen
        return np.broadcast_to(np.arange(k, dtype=np.int64), (*x.shape[:-1], k))

    def routed(self, x: Array, weights: Array, index: Array) -> Array:
        return self.name(super().routed(x, weights, index))

    def smallest(self, x: Array) -> Array:
        return x.prod(axis=-1, keepdims=True)

    def magnitude(self, x: Array) -> Array:
        return self.each(abs, x)

    def tidy(self, x: Array) -> Array:
        return self.each(normal_form, x)

    def name(self, x: Array) -> Array:
        return self.each(named, x)

    def to_float(self, x: Array) -> Any:
        value = np.asarray(x, dtype=object).reshape(())[()]
        return float(value) if getattr(value, "is_number", False) else None


class IndexedArithmetic(SympyArithmetic):
    """SymPy expressions for one generic entry of arrays of symbolic size."""

    kind = "indexed"

    def array(self, values: Any, like: Array | None = None) -> Array:
        raise NotExact("arrays of symbolic size have no listed entries")

    def each(self, function: Any, x: Array) -> Array:
        return IndexedArray(x.shape, function(x.entry))

    def is_zero(self, x: Array) -> Array:
        return _known(x.entry == 0, x.ndim)

    def zeros_like(self, x: Array) -> Array:
        return IndexedArray(x.shape, sympy.Integer(0))

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        if not condition.entry.is_Integer:
            return condition * a + (1 - condition) * b
        chosen, other = (a, b) if condition else (b, a)
        if not isinstance(chosen, IndexedArray):
            return self.zeros_like(other) + chosen
        return IndexedArray(_broadcast(chosen.shape, getattr(other, "shape", ())), chosen.entry)

    def planes(self, x: Array, index: Array, count: Any) -> Array:
        named = IndexedArray((count, 1), axis_index(1)) == index[..., None, :]
        return (named[..., None, None] * x[..., None, :, :, :]).sum(-3)

    def repeated(self, x: Array, k: Any) -> Array:
        return IndexedArray((*x.shape[:-2], k, x.shape[-1]), x.entry)

    def smallest(self, x: Array) -> Array:
        """One generic feature: it is 0 exactly when all of them are."""
        return IndexedArray((*x.shape[:-1], 1), x.entry)

    def name(self, x: Array) -> Array:
        return named_array(x)

    def root(self, name: str, function: Any, value: Array) -> Array:
        """A number with ``function(number) = value``, which is assumed to exist."""
        unknown = IndexedArray(value.shape, unused(name))
        assume(function(unknown).entry, value.entry, unknown.entry)
        return unknown

    def concatenate(self, parts: list[Array], axis: int) -> Array:
        return concatenated(parts, axis)

    def to_float(self, x: Array) -> Any:
        return None
