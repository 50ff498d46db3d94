"""The registry: one small declaration per family, a few thick builders for the shapes they share.

``names()``, ``block(name, **sizes)``, ``read(model)`` and ``@register(...)`` are all there is.
"""

from architectures import families as _families  # noqa: F401  (registers them)
from architectures.reading import Layer as Layer, Reading as Reading, read as read
from architectures.registry import (
    Architecture as Architecture,
    StatePoint as StatePoint,
    add as add,
    block as block,
    find as find,
    names as names,
    register as register,
    unregister as unregister,
)
from architectures.view import View as View
