"""Making a model's own modules compute with W + ΔW, and watching what they compute.

A matrix gets its low-rank term added at its module's output; a vector parameter is exchanged for
the patched one.  Nothing else is touched, and everything is undone on exit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from controllability.arrays import arithmetic
from controllability.deltas import LowRank, Shift
from controllability.errors import PatchError
from controllability.models.pairing import Rows


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output: the tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def refuse_compiled(model: nn.Module) -> None:
    """Raise ``PatchError`` for a compiled model: torch ignores hooks added after compilation."""
    for name, module in model.named_modules():
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module.forward, "_torchdynamo_orig_callable"):
            where = f"module {name}" if name else "the model"
            raise PatchError(
                f"{where} is compiled with torch.compile, which ignores hooks added afterwards: "
                "patch the uncompiled model (for torch.compile(model) that is model._orig_mod), "
                "or merge a patch of scope 'last' before compiling"
            )


def low_rank_output(y: Tensor, x: Tensor, delta: LowRank, rows: Rows | None) -> Tensor:
    """W x + ΔW x at a module: ``y`` (B, T, out) is what it computed from ``x`` (B, T, in).

    With ``rows`` each row has its own patch; without, one patch (or one a sample) serves all positions.
    The term is added in float32 or better and rounded once.
    """
    xp = arithmetic(y)
    if rows is not None:
        changed = xp.lift(rows.of(y)) + delta.effect(xp.lift(rows.of(x)))
        return rows.put(y, changed.to(y.dtype))
    return (xp.lift(y) + per_sample(delta).effect(xp.lift(x))).to(y.dtype)


def per_sample(delta: LowRank) -> LowRank:
    """A (B, rank, n) delta made to broadcast over (B, T, n) states; one sample serves any batch."""
    if delta.left.ndim == 2:
        return delta
    if delta.left.shape[0] == 1:
        return delta.row(0)
    return delta.row((slice(None), None))


def patched_vector(stored: Tensor, delta: Shift, rows: Rows | None) -> Tensor:
    """The patched vector parameter: (n,) for one patch, (B, 1, n) for one a sample, (B, T, n) for one a row."""
    xp = arithmetic(stored)
    value = (xp.lift(stored) + delta.value).to(stored.dtype)
    if rows is not None:
        batch, length = rows.shape
        if value.ndim == 3:  # the stored vector is per position itself: another patch is applied
            value = rows.of(value)
        return rows.put(stored.expand(batch, length, stored.shape[-1]), value)
    if value.ndim == 1 or value.ndim == 3:
        return value
    return value[0] if value.shape[0] == 1 else value[:, None]


class Installation:
    """Hooks and exchanged parameters of one context; ``undo`` restores every bit, whatever happened."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._originals: list[tuple[nn.Module, str, Any]] = []

    def before(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
        """Call ``hook(module, args)`` before every forward of ``module``."""
        self._handles.append(module.register_forward_pre_hook(hook))

    def after(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        """Call ``hook(module, args, output)`` after every forward; what it returns replaces the output."""
        self._handles.append(module.register_forward_hook(hook))

    def exchange(self, module: nn.Module, attribute: str, value: Tensor) -> None:
        """Let ``module`` hold ``value`` in place of a parameter, until ``undo``.

        The entry of ``_parameters`` is replaced, as ``torch.func.functional_call`` does: a value with
        token axes is not a ``Parameter``, and the order of the entries must not change.
        """
        self._originals.append((module, attribute, module._parameters[attribute]))
        module._parameters[attribute] = value  # type: ignore[assignment]

    def undo(self) -> None:
        """Remove the hooks and put the parameters back, the latest first."""
        while self._handles:
            self._handles.pop().remove()
        while self._originals:
            module, attribute, value = self._originals.pop()
            module._parameters[attribute] = value


# ----------------------------------------------------------------- which patches a model carries


@dataclass
class Carried:
    """One patch on a model: applied for a while (with its installation) or merged (without)."""

    patch_id: str
    installation: Installation | None


@dataclass
class Load:
    """Everything that is on one model.  The lock lets one thread at a time solve, apply or merge."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    patches: list[Carried] = field(default_factory=list)


_LOADS: weakref.WeakKeyDictionary[nn.Module, Load] = weakref.WeakKeyDictionary()
_LOADS_LOCK = threading.Lock()


def load_of(model: nn.Module) -> Load:
    """What is on ``model``, and its lock."""
    with _LOADS_LOCK:
        return _LOADS.setdefault(model, Load())


def carried(model: nn.Module) -> tuple[str, ...]:
    """The ids of the patches that are applied to or merged into ``model``, in order."""
    return tuple(item.patch_id for item in load_of(model).patches)


def anything_applied(model: nn.Module) -> bool:
    """Whether a patch is applied (not merged) at the moment."""
    return any(item.installation is not None for item in load_of(model).patches)


def carry(model: nn.Module, patch_id: str, installation: Installation | None) -> None:
    """Note that ``model`` now carries a patch."""
    load_of(model).patches.append(Carried(patch_id, installation))


def put_down(model: nn.Module, patch_id: str) -> bool:
    """Undo an applied patch; False if patches above it had to be undone as well, to restore every bit."""
    patches = load_of(model).patches
    if patch_id not in (item.patch_id for item in patches):
        return True  # undone already, by a context that was left out of order
    in_order = patches[-1].patch_id == patch_id
    while patches:
        top = patches.pop()
        if top.installation is not None:
            top.installation.undo()
        if top.patch_id == patch_id:
            break
    return in_order


def drop(model: nn.Module, patch_id: str) -> None:
    """Note that a merged patch is out again."""
    patches = load_of(model).patches
    patches[:] = [item for item in patches if item.patch_id != patch_id]
