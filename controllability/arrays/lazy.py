"""SymPy and mpmath, imported when the first name of theirs is asked for: they take long to load, and few need them."""

from importlib import import_module
from typing import Any


class _Lazy:
    """A library that has not been imported yet; each name of it is looked up once."""

    def __init__(self, library: str) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        found = vars(self)[name] = getattr(import_module(self._library), name)
        return found


sympy: Any = _Lazy("sympy")
mpmath: Any = _Lazy("mpmath")
