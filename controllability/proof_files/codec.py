"""Block expressions as JSON, and back: every class by its name, with its fields, numbers as exact as they are.

Nothing in the data is executed or imported: names are looked up in a table of this package's own classes and of
those that the caller passes.  A value that JSON cannot hold is written as opaque, and refused when it is read.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import isclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from controllability import components
from controllability.components.routing import Routing
from controllability.errors import BadInput
from controllability.interfaces import Component, Param
from controllability.proof_files.constants import constant_data, constant_of, is_constant
from controllability.proof_files.json_shapes import keys, wrong

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
