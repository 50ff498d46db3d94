"""Reading a live model into block expressions, its parameters bound without copying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from architectures.registry import Architecture, View, find
from controllability.arrays import Array
from controllability.errors import BadInput, ReadingError
from controllability.interfaces import Component, Param
from controllability.trace import Path, leaves


@dataclass(frozen=True)
class Tap:
    """A live module that computes some consecutive leaves: where its input and output stand in the block."""

    module: str
    paths: tuple[Path, ...]

    @property
    def inlet(self) -> Path:
        """The node whose input is the module's input."""
        return self.paths[0]

    @property
    def outlet(self) -> Path:
        """The node whose output is the module's output."""
        return self.paths[-1]


class LiveParams(Mapping[str, Array]):
    """Parameter name -> the tensor that the live module holds right now (no copy)."""

    def __init__(self, model: Any, params: frozenset[Param]) -> None:
        self._where: dict[str, tuple[Any, str]] = {}
        missing = []
        for name in sorted({p.name for p in params}):
            path, _, attribute = name.rpartition(".")
            try:
                module = model.get_submodule(path)
                if attribute not in module._parameters or module._parameters[attribute] is None:
                    raise AttributeError(attribute)
                self._where[name] = (module, attribute)
            except AttributeError:
                missing.append(name)
        if missing:
            raise ReadingError(
                f"the model has no parameter {', '.join(missing)}: its layers are not what was registered"
            )

    def __getitem__(self, name: str) -> Array:
        module, attribute = self._where[name]
        return module._parameters[attribute].detach()

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def holder(self, name: str) -> tuple[Any, str]:
        """The module that holds a parameter, and its attribute name there."""
        return self._where[name]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a live model: its block expression, bound parameters, and the modules to tap."""

    index: int
    name: str
    block: Component
    params: LiveParams
    taps: tuple[Tap, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """A live model read: its architecture and one ``Layer`` per layer, in the order of the forward pass."""

    architecture: Architecture
    layers: tuple[Layer, ...]
    config: Any


def read(model: Any) -> Reading:
    """Read a live transformers model: ``.layers``, each with ``.block`` and ``.params``.

    Nothing is copied.  The reading is not trusted before ``controllability.models`` has compared it
    with the real modules on random input.  Raises ``BadInput`` when the model's type is not registered and
    ``ReadingError`` when its modules are not what the registered family has.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise BadInput(f"{type(model).__name__} has no config.model_type: give a transformers model")
    architecture = find(model_type)
    assert config is not None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        settings = architecture.settings(text_config)
    except (AttributeError, KeyError) as missing:
        raise ReadingError(f"{architecture.name}: the config has a value that is not declared: {missing}") from None
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ == architecture.layer_class]
    if not found:
        raise ReadingError(
            f"{architecture.name}: no module of class {architecture.layer_class} in {type(model).__name__}"
        )
    layers = []
    for index, (name, _) in enumerate(found):
        block = architecture.build(View(f"{name}.", {}, settings))
        layers.append(Layer(index, name, block, LiveParams(model, block.parameters()), taps(block)))
    return Reading(architecture, tuple(layers), text_config)


def taps(block: Component) -> tuple[Tap, ...]:
    """Group consecutive leaves that one module computes."""
    groups: list[tuple[str, list[Path]]] = []
    for path, leaf in leaves(block):
        module = leaf.module
        if not module:
            continue
        if groups and groups[-1][0] == module and groups[-1][1][-1][:-1] == path[:-1]:
            groups[-1][1].append(path)
        else:
            groups.append((module, [path]))
    return tuple(Tap(module, tuple(paths)) for module, paths in groups)
