"""The registry: one small declaration per family, a few thick builders for the shapes they share.

``names()``, ``block(name, **sizes)``, ``read(model)`` and ``@register(...)`` are all there is.
"""

from architectures import gemma as _gemma  # noqa: F401  (registers its families)
from architectures.reading import Layer as Layer
from architectures.reading import Reading as Reading
from architectures.reading import read as read
from architectures.registry import Architecture as Architecture
from architectures.registry import View as View
from architectures.registry import block as block
from architectures.registry import find as find
from architectures.registry import names as names
from architectures.registry import register as register
