"""Which patches a model carries, in what order, and whose turn it is."""

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from controllability.errors import BadInput, PatchError
from controllability.models.hooks.installation import HookStack, finishing


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile(model)``; any other model as it is.  Raises ``BadInput`` for what is no model."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model must be a torch module, got {type(model).__name__}")
    while isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
        model = inside
    return model


TO_STAY = "ct.finalize_merges(model) makes the weights of a merge that is to stay the model's own"


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


class ModelLock:
    """One thread at a time on one model, as often as it likes; meanwhile torch runs everything uncompiled.

    Another thread may leave what one has entered: web frameworks hand a context from worker to worker.
    """

    _uncompiled = _Uncompiled()

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.current_thread()  # not its number, which the next thread may get
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, me))
            self._owner, self._depth = me, self._depth + 1
        try:
            self._uncompiled.__enter__()
        except BaseException:
            self._release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._uncompiled.__exit__()
        finally:
            self._release()

    def hand_over(self) -> None:
        """The calling thread owns what another has entered."""
        with self._changed:
            self._owner = threading.current_thread()

    def _release(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify()


@dataclass
class AppliedPatch:
    """One patch on a model: applied for a while (with its installation) or merged (without)."""

    patch_id: str
    installation: HookStack | None
    parameters: frozenset[str] = frozenset()
    record: Callable[[], Any] | None = None  # of a merged one: itself, while somebody holds it


@dataclass(eq=False)
class ModelState:
    """Everything that is on one model.  The lock lets one thread at a time solve, apply or merge.

    ``same_again`` knows of versions of parameters (by id) whose bits are those of an earlier one: a merge was undone.
    """

    lock: ModelLock = field(default_factory=ModelLock)
    patches: list[AppliedPatch] = field(default_factory=list)
    same_again: dict[tuple[int, int], int] = field(default_factory=dict)


_LOADS: weakref.WeakKeyDictionary[nn.Module, ModelState] = weakref.WeakKeyDictionary()
_LOADS_LOCK = threading.Lock()


def state_of_model(model: nn.Module) -> ModelState:
    """What is on ``model``, and its lock: one for all models that share a module with parts, as a model and its base do.

    A compiled model and the one inside it are the same.
    """
    model = uncompiled(model)
    with _LOADS_LOCK:
        if (state := _LOADS.get(model)) is None:
            shared = [module for module in model.modules() if module._modules or module is model]
            known = [found for module in shared if (found := _LOADS.get(module)) is not None]
            state = known[0] if known else ModelState()
            parts = {id(found): found for found in known if found is not state}  # by themselves so far
            for other in parts.values():
                state.patches += other.patches
                state.same_again |= other.same_again
            for module in shared:
                _LOADS[module] = state
        return state


def carried(model: nn.Module) -> tuple[str, ...]:
    """The ids of the patches that are applied to or merged into ``model``, in order."""
    return tuple(item.patch_id for item in state_of_model(model).patches)


def anything_applied(model: nn.Module) -> bool:
    """Whether a patch is applied (not merged) at the moment."""
    return any(item.installation is not None for item in state_of_model(model).patches)


def carry(
    model: nn.Module, patch_id: str, installation: HookStack | None, parameters: Iterable[str] = (),
    record: Callable[[], Any] | None = None,
) -> None:  # fmt: skip
    """Note that ``model`` now carries a patch of these parameters."""
    state_of_model(model).patches.append(AppliedPatch(patch_id, installation, frozenset(parameters), record))


def refuse_carried(model: nn.Module, doing: str) -> None:
    """Raise ``PatchError`` while patches are on the model, applied or merged."""
    if patches := state_of_model(model).patches:
        kept = "" if patches[0].installation else f"; {TO_STAY}"
        raise PatchError(f"patches are on the model at the moment: leave applied() or unmerge before {doing}{kept}")


def refuse_on_it(model: nn.Module, patch_id: str, parameters: frozenset[str], made_under: tuple[str, ...]) -> None:
    """Raise ``PatchError`` for a patch that was made under ``made_under``, and the model carries something else."""
    on_it = state_of_model(model).patches
    if any(item.patch_id == patch_id for item in on_it):
        raise PatchError("this patch is on the model already: undo it first (leave its context, or unmerge it)")
    count = "1 patch" if len(on_it) == 1 else f"{len(on_it)} patches"
    under = f"{len(made_under)} others" if len(on_it) == len(made_under) else str(len(made_under))
    both = sorted(parameters.intersection(*[item.parameters for item in on_it])) if on_it else []
    more = f" and {len(both) - 1} more" if len(both) > 1 else ""
    shared = f"; {'both' if len(on_it) == 1 else 'they all'} change {both[0]}{more}" if both else ""
    raise PatchError(
        f"the model carries {count} and this one was made while it carried {under}{shared}: a patch is right only on top "
        "of what it was made on; "
        + ("leave those contexts (or unmerge) first, or make this patch inside of them"
           + ("" if on_it[0].installation else f"; {TO_STAY}") if on_it else
           "apply the patch first that was on the model when this one was made, or make this one again")
    )  # fmt: skip


def put_down(model: nn.Module, patch_id: str) -> bool:
    """Undo an applied patch; False if patches above it had to be undone as well, to restore every bit."""
    return finishing(lambda: _put_down(state_of_model(model).patches, patch_id))


def _put_down(patches: list[AppliedPatch], patch_id: str) -> bool:
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
