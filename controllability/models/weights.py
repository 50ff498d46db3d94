"""A weight that tells what it computed: for linear maps inside a module that goes on with the result.

A router computes its logits, the scores and the choice in one forward, so a hook on the module comes
too late.  Its weight is exchanged for one that hands every ``linear(x, W)`` to a listener.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Listener = Callable[[Tensor, Tensor], Tensor]

_LINEAR = torch.nn.functional.linear
_CASTS = {
    torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.to,
    torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.contiguous, torch.Tensor.detach,
}  # fmt: skip


class TellingWeight(torch.Tensor):
    """A matrix W (out, in), sharing its storage, that gives ``listener(x, linear(x, W))`` for ``linear(x, W)``."""

    listener: Listener

    @staticmethod
    def of(base: Tensor, listener: Listener) -> TellingWeight:
        """``base`` with a listener."""
        weight = base.detach().as_subclass(TellingWeight)
        weight.listener = listener
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
            return weight.listener(_plain(x), result) if isinstance(weight, cls) else result
        return result


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, TellingWeight) else value
