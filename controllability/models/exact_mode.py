"""The exact mode: a float64 model that really computes in float64."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
_CONVERTING = frozenset((*_CASTS, torch.Tensor.to, torch.Tensor.type))  # by their first arguments, not by ``dtype=``


def in_exact_mode() -> bool:
    """Whether ``exact_mode`` is on."""
    return torch.ones((), dtype=torch.float64).float().dtype == torch.float64


class exact_mode(TorchFunctionMode):  # noqa: N801 (used like the context managers of torch)
    """Within this context every cast of a tensor to float32 or below goes to float64 instead.

    transformers models compute norms, soft-max, rotary angles and routers in float32 even when
    their parameters are float64; that caps identities at about 1e-7.  With the parameters in float64
    (``model.double()``) and this mode on, they hold to 1e-12 and better.

    >>> import torch
    >>> with exact_mode():
    ...     torch.ones(1, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if not kwargs and func not in _CONVERTING:  # nearly everything, down to each look at a shape
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in _CASTS and args[0].is_floating_point():
            return torch.Tensor.double(args[0])
        if kwargs.get("dtype") in _LOWER:
            kwargs["dtype"] = torch.float64
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _LOWER else a for a in args)
        return func(*args, **kwargs)
