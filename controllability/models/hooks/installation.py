"""Hooks on a model's own modules, undone to the last bit; and which patches a model carries."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

WRAPPED = ("base_model", "model", "module")  # where wrappers keep what they wrap


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output: the tensor itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states a module was called with: its first argument, or ``hidden_states``."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What ``module`` was called with, by the names of its forward's parameters; what was left out is not there.

    A wrapper that only hands on (``*args, **kwargs``) is asked for what it wraps.
    """
    signature = inspect.signature(module.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.pop(name, ()):
            inner = next((m for m in (getattr(module, n, None) for n in WRAPPED) if isinstance(m, nn.Module)), None)
            return bound if inner is None or inner is module else arguments(inner, args, kwargs)
    return bound


def on_its_device(module: nn.Module, value: Any) -> Any:
    """A module's input as the module gets it: accelerate moves it to the module's device, but after torch's hooks."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return value
    device = getattr(hook, "execution_device", None)
    return value if device is None or not isinstance(value, Tensor) else value.to(device)


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


class HookStack:
    """Hooks and exchanged attributes of one context; ``undo`` restores every bit, whatever happened.

    What is to be undone is noted before it is done, and undoing it twice does no harm: so Ctrl-C may come anywhere.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> "HookStack":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def before(self, module: nn.Module, hook: Callable[[Tensor], None], name: str = "") -> None:
        """Call ``hook(first argument)``, or with the argument ``name``, before every forward of ``module``."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = arguments(module, args, kwargs).get(name) if name else first_argument(args, kwargs)
            hook(on_its_device(module, given))

        self._pre_hook(module, call)

    def called(self, module: nn.Module, hook: Callable[[dict[str, Any]], None]) -> None:
        """Call ``hook`` with all arguments by name before every forward of ``module``."""

        self._pre_hook(module, lambda _, args, kwargs: hook(arguments(module, args, kwargs)))

    def after(self, module: nn.Module, hook: Callable[[Tensor, Any], Any]) -> None:
        """Call ``hook(first argument, output)`` after every forward; what it returns replaces the output.

        Hooks of ours run in their order before those of others, which so see what the module is to give.
        """

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return hook(on_its_device(module, first_argument(args, kwargs)), output)

        self._hook(module, call)

    def disturb(self, module: nn.Module, change: Callable[[Any], Any]) -> None:
        """Let ``module`` work on ``change`` of its first argument, or of ``hidden_states``."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {k: change(v) if k == "hidden_states" else v for k, v in kwargs.items()}

        self._pre_hook(module, call)

    def again(self, module: nn.Module, between: Callable[[], None]) -> None:
        """After a forward of ``module`` call ``between`` and run it again on the same arguments: that output counts.

        The first run is given a copy of the cache: what it adds is not there when the second one comes.
        """
        kept: list[Any] = []

        def copied(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kept[:] = args, kwargs
            own = lambda value: copy.deepcopy(value) if hasattr(value, "get_seq_length") else value  # noqa: E731
            return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> Any:
            between()
            return module.forward(*kept[0], **kept[1])

        self._pre_hook(module, copied)
        self._hook(module, call)

    def _pre_hook(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._undo.append(lambda: _unhook(call, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))
        module.register_forward_pre_hook(call, with_kwargs=True)

    def _hook(self, module: nn.Module, call: Callable[..., Any]) -> None:
        vars(call)["ours"] = True
        self._undo.append(lambda: _unhook(call, module._forward_hooks, module._forward_hooks_with_kwargs))
        module.register_forward_hook(call, with_kwargs=True)
        hooks: Any = module._forward_hooks  # in their order
        for key in reversed([key for key, hook in hooks.items() if getattr(hook, "ours", False)]):
            hooks.move_to_end(key, last=False)

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
