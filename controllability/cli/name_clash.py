"""Our package ``architectures``, also where a folder or a file of the user's has its name."""

import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any

from controllability.errors import ControllabilityWarning

NAME = "architectures"
OURS = os.path.abspath(os.path.join(os.path.realpath(__file__), "../../..", NAME, "__init__.py"))


def find_ours() -> None:
    """See to it that ``import architectures`` gives ours: with a ``ControllabilityWarning`` where another stands first.

    Raises ``ImportError`` when another has been imported by that name: one process cannot hold both.
    """
    loaded = sys.modules.get(NAME)
    spec: Any = find_spec(NAME) if loaded is None else getattr(loaded, "__spec__", None)
    other = str((spec.origin or next(iter(spec.submodule_search_locations))) if spec is not None else loaded)
    if os.path.realpath(other) == OURS or not os.path.exists(OURS):
        return
    clash = f"{other} has the name of controllability's own package {NAME}: rename it; ours"
    if loaded is not None:
        raise ImportError(f"{clash} cannot be imported beside it")

    def ours(name: str, *_: Any) -> ModuleSpec | None:
        if name != NAME:
            return None
        warnings.warn(f"{clash} is imported in its place", ControllabilityWarning, stacklevel=2)
        return spec_from_file_location(name, OURS)

    sys.meta_path.insert(0, SimpleNamespace(find_spec=ours))  # type: ignore[arg-type]
