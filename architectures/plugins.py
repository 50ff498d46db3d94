"""Installed plug-ins: packages that register architectures of their own.

A package names a module, or a function without arguments, under the entry points ``controllability.architectures``;
importing the module or calling the function registers its families.  Plug-ins are loaded once, when the
registry is first asked for something.  One that fails is left out with a warning that names it: the others, and
everything that comes with this package, still work.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import MutableMapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from controllability.errors import BadInput

GROUP = "controllability.architectures"

_FAILED: dict[str, str] = {}  # plug-in -> what went wrong
_LOCK = threading.RLock()
_state = "new"  # then "loading", then "loaded"


def load_once(registered: MutableMapping[str, Any]) -> None:
    """Load the plug-ins into ``registered``, the first time; another thread waits until all are there."""
    global _state
    if _state == "loaded":
        return
    with _LOCK:
        if _state != "new":  # a plug-in that asks the registry while it is being loaded
            return
        _state = "loading"
        try:
            for point in entry_points(group=GROUP):
                _load(point, registered)
        finally:
            _state = "loaded"


def _load(point: EntryPoint, registered: MutableMapping[str, Any]) -> None:
    before = set(registered)
    try:
        loaded = point.load()
        built = [a.build for a in registered.values()]
        if callable(loaded) and loaded not in built:  # a builder is registered already, by its decorator
            loaded()
        elif not isinstance(loaded, ModuleType) and not callable(loaded):
            raise BadInput(
                f"{point.value} is a {type(loaded).__name__}; name a module, or a function without arguments"
            )
    except Exception as error:  # whatever somebody else's code raises
        for name in set(registered) - before:  # half a plug-in would be harder to understand than none
            del registered[name]
        who = f"{point.name!r} ({point.value}{_origin(point)})"
        _FAILED[who] = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"architecture plug-in {who} could not be loaded and is left out: {_FAILED[who]}; "
            "mend or uninstall it, everything else works",
            RuntimeWarning,
            stacklevel=4,
        )


def _origin(point: EntryPoint) -> str:
    return f", from {point.dist.name} {point.dist.version}" if point.dist is not None else ""


def failed() -> dict[str, str]:
    """The plug-ins that could not be loaded, and why."""
    return dict(_FAILED)
