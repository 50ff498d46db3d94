"""Weights that a layer keeps quantised: the numbers they stand for, and what they are stored as.

Known are linear layers of torchao (tensor subclasses that can dequantise themselves) and of bitsandbytes (8 and
4 bits).  What such a layer computes is seen at its hooks as in any other, so a patch is put beside it; the numbers
are only needed to hold the reading against the module, and for norms in reports.  Neither library is imported
before a model has brought it along.

On processors that compute with bfloat16 (AVX512-BF16) the first forward of a 4-bit layer of bitsandbytes packs its weight
anew, for good: the same levels in another order, their scales rounded to bfloat16.  Such a weight is read as it lies, from
copies: what bitsandbytes itself has to unpack one (``state_dict`` uses it) does so in place and rounds the scales again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from typing import Any

from controllability.arrays import Array
from controllability.errors import BadInput

# types in which weights are stored packed or scaled: 8 bits and fewer
_PACKED = re.compile(r"torch\.(q?u?int[1-8](x\d+)?|qint32|float[48]_\w+|bits\w+)")


def packed(value: Any) -> bool:
    """Whether a tensor holds small integers or 8-bit numbers: not what a layer computes with, but parts of it.

    >>> import torch
    >>> packed(torch.zeros(2, dtype=torch.int8)), packed(torch.zeros(2))
    (True, False)
    """
    return bool(_PACKED.fullmatch(str(value.dtype)))


def kind(value: Any) -> str:
    """How a parameter is quantised: "torchao", "bitsandbytes 8" or "bitsandbytes 4"; "" for any other tensor."""
    if hasattr(type(value), "__tensor_flatten__"):
        plain = import_module("torch").Tensor
        return "torchao" if type(value).dequantize is not plain.dequantize else ""
    if type(value).__name__ == "Params4bit" and getattr(value, "quant_state", None) is not None:
        return "bitsandbytes 4"
    return "bitsandbytes 8" if type(value).__name__ == "Int8Params" and packed(value) else ""


def shape(value: Any) -> tuple[int, ...]:
    """The shape of the matrix that a parameter stands for; four-bit weights are stored in another one."""
    return tuple(value.quant_state.shape if kind(value) == "bitsandbytes 4" else value.shape)


def stand_in(value: Any) -> Array:
    """An array without numbers, of the shape of the matrix that a parameter stands for."""
    return import_module("torch").empty(shape(value), device="meta")


def dtype(value: Any) -> Any:
    """The type of the numbers that a parameter stands for."""
    form = kind(value)
    if form == "bitsandbytes 8":
        return import_module("torch").float32  # integers times the float32 scale of their row
    if form == "bitsandbytes 4":
        state = value.quant_state
        return state.original_dtype if _repacked(state) else state.dtype
    return value.dtype


def dequantised(module: Any, value: Any, name: str) -> Array:
    """The numbers that a quantised parameter of ``module``, called ``name``, stands for, as a new tensor."""
    form = kind(value)
    if form == "torchao":
        return value.dequantize().detach()  # detaching such a weight itself fails in inference mode
    if form == "bitsandbytes 4":
        return import_module("bitsandbytes.functional").dequantize_4bit(*_in_order(value, name))
    return value.data.float() * (_row_scales(module, value).float() / 127)[:, None]


def _row_scales(module: Any, value: Any) -> Any:
    """The scale of each row of an 8-bit matrix, which moves from the parameter to the module in the first forward."""
    own = getattr(value, "SCB", None)
    return own if own is not None else module.state.SCB


def _repacked(state: Any) -> bool:
    """Whether a four-bit weight is packed for a processor that computes with bfloat16."""
    return getattr(state, "packing_format_for_cpu", False)


def _in_order(value: Any, name: str) -> tuple[Any, Any]:
    """A four-bit weight and its state as ``dequantize_4bit`` takes them; copies, if it is packed for the processor."""
    if not _repacked(value.quant_state):
        return value.data, value.quant_state
    library = import_module("bitsandbytes.functional")
    unpack = getattr(library, "_convert_weight_packed_for_cpu_inverse", None)
    if unpack is None:
        raise BadInput(
            f"parameter {name} was packed by bitsandbytes for this processor in its first forward, and the installed "
            "bitsandbytes cannot unpack it: its numbers cannot be read; take bitsandbytes 0.50. Nothing was changed"
        )
    state = copy(value.quant_state)
    state.original_nested = False  # else the scales would be rounded to 8 bits again
    scales = state.absmax.T.reshape(-1).float()
    levels, state = unpack(value.data, state)
    state.absmax = scales
    return levels, state


def as_run(module: Any, value: Any) -> Any:
    """A parameter as its layer computes with it: itself, or a copy of it as the first forward will pack it.

    ``to_come`` of the copy's pieces is the version that torch will count for them.
    """
    awaited = kind(value) == "bitsandbytes 4" and getattr(module, "support_avx512bf16_for_cpu", False)
    if not awaited or value.device.type != "cpu" or _repacked(value.quant_state):
        return value
    pack = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu
    try:
        levels, state = pack(value.data, copy(value.quant_state))
    except (AssertionError, RuntimeError):  # a shape that cannot be packed: nor can the layer's forward
        return value
    packed_one = type(value)(levels, requires_grad=False, quant_state=state, bnb_quantized=True)
    packed_one.to_come = 0 if value.is_inference() else value._version
    state.absmax.to_come = 0
    return packed_one


def beside(value: Any) -> Any:
    """A four-bit parameter anew around the same tensors: that it is unpacked in place leaves the first one alone."""
    other = copy(value)
    other.quant_state = copy(value.quant_state)
    return other


@contextmanager
def kept(module: Any) -> Iterator[None]:
    """After this context four-bit weights are packed as they were before it, also where ``state_dict`` unpacked them."""
    four_bits = [p for p in module.parameters() if kind(p) == "bitsandbytes 4" and _repacked(p.quant_state)]
    states = [(value, value.data, value.quant_state, dict(vars(value.quant_state))) for value in four_bits]
    try:
        yield
    finally:
        for value, data, state, held in states:
            value.data, value.quant_state = data, state
            vars(state).clear()
            vars(state).update(held)


def pieces(name: str, module: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain tensors that a parameter consists of, each with a name: itself, if it is a plain one.

    >>> import torch
    >>> [name for name, _ in pieces("up.weight", None, torch.zeros(2))]
    ['up.weight']
    """
    form = kind(value)
    if form == "torchao":
        for inner in value.__tensor_flatten__()[0]:
            yield from pieces(f"{name}.{inner}", module, getattr(value, inner))
        return
    yield name, value
    if form == "bitsandbytes 8":
        yield f"{name}.SCB", _row_scales(module, value)
    if form == "bitsandbytes 4":
        state, path = value.quant_state, name
        while True:
            yield f"{path}.absmax", state.absmax
            yield f"{path}.code", state.code
            if not state.nested:
                return
            yield f"{path}.offset", state.offset
            state, path = state.state2, f"{path}.nested"


def settings(value: Any) -> str:
    """What besides its tensors decides what a quantised parameter stands for, and how its layer computes with it."""
    form = kind(value)
    if form == "torchao":
        return f"{type(value).__name__} {tuple(value.shape)} {value.__tensor_flatten__()[1]}"
    if form == "bitsandbytes 4":
        return f"{value.quant_state.quant_type} {shape(value)} {dtype(value)} {value.quant_state.blocksize}"
    return form
