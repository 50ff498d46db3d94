"""Block expressions as JSON, and back: every class by its name, with its fields, numbers as exact as they are.

Nothing in the data is executed or imported: names are looked up in a table of this package's own classes and of
those that the caller passes.  A value that JSON cannot hold is written as opaque, and refused when it is read.
"""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from inspect import isclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from controllability import components
from controllability.arrays.lazy import sympy
from controllability.components.routing import Routing
from controllability.errors import BadInput
from controllability.interfaces import Component, Param

WORDS = {str: "a text", int: "an integer from 0 on", bool: "true or false", dict: "an object", list: "a list"}


def wrong(where: str, expected: str, got: Any) -> BadInput:
    """The error for data that is not what it should be; ``where`` is its JSON path."""
    return BadInput(f"{where}: expected {expected}, got {short(repr(got))}")


def short(shown: Any) -> str:
    """A text that fits a message."""
    text = str(shown)
    return text if len(text) <= 80 else text[:79] + "…"


def keys(data: Any, where: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise ``BadInput`` unless ``data`` is an object with these keys, no fewer and no more."""
    if not isinstance(data, dict):
        raise wrong(where or "the proof", "an object", data)
    required, before = [*required], f"{where}." if where else ""
    if missing := [k for k in required if k not in data]:
        raise BadInput(f"{before}{missing[0]}: expected, and it is missing")
    known = [*required, *optional]
    if surplus := [k for k in data if k not in known]:
        raise BadInput(f"{before}{short(surplus[0])}: not expected; known are {', '.join(known) or 'no keys'}")


def shaped(data: Any, shape: Any, where: str) -> None:
    """Raise ``BadInput`` unless the data has this shape: a type, a list, an object, or one of two."""
    if isinstance(shape, tuple):
        if data is not None:
            shaped(data, shape[0], where)
    elif isinstance(shape, list):
        shaped(data, list, where)
        for i, item in enumerate(data):
            shaped(item, shape[0], f"{where}[{i}]")
    elif isinstance(shape, dict):
        keys(data, where, shape)
        for key, inside in shape.items():
            shaped(data[key], inside, f"{where}.{key}")
    elif type(data) is not shape or (shape is int and data < 0):
        raise wrong(where, WORDS[shape], data)


def one_of(value: str, known: tuple[str, ...], where: str) -> None:
    """Raise ``BadInput`` unless a text is one of those that are known."""
    if value not in known:
        raise wrong(where, " or ".join(known), value)


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


TAGS = ("class", "foreign", "slice", "fraction", "sympy", "float", "opaque")


def own_classes() -> dict[str, type]:
    """The classes of this package that an expression may name."""
    found = {name: c for name, c in vars(components).items() if isclass(c) and issubclass(c, Component)}
    return found | {"Param": Param, "Routing": Routing}


def encode(value: Any) -> Any:
    """A component, or a value of one of its fields, as JSON-ready data.

    >>> encode(Param("W", ("h", "d")))
    {'class': 'Param', 'fields': {'name': 'W', 'shape': ['h', 'd'], 'index': []}}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Component) or (is_dataclass(value) and not isinstance(value, type)):
        return _object(value)
    try:
        return constant_data(value)
    except BadInput:
        return _opaque(value)


def _object(value: Any) -> dict[str, Any]:
    cls = type(value)
    all_fields = fields(value) if is_dataclass(value) else ()
    if set(getattr(value, "__dict__", ())) - {f.name for f in all_fields}:
        return _opaque(value)  # it holds more than its fields say
    known = "class" if own_classes().get(cls.__name__) is cls else "foreign"
    return {known: cls.__name__, "fields": {f.name: encode(getattr(value, f.name)) for f in all_fields if f.init}}


def _opaque(value: Any) -> dict[str, Any]:
    return {"opaque": f"{type(value).__module__}.{type(value).__qualname__}"}


