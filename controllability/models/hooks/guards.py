"""What would go unpatched, without a word, while a patch is on a model as hooks: noticed, and refused: the weights are the unpatched ones."""

import sys
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from architectures.reading import Layer, Tap
from controllability.errors import PatchError
from controllability.interfaces import Path
from controllability.models.hooks.installation import HookStack

INSTEAD = "mp.applied(model, as_weights=True) or mp.merge(model) puts the patch into the weights themselves"
READERS = ("__deepcopy__", "__reduce_ex__", "state_dict", "save_pretrained")


def refuse_readers(installation: HookStack, model: nn.Module, names: Iterable[str]) -> None:
    """Until the installation is undone, refuse copies and files of the modules ``names`` and of all around them, and casts."""
    for module in map(model.get_submodule, _around(names)):
        for reader in READERS:
            installation.assign(module, reader, _refuse_reader)
        installation.assign(module, "_apply", lambda change, recurse=True, module=module: _unmoved(module, change))


def _refuse_reader(*_: Any, **__: Any) -> Any:
    raise PatchError(
        "a patch is applied at the moment: a copy of the model, or a file of it, would keep its hooks; leave the context "
        f"before copying; {INSTEAD}"
    )


@torch.no_grad()
def _unmoved(module: nn.Module, change: Any) -> nn.Module:
    """In place of ``module._apply``: ``to``, ``half``, ``cuda`` and the like are let through where they change nothing."""
    held = (getattr(value, "stored", value) for value in (*module.parameters(), *module.buffers()))
    if any(change(value) is not value for value in held):
        raise PatchError("a patch is applied at the moment: leave its context before the model is cast or moved")
    return module


def refuse_bypassed(layer: Layer, taps: Iterable[Tap], seen: Container[Path]) -> None:
    """Raise ``PatchError`` where the layer ran and one of ``taps`` is not among the outlets that were ``seen``."""
    for tap in taps:
        if tap.outlet not in seen:
            raise PatchError(
                f"layer {layer.index} ({layer.name}) ran, and {tap.module} was not called: something computes with its weight itself "
                f"(a fused forward), so a patch of it can neither be solved nor have an effect as hooks; {INSTEAD}"
            )


class Calls:
    """Counts the calls of the patched layers; a module around them that ran must have called one."""

    def __init__(self, installation: HookStack, model: nn.Module, layers: Iterable[str]) -> None:
        self.ran, self.parts = dict.fromkeys(layers, 0), dict(model.named_modules())
        for name in self.ran:
            installation.before(model.get_submodule(name), self._beginner(name))
        for name in _around(self.ran) - {*self.ran}:
            installation.after(model.get_submodule(name), self._ender(name, model.get_submodule(name)))

    def _beginner(self, name: str) -> Any:
        first = name == next(iter(self.ran))

        def begins(_: Any) -> None:
            self.ran[name] += 1
            for part in (name, *self.parts) if first else ():
                if self.parts[part].training:
                    raise PatchError(
                        f"{part or 'the model'} is in training mode: dropout counts; call model.eval() first"
                    )
            if first and "torch.utils.checkpoint" in _callers():
                raise PatchError(
                    "activation checkpointing runs the layers again in backward, when the patch may be off: leave it out; or keep "
                    f"forward and backward in one context of weights: {INSTEAD}"
                )

        return begins

    def _ender(self, name: str, module: nn.Module) -> Any:
        inside, before = [part for part in self.ran if not name or part.startswith(f"{name}.")], [0]

        def ended(_: Any, __: Any) -> None:
            count, before[0] = before[0], sum(map(self.ran.__getitem__, inside))
            if before[0] == count and not getattr(vars(module).get("forward"), "ours", False):
                raise PatchError(
                    f"{name or 'the model'} ran, and {inside[0]} was not called, nor any other patched layer: it computes past its "
                    f"modules (a fused or replaced forward), so the patch had no effect; {INSTEAD}"
                )

        return ended


def _around(names: Iterable[str]) -> set[str]:
    """These modules and all that contain them; "" is the model."""
    return {".".join(parts[:i]) for name in names for parts in [name.split(".")] for i in range(len(parts) + 1)}


def _callers() -> Iterator[str]:
    """The modules whose functions are running, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back
