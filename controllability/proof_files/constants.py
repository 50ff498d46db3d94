"""The constants of an expression as JSON, and back: each as exact as it is, none of them computed by executing text."""

import ast
import math
import re
from fractions import Fraction
from typing import Any

from controllability.arrays.lazy import sympy
from controllability.errors import BadInput
from controllability.proof_files.json_shapes import wrong

FLOATS = {"inf": math.inf, "-inf": -math.inf}
LITERALS, FUNCTIONS = ("Integer", "Rational", "Float"), ("Add", "Mul", "Pow", "exp", "log")
BITS, POWER, LONGEST = 1024, 64, 2000  # of a SymPy constant: its integers, its exponents, its text


def is_constant(value: Any) -> bool:
    """Whether a value is a number: an int, a float, a Fraction or of SymPy."""
    plain = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    return plain or _room(value) == "sympy"


def _room(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def constant_data(value: Any) -> Any:
    """A constant as JSON-ready data: a number, or a text with the tag that says how to read it.

    Raises ``BadInput`` for what cannot be written exactly (NaN, a SymPy symbol, something that is no number).

    >>> constant_data(0.5), constant_data(Fraction(1, 3)), constant_data(float("-inf"))
    (0.5, {'fraction': '1/3'}, {'float': '-inf'})
    >>> import sympy
    >>> constant_data(sympy.sqrt(2))
    {'sympy': 'Pow(Integer(2), Rational(1, 2))'}
    """
    if _room(value) == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and not math.isnan(value):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Fraction):
        return {"fraction": f"{value.numerator}/{value.denominator}"}
    if _room(value) == "sympy":
        text = sympy.srepr(value)
        if constant_of("sympy", text, "the constant") == value:
            return {"sympy": text}
    raise BadInput(f"{value!r} cannot be written as a constant")


def constant_of(tag: str, text: Any, where: str) -> Any:
    """The constant that a tagged text stands for; raises ``BadInput`` for any other text.

    >>> constant_of("fraction", "1/3", "eps")
    Fraction(1, 3)
    >>> constant_of("fraction", "2/6", "eps")
    Traceback (most recent call last):
    controllability.errors.BadInput: eps: expected a fraction in lowest terms, such as -1/3, got '2/6'
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise wrong(where, f"a text of at most {LONGEST} signs", text)
    if tag == "float":
        if text not in FLOATS:
            raise wrong(where, "inf or -inf", text)
        return FLOATS[text]
    if tag == "fraction":
        plain = re.fullmatch(r"(-?[0-9]+)/([1-9][0-9]*)", text)
        value = Fraction(text) if plain else Fraction()
        if f"{value.numerator}/{value.denominator}" != text:
            raise wrong(where, "a fraction in lowest terms, such as -1/3", text)
        return value
    problem = wrong(where, f"a constant built of {', '.join((*LITERALS, *FUNCTIONS))}, pi, E", text)
    try:
        value = _built(ast.parse(text, mode="eval").body, problem)
        if sympy.srepr(value) == text:  # SymPy's one way to write it
            return value
    except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, MemoryError) as error:
        raise problem from error
    raise problem


def _built(tree: ast.expr, problem: BadInput) -> Any:
    """SymPy's own notation (``srepr``), read as a tree in which only the listed names are applied."""
    if isinstance(tree, ast.Name) and tree.id in ("pi", "E"):
        return getattr(sympy, tree.id)
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        raise problem
    name = tree.func.id
    if name in LITERALS:
        value = getattr(sympy, name)(*_literals(name, tree, problem))
    elif name in FUNCTIONS and not tree.keywords:
        parts = [_built(argument, problem) for argument in tree.args]
        if name == "Pow" and not (parts[1].is_Rational and max(abs(parts[1].p), parts[1].q) <= POWER):
            raise problem
        value = getattr(sympy, name)(*parts)
    else:
        raise problem
    if value.is_finite is False or (value.is_Rational and max(abs(value.p), value.q).bit_length() > BITS):
        raise problem
    return value


def _literals(name: str, tree: ast.Call, problem: BadInput) -> list[Any]:
    """What stands in the brackets of an Integer, a Rational or a Float."""
    try:
        given = [ast.literal_eval(argument) for argument in (*tree.args, *(k.value for k in tree.keywords))]
    except ValueError as error:
        raise problem from error
    if name == "Float":
        text, bits = given
        plain = re.fullmatch(r"-?[0-9]+\.[0-9]+(e[+-]?[0-9]{1,3})?", text) and type(bits) is int and 1 <= bits <= BITS
        if not plain or [k.arg for k in tree.keywords] != ["precision"]:
            raise problem
        return [sympy.Float(text, precision=bits)]
    count = 1 if name == "Integer" else 2
    if tree.keywords or len(given) != count or any(type(p) is not int or p.bit_length() > BITS for p in given):
        raise problem
    return given
