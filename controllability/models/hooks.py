"""Hooks on a model's own modules, undone to the last bit; and which patches a model carries."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from controllability.errors import PatchError


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output: the tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states a module was called with: its first argument, or ``hidden_states``."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Tensor:
    """What ``module`` was called with for the parameter ``name`` of its forward."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments[name]


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


class Installation:
    """Hooks and exchanged attributes of one context; ``undo`` restores every bit, whatever happened."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Callable[[Tensor], None], name: str = "") -> None:
        """Call ``hook(first argument)``, or with the argument ``name``, before every forward of ``module``."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hook(argument(module, args, kwargs, name) if name else first_argument(args, kwargs))

        self._handles.append(module.register_forward_pre_hook(call, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[[Tensor, Any], Any]) -> None:
        """Call ``hook(first argument, output)`` after every forward; what it returns replaces the output."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return hook(first_argument(args, kwargs), output)

        self._handles.append(module.register_forward_hook(call, with_kwargs=True))

    def assign(self, owner: Any, attribute: str, value: Any) -> None:
        """Let ``owner`` hold ``value`` under ``attribute`` of its own dictionary, until ``undo``."""
        held = vars(owner)
        missing = object()
        original = held.get(attribute, missing)

        def back() -> None:
            if original is missing:
                held.pop(attribute, None)
            else:
                held[attribute] = original

        self._undo.append(back)
        held[attribute] = value

    def finally_do(self, action: Callable[[], None]) -> None:
        """Run ``action`` on ``undo``, the latest first."""
        self._undo.append(action)

    def exchange(self, module: nn.Module, attribute: str, value: Tensor) -> None:
        """Let ``module`` hold ``value`` in place of a parameter, until ``undo``.

        The entry of ``_parameters`` is replaced, as ``torch.func.functional_call`` does: the value is not a
        ``Parameter``, and the order of the entries must not change.
        """
        original = module._parameters[attribute]
        self._undo.append(lambda: module._parameters.__setitem__(attribute, original))
        module._parameters[attribute] = value  # type: ignore[assignment]

    def undo(self) -> None:
        """Remove the hooks and put the parameters back, the latest first."""
        while self._handles:
            self._handles.pop().remove()
        while self._undo:
            self._undo.pop()()


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
