"""Elementwise activations and the tanh soft-cap: fixed maps without parameters."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from controllability.arrays import Arithmetic, Array, arithmetic
from controllability.arrays.lazy import mpmath, sympy
from controllability.errors import BadInput
from controllability.interfaces import Bijection, Component, Condition, Params, Size


def _half(xp: Arithmetic) -> Any:
    return xp.number(Fraction(1, 2))


def _relu(xp: Arithmetic, x: Array) -> Array:
    return (x + xp.magnitude(x)) * _half(xp)


def _gelu(xp: Arithmetic, x: Array) -> Array:
    return x * _half(xp) * (1 + xp.erf(x / _root_of(xp, 2)))


def _gelu_tanh(xp: Arithmetic, x: Array) -> Array:
    inner = x + xp.number(Fraction("0.044715")) * x * x * x
    return x * _half(xp) * (1 + xp.tanh(_root_of(xp, 2, over_pi=True) * inner))


def _mish(xp: Arithmetic, x: Array) -> Array:
    q = xp.sigmoid(-x)  # tanh(softplus x) = (1 − q²)/(1 + q²)
    return x * xp.sigmoid(x) * (1 + q) / (1 + q * q)


def _laplace(xp: Arithmetic, x: Array) -> Array:
    centred = (x - xp.number(Fraction("0.707107"))) / xp.number(Fraction("0.282095"))
    return (1 + xp.erf(centred / _root_of(xp, 2))) * _half(xp)


def _root_of(xp: Arithmetic, value: int, over_pi: bool = False) -> Any:
    if xp.symbolic:
        return sympy.sqrt(value / sympy.pi if over_pi else sympy.Integer(value))
    if xp.kind == "mpmath":
        return mpmath.sqrt(value / mpmath.pi if over_pi else value)
    return math.sqrt(value / math.pi if over_pi else value)


FORMULAS: dict[str, Callable[[Arithmetic, Array], Array]] = {
    "identity": lambda xp, x: x,
    "relu": _relu,
    "relu2": lambda xp, x: _relu(xp, x) * _relu(xp, x),
    "silu": lambda xp, x: x * xp.sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": lambda xp, x: xp.tanh(x),
    "sigmoid": lambda xp, x: xp.sigmoid(x),
    "quick_gelu": lambda xp, x: x * xp.sigmoid(x * xp.number(Fraction("1.702"))),
    "relu6": lambda xp, x: _relu(xp, x) - _relu(xp, x - 6),
    "leaky_relu": lambda xp, x: _relu(xp, x) - _relu(xp, -x) * xp.number(Fraction(1, 100)),
    "hardswish": lambda xp, x: x * (_relu(xp, x + 3) - _relu(xp, x - 3)) * xp.number(Fraction(1, 6)),
    "gelu_10": lambda xp, x: _gelu(xp, x) - _relu(xp, _gelu(xp, x) - 10),  # never below −10
    "mish": _mish,
    "laplace": _laplace,
    "sqrtsoftplus": lambda xp, x: xp.sqrt(_relu(xp, x) + xp.log(1 + xp.exp(-xp.magnitude(x)))),
}


@dataclass(frozen=True)
class Activation(Component):
    """y = φ(x), elementwise.  x: (..., h).

    ``name`` is one of ``FORMULAS`` (identity, relu, relu2, relu6, leaky_relu, silu, hardswish, mish, gelu, gelu_tanh,
    gelu_10, quick_gelu, tanh, sigmoid, laplace, sqrtsoftplus); or any name with ``coefficients`` (c_0, c_1, …) of a polynomial, which exact rationals can compute; or
    ``symbol=True``: an unknown function, for SymPy.  Raises ``BadInput`` for an unknown name.

    >>> import numpy as np
    >>> Activation("relu2")({}, np.array([-1.0, 3.0]))
    array([0., 9.])
    >>> Activation("cubic", coefficients=(0, 1, 0, 2))({}, np.array([2.0]))
    array([18.])
    """

    name: str
    coefficients: tuple[Any, ...] = ()
    symbol: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.coefficients and not self.symbol and self.name not in FORMULAS:
            raise BadInput(
                f"unknown activation {self.name!r}: known are {', '.join(FORMULAS)}; "
                "give coefficients=(...) for a polynomial or symbol=True for an unknown function"
            )

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        if self.coefficients:
            total = xp.zeros_like(x)
            for coefficient in reversed(self.coefficients):
                total = total * x + xp.number(coefficient)
            return total
        if self.symbol:
            return self._unknown(xp, x)
        kernel = xp.activation(self.name, x)
        return FORMULAS[self.name](xp, x) if kernel is None else kernel

    def _unknown(self, xp: Arithmetic, x: Array) -> Array:
        from controllability.symbolic.arithmetic import SympyArithmetic

        if not isinstance(xp, SympyArithmetic):
            raise BadInput(f"activation {self.name!r} is a symbol: it has values in SymPy only, not in {xp.kind}")
        return xp.each(sympy.Function(self.name), x)

    def output_width(self, width: Size) -> Size:
        return width

    def describe(self) -> str:
        return f"activation {self.name}"


@dataclass(frozen=True)
class SoftCap(Component, Bijection):
    """y = c·tanh(x/c), a bijection onto |y| < c.  x: (..., d).

    >>> import numpy as np
    >>> cap = SoftCap(30.0)
    >>> bool(np.allclose(cap.invert({}, cap({}, np.array([20.0]))), 20.0))
    True
    """

    cap: Any
    bounds = {"cap": "> 0"}

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        cap = xp.number(self.cap)
        return xp.tanh(x / cap) * cap

    def describe(self) -> str:
        return f"soft-cap {self.cap}"

    def invert(self, params: Params, y: Array) -> Array:
        xp = arithmetic(y)
        cap = xp.number(self.cap)
        return xp.arctanh(y / cap) * cap

    def image_conditions(self) -> tuple[Condition, ...]:
        statement = f"the soft-cap can reach the target: |target| < {self.cap}"
        return (Condition(statement, self.describe(), hint=self._unreached),)

    def _unreached(self, margin: float) -> str:
        size = f"{float(self.cap) - margin:.3g}"
        return f"the soft-cap {self.cap} cannot reach this target: |target| ≤ {self.cap}, and here it is {size}"

    def image_margin(self, params: Params, y: Array) -> Array:
        xp = arithmetic(y)
        if xp.symbolic:
            return xp.sum(xp.zeros_like(y)) + 1  # symbols: assumed
        return xp.min(xp.number(self.cap) - xp.magnitude(y))


@dataclass(frozen=True)
class Clamp(Component):
    """y = min(max(x, ``low``), ``high``), elementwise; None leaves a side open.  x: (..., h).

    >>> import numpy as np
    >>> Clamp(None, 1.0)({}, np.array([-2.0, 2.0]))
    array([-2.,  1.])
    """

    low: Any = None
    high: Any = None

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        x = x if self.high is None else xp.minimum(x, self.high)
        return x if self.low is None else xp.maximum(x, self.low)

    def output_width(self, width: Size) -> Size:
        return width

    def describe(self) -> str:
        return f"clamp to [{'−∞' if self.low is None else self.low}, {'∞' if self.high is None else self.high}]"


@dataclass(frozen=True)
class AboveMean(Component):
    """y = relu(x − mean(x) − ``deviations``·std(x)): of roughly normal entries a fixed share is kept.  x: (..., h).

    >>> import numpy as np
    >>> AboveMean(0.0)({}, np.array([1.0, 3.0]))
    array([0., 1.])
    """

    deviations: Any
    bounds = {"deviations": "finite"}

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        centred = x - xp.mean(x)
        return _relu(xp, centred - xp.number(self.deviations) * xp.sqrt(xp.mean(centred * centred)))

    def output_width(self, width: Size) -> Size:
        return width

    def describe(self) -> str:
        return f"what is {self.deviations:.3g} standard deviations above the mean"
