"""What a component is made of, held against what its fields are declared to be."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from controllability.errors import BadInput

PLAIN = (str, bool, int, NoneType)
BOUNDS = {"finite": math.isfinite, "≠ 0": bool, "≥ 0": (0.0).__le__, "> 0": (0.0).__lt__, "≥ 1": (1.0).__le__}


def refuse_misfits(owner: Any, bounds: Mapping[str, str], *kinds: type) -> None:
    """Raise ``BadInput`` for a field of a dataclass that is not what its annotation says: ``kinds``, dataclasses, plain values, several words.

    ``bounds`` names fields that must be numbers (or symbols, or None where that is the default) within one of ``BOUNDS``.
    """
    cls: Any = type(owner)
    hints: dict[str, Any] = vars(cls).get("_hints", {})  # evaluated once: every component that is made asks for them
    with suppress(NameError):  # an annotation that only a type checker can read
        hints = cls._hints = hints or get_type_hints(cls)
    for name, field in vars(type(owner)).get("__dataclass_fields__", {}).items():
        value, hint, bound = getattr(owner, name), hints.get(name, Any), bounds.get(name)
        wanted = "" if _fits(value, hint, (*PLAIN, *kinds)) else _in_words(hint)
        if bound and not (value is None is field.default or _within(value, bound)):
            wanted = f"a number, {bound}"
        if wanted:
            raise BadInput(f"{type(owner).__name__}: {name} must be {wanted}; got {value!r:.80}")


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    return re.sub(r"[\w.]+\.(?=\w)|<class '|'>", "", str(hint))


def _within(value: Any, bound: str) -> bool:
    if getattr(value, "free_symbols", None):
        return True
    with suppress(TypeError, ValueError):
        return not isinstance(value, str | bool) and math.isfinite(value) and BOUNDS[bound](float(value))
    return False


def _fits(value: Any, hint: Any, checked: tuple[type, ...]) -> bool:
    """Whether a value is of a kind; every value is of one that is not checked."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (Union, UnionType):
        return any(_fits(value, arg, checked) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and (args[1:] != (...,) or all(_fits(each, args[0], checked) for each in value))
    kind = isinstance(hint, type) and (issubclass(hint, checked) or is_dataclass(hint))
    return not kind or (isinstance(value, hint) and not (hint is int and isinstance(value, bool)))
