"""A parameter that tells what it computed: for one leaf inside a module that goes on with the result.

A router computes its logits, the scores and the choice in one forward, so a hook on the module comes
too late.  Its weight is exchanged for one that hands every ``linear(x, W)`` to a listener; so is a bias or a
scale, with ``x + b`` and ``x * m``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Listener = Callable[[Tensor, Tensor], Tensor]

_LINEAR = torch.nn.functional.linear
_ELEMENTWISE = {torch.Tensor.add, torch.Tensor.mul, torch.add, torch.mul}
_CASTS = {
    torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.to,
    torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.contiguous, torch.Tensor.detach,
}  # fmt: skip


class TellingWeight(torch.Tensor):
    """A parameter, sharing its storage, that gives ``listener(x, y)`` for y = ``linear(x, W)``, ``x + b`` or ``x * m``.

    >>> import torch
    >>> torch.ones(2) + TellingWeight.of(torch.zeros(2), lambda x, y: 10 * y)
    tensor([10., 10.])
    """

    listener: Listener
    # the parameter itself, without a listener: gradients go there, in whatever mode the listener was put on
    stored: Tensor

    @staticmethod
    def of(base: Tensor, listener: Listener) -> "TellingWeight":
        """``base`` with a listener; if it has one already, that one is told first."""
        if isinstance(base, TellingWeight):
            earlier, base = base.listener, base.stored
            told = lambda x, y: listener(x, earlier(x, y))  # noqa: E731
        else:
            told = listener
        weight = base.as_subclass(TellingWeight)
        weight.listener, weight.stored = told, base
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in kwargs.items()})
        if func in _CASTS and args and isinstance(args[0], cls) and isinstance(result, Tensor):
            return cls.of(result, args[0].listener)
        if func is _LINEAR:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        elif func in _ELEMENTWISE and len(args) > 1:
            x, weight = args[:2] if isinstance(args[1], cls) else args[1::-1]
        else:
            return result
        same = func is _LINEAR or (isinstance(x, Tensor) and x.shape == result.shape)
        return weight.listener(_plain(x), result) if isinstance(weight, cls) and same else result


def _plain(value: Any) -> Any:
    return value.stored if isinstance(value, TellingWeight) else value
