"""The modules of a model by name: listed quickly, and refused where accelerate keeps their weights elsewhere."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from controllability.errors import BadInput


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, in its order, without a generator inside a generator for every level.

    Whoever looks for changes lists them before every step.

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


def refuse_training(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> None:
    """Raise ``BadInput`` for a model with a module in training mode.  ``modules`` are the model's by name, if they are known."""
    for name, module in modules_of(model) if modules is None else modules:
        if module.training:
            which = f"module {name}" if name else "the model"
            raise BadInput(f"{which} is in training mode: call model.eval() first, dropout would make runs differ")


def refuse_offloaded(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> None:
    """Raise ``BadInput`` for a model of which ``accelerate`` keeps weights elsewhere between their uses.

    Between two forward passes such a weight is on the meta device: there is nothing to compare, to merge into or to
    take a fingerprint of.  Weights that stay on several devices are no obstacle.  ``modules`` are the model's by name,
    for who has listed them already.

    >>> refuse_offloaded(nn.Linear(2, 2))
    """
    for name, module in modules_of(model) if modules is None else modules:
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            if not getattr(hook, "offload", False):
                continue
            held = next((n for n, p in module.named_parameters() if p.is_meta), "")
            what = f"parameter {name}.{held}".replace("..", ".") if held else f"module {name or 'the model'}"
            raise BadInput(
                f"{what} is offloaded: between two forward passes its weights are kept on the CPU or on disk, and here is "
                "only an empty one (device meta). Load the model with its weights on devices: a device_map without "
                '"cpu" beside accelerators and without "disk", a smaller dtype, or a quantised model. Nothing was changed'
            )


def refuse_fully_sharded(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ``BadInput`` for a model that FSDP2 (``fully_shard``) has spread: between its forward passes no process holds a whole weight."""
    for name, module in modules:
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise BadInput(
                f"module {name or 'the model'} is spread by fully_shard (FSDP2), which holds whole weights only while it runs: load "
                "the model with tensor parallelism (DistributedConfig(tp_size=…)), or patch it before fully_shard. Nothing was changed"
            )


def _hooks(hook: Any) -> Iterator[Any]:
    """The hooks that accelerate has put on a module, which may be several in one."""
    if hook is None:
        return
    if inner := getattr(hook, "hooks", ()):
        for part in inner:
            yield from _hooks(part)
    else:
        yield hook
