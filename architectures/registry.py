"""What is registered: how a family's block is written down, abstractly and on a live model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controllability.components import Linear, Sequence, layer_norm, rms_norm
from controllability.errors import BadInput
from controllability.interfaces import Component, Param


@dataclass(frozen=True)
class View:
    """What a builder sees: where parameter names start, sizes, and the settings of one layer.

    An abstract block has an empty prefix and sizes named "d" and "h"; on a live model the prefix is
    the layer's module name and the settings come from the config.
    """

    prefix: str = ""
    sizes: dict[str, int | str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def size(self, name: str) -> int | str:
        """A number where one was given, else the name itself."""
        return self.sizes.get(name, name)

    def param(self, name: str, *shape: str) -> Param:
        """A parameter of this layer; ``shape`` names its sizes."""
        return Param(self.prefix + name, tuple(self.size(s) for s in shape))

    def linear(self, module: str, out: str, into: str, bias: bool = False) -> Linear:
        """``torch.nn.Linear`` under the layer: ``{module}.weight`` (out, in), maybe ``{module}.bias``."""
        weight = self.param(f"{module}.weight", out, into)
        return Linear(weight, self.param(f"{module}.bias", out) if bias else None)

    def rms_norm(self, module: str, offset: int = 0) -> Sequence:
        """RMSNorm under the layer, with the settings' eps."""
        return rms_norm(self.prefix + module, self.size("d"), self.settings["eps"], offset)

    def layer_norm(self, module: str, bias: bool = True) -> Sequence:
        """LayerNorm under the layer, with the settings' eps."""
        return layer_norm(self.prefix + module, self.size("d"), self.settings["eps"], bias=bias)


@dataclass(frozen=True)
class Architecture:
    """One registered family.

    ``layer_class`` is the name of the live layer's class, ``build`` writes the block of one layer,
    ``settings`` reads what the builder needs from a config (``defaults`` serve abstract blocks).
    """

    name: str
    model_types: tuple[str, ...]
    layer_class: str
    topology: str
    feed_forward: str
    build: Callable[[View], Component]
    settings: Callable[[Any], dict[str, Any]]
    defaults: dict[str, Any]


_REGISTERED: dict[str, Architecture] = {}


def register(
    name: str,
    *,
    model_types: tuple[str, ...],
    layer_class: str,
    topology: str,
    feed_forward: str,
    settings: Callable[[Any], dict[str, Any]],
    defaults: dict[str, Any],
) -> Callable[[Callable[[View], Component]], Callable[[View], Component]]:
    """Decorator that registers the builder of a family's block.

    Raises ``BadInput`` when the name or one of the model types is taken.

    >>> from controllability.components import residual
    >>> @register("toy", model_types=("toy",), layer_class="ToyLayer", topology="residual",
    ...           feed_forward="linear", settings=lambda config: {}, defaults={})
    ... def toy(view):
    ...     return residual(view.linear("mix", "d", "d"))
    >>> block("toy", d=4).width
    4
    >>> unregister("toy")
    """
    taken = {t: a.name for a in _REGISTERED.values() for t in a.model_types}
    if name in _REGISTERED:
        raise BadInput(f"architecture {name!r} is registered already")
    for model_type in model_types:
        if model_type in taken:
            raise BadInput(f"model type {model_type!r} is registered already, by architecture {taken[model_type]!r}")

    def decorate(build: Callable[[View], Component]) -> Callable[[View], Component]:
        _REGISTERED[name] = Architecture(
            name, model_types, layer_class, topology, feed_forward, build, settings, defaults
        )
        return build

    return decorate


def unregister(name: str) -> None:
    """Forget an architecture (for tests and notebooks)."""
    _REGISTERED.pop(name, None)


def names() -> list[str]:
    """The registered architectures.

    >>> "gemma3" in names()
    True
    """
    return sorted(_REGISTERED)


def find(name: str) -> Architecture:
    """The architecture called ``name``, or that reads the model type ``name``.

    Raises ``BadInput`` with the known names.
    """
    for architecture in _REGISTERED.values():
        if name == architecture.name or name in architecture.model_types:
            return architecture
    raise BadInput(f"unknown architecture or model type {name!r}: registered are {', '.join(names())}")


def block(name: str, **sizes: int | str) -> Component:
    """The abstract block expression of a family; parameters are named as inside one layer.

    ``sizes`` sets ``d``, ``h``, … to numbers; ``eps`` and other settings may be given as well.

    >>> sorted(map(str, block("gemma3").parameters()))[:2]
    ['mlp.down_proj.weight', 'mlp.gate_proj.weight']
    """
    architecture = find(name)
    settings = architecture.defaults | {k: v for k, v in sizes.items() if k in architecture.defaults}
    shape = {k: v for k, v in sizes.items() if k not in architecture.defaults}
    return architecture.build(View("", shape, settings))
