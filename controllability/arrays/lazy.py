"""NumPy, SciPy, SymPy and mpmath, imported when the first name of theirs is asked for: they take long to load, and few need all of them.

Proofs, their printing and the symbolic check run where NumPy is not installed.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


class _Unloaded:
    """A class of objects in place of one of a library that was not imported: there are none."""


class _Lazy:
    """A library that has not been imported yet; each name of it is looked up once."""

    def __init__(self, library: str, *classes: str) -> None:
        self._library, self._classes = library, classes

    def __getattr__(self, name: str) -> Any:
        if name in self._classes and sys.modules.get(self._library) is None:  # in annotations, and in isinstance
            return _Unloaded
        found = vars(self)[name] = getattr(import_module(self._library), name)
        return found


if TYPE_CHECKING:
    import numpy as np
else:
    np = _Lazy("numpy", "ndarray", "generic")
linalg, optimize, sparse, special = (_Lazy(f"scipy.{part}") for part in ("linalg", "optimize", "sparse", "special"))
sympy: Any = _Lazy("sympy")
mpmath: Any = _Lazy("mpmath")