def decode(data: Any, where: str, foreign: Mapping[str, type]) -> Any:
    """The value that ``encode`` wrote; ``foreign`` holds the caller's own classes by name.

    Raises ``BadInput`` that names the JSON path ``where`` and what was expected there.

    >>> decode(encode(Param("W", ("h", "d"))), "block", {})
    Param(name='W', shape=('h', 'd'), index=())
    >>> decode({"class": "Lineal", "fields": {}}, "block", {})
    Traceback (most recent call last):
    controllability.errors.BadInput: block.class: expected a class of this package (AboveMean, ...
    """
    if isinstance(data, list):
        return tuple(decode(item, f"{where}[{i}]", foreign) for i, item in enumerate(data))
    if data is None or isinstance(data, bool | str | int) or (isinstance(data, float) and math.isfinite(data)):
        return data
    tag = next((t for t in TAGS if t in data), None) if isinstance(data, dict) else None
    if not isinstance(data, dict) or tag is None:
        raise wrong(where, f"a number, a text, a list, null, or an object with one of {', '.join(TAGS)}", data)
    if tag == "opaque":
        raise BadInput(f"{where}: {data[tag]} could not be written as JSON, so the block cannot be rebuilt")
    if tag in ("class", "foreign"):
        return _instance(data, tag, where, foreign)
    keys(data, where, (tag,))
    return _tagged(tag, data[tag], f"{where}.{tag}")


def _tagged(tag: str, content: Any, where: str) -> Any:
    if tag == "slice":
        plain = isinstance(content, list) and len(content) == 3 and content[2] is None
        if not plain or any(not (p is None or (type(p) is int and p >= 0)) for p in content[:2]):
            raise wrong(where, "[start, stop, null] with integers from 0 on, or null", content)
        return slice(*content)
    return constant_of(tag, content, where)


def _instance(data: dict[str, Any], tag: str, where: str, foreign: Mapping[str, type]) -> Any:
    keys(data, where, (tag, "fields"))
    known = own_classes() if tag == "class" else foreign
    if not isinstance(data[tag], str) or data[tag] not in known:
        ours = f"a class of this package ({', '.join(sorted(known))})"
        raise wrong(f"{where}.{tag}", ours if tag == "class" else "a class that was passed in components=", data[tag])
    cls = known[data[tag]]
    wanted = [f for f in fields(cls) if f.init] if is_dataclass(cls) else []
    keys(data["fields"], f"{where}.fields", (f.name for f in wanted))
    values = {name: decode(value, f"{where}.fields.{name}", foreign) for name, value in data["fields"].items()}
    if tag == "class":  # what a foreign class takes is its own affair
        hints = get_type_hints(cls)
        for f in wanted:
            value, hint = values[f.name], hints[f.name]
            if not (fits(value, hint) or (value is None and f.default is None)):
                raise wrong(f"{where}.fields.{f.name}", in_words(hint), data["fields"][f.name])
    try:
        return cls(**values)
    except RecursionError:  # of a file that is nested too deeply, not of these fields
        raise
    except Exception as refused:
        raise BadInput(f"{where}: {data[tag]} does not take these fields: {refused}") from refused


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what the annotation of a field says; ``Any`` and ``float`` stand for constants."""
    inside = get_args(hint)
    if hint is Any or hint is float:
        return is_constant(value)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in inside
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in inside)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = (inside[0],) * len(value) if inside[-1] is Ellipsis else inside
        return len(wanted) == len(value) and all(map(fits, value, wanted))
    return type(value) is hint if hint in (int, bool, str) else isinstance(value, hint)


def in_words(hint: Any) -> str:
    """An annotation for a message."""
    inside = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(inside)}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(in_words, inside))
    if get_origin(hint) is tuple:
        return f"a list, each {in_words(inside[0])}" if inside[-1] is Ellipsis else f"a list of {len(inside)} numbers"
    plain = {
        Any: "a number", float: "a number", int: "an integer", str: "a text", bool: "true or false", NoneType: "null",
        Component: "a component", slice: "a slice",
    }  # fmt: skip
    return plain.get(hint) or f"a {hint.__name__}"
