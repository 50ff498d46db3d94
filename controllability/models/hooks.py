"""Hooks on a model's own modules, undone to the last bit; and which patches a model carries."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from controllability.errors import BadInput, PatchError


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output: the tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states a module was called with: its first argument, or ``hidden_states``."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What ``module`` was called with for the parameter ``name`` of its forward; None where it was left out."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments.get(name)


def on_its_device(module: nn.Module, value: Any) -> Any:
    """A module's input as the module gets it: accelerate moves it to the module's device, but after torch's hooks."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return value
    device = getattr(hook, "execution_device", None)
    return value if device is None or not isinstance(value, Tensor) else value.to(device)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``; any other model as it is."""
    while isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
        model = inside
    return model


T = TypeVar("T")


def finishing(action: Callable[[], T]) -> T:
    """The result of ``action``, which Ctrl-C does not stop: it is raised when the action, begun anew, is through."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            result = action()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
    return result


class _Uncompiled:
    """A context in which torch runs everything uncompiled, in every thread, until the last one has left it.

    torch ignores hooks that are added after compilation, and cannot say of a model whether a compiled copy of it is
    about.  What was compiled is kept: after the context it runs again, without compiling anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                try:
                    self._stance = torch.compiler.set_stance("force_eager")
                except RuntimeError as error:
                    raise PatchError(
                        f"this is inside a function that torch.compile compiles ({error}): patch, apply and merge outside of it"
                    ) from None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            try:
                if self._inside == 1:
                    finishing(lambda: self._stance.__exit__(None, None, None))
            finally:
                self._inside -= 1


class Turn:
    """One thread at a time on one model, as often as it likes; meanwhile torch runs everything uncompiled."""

    _uncompiled = _Uncompiled()

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._uncompiled.__enter__()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._uncompiled.__exit__()
        finally:
            self._lock.release()


class Installation:
    """Hooks and exchanged attributes of one context; ``undo`` restores every bit, whatever happened.

    What is to be undone is noted before it is done, and undoing it twice does no harm: so Ctrl-C may come anywhere.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def before(self, module: nn.Module, hook: Callable[[Tensor], None], name: str = "") -> None:
        """Call ``hook(first argument)``, or with the argument ``name``, before every forward of ``module``."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = argument(module, args, kwargs, name) if name else first_argument(args, kwargs)
            hook(on_its_device(module, given))

        self._undo.append(lambda: _unhook(call, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))
        module.register_forward_pre_hook(call, with_kwargs=True)

    def after(self, module: nn.Module, hook: Callable[[Tensor, Any], Any]) -> None:
        """Call ``hook(first argument, output)`` after every forward; what it returns replaces the output."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return hook(on_its_device(module, first_argument(args, kwargs)), output)

        self._undo.append(lambda: _unhook(call, module._forward_hooks, module._forward_hooks_with_kwargs))
        module.register_forward_hook(call, with_kwargs=True)

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

    def finally_do(self, action: Callable[[], object]) -> None:
        """Run ``action``, which may be run twice, on ``undo``, the latest first."""
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
        """Remove the hooks and put everything back, the latest first."""
        finishing(self._undo_all)

    def _undo_all(self) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


def _unhook(call: Any, hooks: dict[int, Any], with_kwargs: dict[int, Any]) -> None:
    """Take ``call`` out of a module's hooks; by itself, as Ctrl-C may have come before its handle was returned."""
    for key in [key for key, hook in hooks.items() if hook is call]:
        del hooks[key]
        with_kwargs.pop(key, None)


# ----------------------------------------------------------------- which patches a model carries


@dataclass
class Carried:
    """One patch on a model: applied for a while (with its installation) or merged (without)."""

    patch_id: str
    installation: Installation | None
    parameters: frozenset[str] = frozenset()


@dataclass
class Load:
    """Everything that is on one model.  The lock lets one thread at a time solve, apply or merge."""

    lock: Turn = field(default_factory=Turn)
    patches: list[Carried] = field(default_factory=list)


_LOADS: weakref.WeakKeyDictionary[nn.Module, Load] = weakref.WeakKeyDictionary()
_LOADS_LOCK = threading.Lock()


def load_of(model: nn.Module) -> Load:
    """What is on ``model``, and its lock; a compiled model and the one inside it are the same."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model must be a torch module, got {type(model).__name__}")
    with _LOADS_LOCK:
        return _LOADS.setdefault(uncompiled(model), Load())


def carried(model: nn.Module) -> tuple[str, ...]:
    """The ids of the patches that are applied to or merged into ``model``, in order."""
    return tuple(item.patch_id for item in load_of(model).patches)


def anything_applied(model: nn.Module) -> bool:
    """Whether a patch is applied (not merged) at the moment."""
    return any(item.installation is not None for item in load_of(model).patches)


def carry(model: nn.Module, patch_id: str, installation: Installation | None, parameters: Iterable[str] = ()) -> None:
    """Note that ``model`` now carries a patch of these parameters."""
    load_of(model).patches.append(Carried(patch_id, installation, frozenset(parameters)))


def refuse_on_it(model: nn.Module, patch_id: str, parameters: frozenset[str], made_under: tuple[str, ...]) -> None:
    """Raise ``PatchError`` for a patch that was made under ``made_under``, and the model carries something else."""
    on_it = load_of(model).patches
    if any(item.patch_id == patch_id for item in on_it):
        raise PatchError("this patch is on the model already: undo it first (leave its context, or unmerge it)")
    count = "1 patch" if len(on_it) == 1 else f"{len(on_it)} patches"
    under = f"{len(made_under)} others" if len(on_it) == len(made_under) else str(len(made_under))
    both = sorted(parameters.intersection(*[item.parameters for item in on_it])) if on_it else []
    shared = (
        f"; {'both' if len(on_it) == 1 else 'they all'} change {both[0]}"
        + (f" and {len(both) - 1} more" if len(both) > 1 else "")
        if both
        else ""
    )
    raise PatchError(
        f"the model carries {count} and this one was made while it carried {under}{shared}: a patch is right only on top "
        "of what it was made on; "
        + ("leave those contexts (or unmerge) first, or make this patch inside of them" if on_it else
           "apply the patch first that was on the model when this one was made, or make this one again")
    )  # fmt: skip


def put_down(model: nn.Module, patch_id: str) -> bool:
    """Undo an applied patch; False if patches above it had to be undone as well, to restore every bit."""
    return finishing(lambda: _put_down(load_of(model).patches, patch_id))


def _put_down(patches: list[Carried], patch_id: str) -> bool:
    if patch_id not in (item.patch_id for item in patches):
        return True  # undone already, by a context that was left out of order
    in_order = patches[-1].patch_id == patch_id
    while True:
        top = patches[-1]
        if top.installation is not None:
            top.installation.undo()
        patches.pop()
        if top.patch_id == patch_id:
            return in_order


def drop(model: nn.Module, patch_id: str) -> None:
    """Note that a merged patch is out again."""
    patches = load_of(model).patches
    patches[:] = [item for item in patches if item.patch_id != patch_id]
