"""All modules of a model by name, listed quickly: whoever looks for changes does so before every step."""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, in its order, without a generator inside a generator for every level.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    >>> modules_of(model) == list(model.named_modules())
    True
    """
    found: dict[nn.Module, str] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        prefix = f"{name}." if name else ""
        waiting += [(prefix + part, child) for part, child in reversed(module._modules.items()) if child is not None]
    return [(name, module) for module, name in found.items()]
