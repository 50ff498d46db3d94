"""Exact and many-digit numbers in NumPy object arrays: fractions, mpmath, SymPy."""

import math
from fractions import Fraction
from typing import Any

from controllability.arrays.base import Arithmetic, Array
from controllability.arrays.lazy import mpmath, np
from controllability.errors import NotExact


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

    def zeros_like(self, x: Array) -> Array:
        if x.dtype != object:  # places of experts
            return np.zeros_like(x)
        return self.each(lambda _: self.number(0), x)  # x * 0 is no number where x is infinite

    def is_zero(self, x: Array) -> Array:
        return np.asarray(x == 0, dtype=bool)

    def scalar(self, name: str, value: Any) -> Any:
        """``function`` of one element."""
        raise NotImplementedError

    def function(self, name: str, x: Array) -> Array:
        return self.each(lambda v: self.scalar(name, v), x)

    def minimum(self, x: Array, bound: Any) -> Array:
        bound = self.number(bound)
        return self.each(lambda v: min(v, bound), x)

    def sigmoid(self, x: Array) -> Array:
        return self.number(1) / (self.number(1) + self.exp(-x))


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
        remedy = "use SymPy or mpmath numbers, or choose the instance so that it is"
        raise NotExact(f"{name}({value}) is not rational; {remedy}")


class MpmathArithmetic(ObjectArithmetic):
    """mpmath numbers, in the precision of the caller's ``mpmath.workdps``."""

    kind = "mpmath"

    def machine_epsilon(self, x: Array) -> float:
        return float(mpmath.mp.eps)

    def number(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            return mpmath.mpf(value.numerator) / value.denominator
        return mpmath.mpf(value)

    def scalar(self, name: str, value: Any) -> Any:
        return getattr(mpmath, name)(value)
