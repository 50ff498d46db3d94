"""The registry: one small declaration per family, a few thick builders for the shapes they share.

``names()``, ``block(name, **sizes)``, ``read(model)`` and ``@register(...)`` are all there is.
"""

from architectures import families as _families  # noqa: F401  (registers them)
from architectures.reading import Layer as Layer
from architectures.reading import Reading as Reading
from architectures.reading import read as read
from architectures.registry import Architecture as Architecture
from architectures.registry import StatePoint as StatePoint
from architectures.registry import add as add
from architectures.registry import block as block
from architectures.registry import find as find
from architectures.registry import names as names
from architectures.registry import register as register
from architectures.registry import unregister as unregister
from architectures.view import View as View
