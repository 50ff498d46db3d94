"""What JSON data must look like: every problem is one ``BadInput`` that names the JSON path."""

from collections.abc import Iterable
from typing import Any

from controllability.errors import BadInput

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
