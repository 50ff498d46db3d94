"""torch tensors; torch is imported when the first tensor is seen, not before."""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from controllability.arrays.base import Arithmetic, Array

KERNELS = ("silu", "relu", "relu6", "leaky_relu", "hardswish", "mish", "gelu")  # of torch.nn.functional


@contextmanager
def plain_numbers(*devices: str, wide: bool = False) -> Iterator[None]:
    """Autocast off on these kinds of devices, new tensors in float32 on the CPU: only what differs is changed.

    ``wide`` says that float64 is as good a default: some float64 models need it.
    """
    import torch

    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if default != torch.float32 and not (wide and default == torch.float64):
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
        yield


class TorchArithmetic(Arithmetic):
    """torch tensors of any dtype on any device; solving happens in float32 or better."""

    kind = "torch"

    def machine_epsilon(self, x: Array) -> float:
        return float(self.torch.finfo(x.dtype).eps)

    def own_modes(self, x: Array) -> AbstractContextManager[None]:
        return plain_numbers(x.device.type)

    @functools.cached_property
    def torch(self) -> Any:
        import torch

        return torch

    def array(self, values: Any, like: Array | None = None) -> Array:
        if like is None:
            return self.torch.as_tensor(values)
        return self.torch.as_tensor(values, dtype=like.dtype, device=like.device)

    def numbers(self, x: Array) -> Any:
        return x.detach().double().cpu().numpy()

    def lift(self, x: Array) -> Array:
        return x.float() if x.dtype in (self.torch.float16, self.torch.bfloat16) else x

    def as_stored(self, x: Array, like: Array, side: int = 0) -> Array:
        near = x.to(like.dtype)
        if side:
            beyond = near.nextafter(self.torch.full_like(near, side * math.inf))
            near = self.torch.where((near.to(x.dtype) - x) * side < 0, beyond, near)
        return near.to(x.dtype)

    def function(self, name: str, x: Array) -> Array:
        return getattr(x, name)() if hasattr(x, name) else getattr(math, name)(x)

    def minimum(self, x: Array, bound: Any) -> Array:
        return x.clamp(max=float(bound))

    def maximum(self, x: Array, bound: Any) -> Array:
        return x.clamp(min=float(bound))

    def top(self, x: Array, k: int) -> Array:
        return x.topk(k, dim=-1).indices.sort(-1).values

    def identity(self, n: int, like: Array) -> Array:
        return self.torch.eye(n, dtype=like.dtype, device=like.device)

    def solve(self, matrix: Array, right: Array) -> Array:
        return self.torch.linalg.solve(matrix, right)

    def take(self, x: Array, index: Array) -> Array:
        return x.gather(-1, index)

    def only(self, x: Array, index: Array, other: Any) -> Array:
        kept = self.torch.zeros_like(x, dtype=self.torch.bool).scatter(-1, index, True)
        return x.masked_fill(~kept, other)

    def routed(self, x: Array, weights: Array, index: Array) -> Array:
        # one product for each expert that is used: gathering W[index] would copy whole matrices
        flat, where = x.reshape(-1, x.shape[-1]), index.broadcast_to(x.shape[:-1]).reshape(-1)
        dtype = self.torch.promote_types(x.dtype, weights.dtype)
        y = flat.new_zeros(flat.shape[0], weights.shape[1], dtype=dtype)
        for expert in where.unique().tolist():
            rows = (where == expert).nonzero()[:, 0]
            y[rows] = self.linear(flat[rows], weights[expert])
        return y.reshape(*x.shape[:-1], weights.shape[1])

    def sigmoid(self, x: Array) -> Array:
        return x.sigmoid()

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        return self.torch.where(condition, a, b)

    def zeros_like(self, x: Array) -> Array:
        return self.torch.zeros_like(x)

    def or_one(self, x: Array) -> Array:
        return x.masked_fill(x == 0, 1)

    def max(self, x: Array) -> Array:
        return x.amax(-1, keepdim=True)

    def largest(self, x: Array) -> Array:
        return self.torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True)

    def mean(self, x: Array) -> Array:
        return x.mean(-1, keepdim=True)

    def min(self, x: Array) -> Array:
        return x.amin(-1, keepdim=True)

    def linear(self, x: Array, weight: Array) -> Array:
        dtype = self.torch.promote_types(x.dtype, weight.dtype)
        return self.torch.nn.functional.linear(x.to(dtype), weight.to(dtype))

    def matmul(self, a: Array, b: Array) -> Array:
        dtype = self.torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype) @ b.to(dtype)

    def activation(self, name: str, x: Array) -> Array | None:
        functional = self.torch.nn.functional
        tanh = functools.partial(functional.gelu, approximate="tanh")
        kernel = tanh if name == "gelu_tanh" else getattr(functional, name, None) if name in KERNELS else None
        return kernel(x) if kernel else None

    def concatenate(self, parts: list[Array], axis: int) -> Array:
        return self.torch.cat(parts, dim=axis)

    def to_float(self, x: Array) -> Any:
        return float(x)
