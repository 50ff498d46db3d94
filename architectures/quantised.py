"""Weights that a layer keeps quantised: the numbers they stand for, and what they are stored as.

Known are linear layers of torchao (tensor subclasses that can dequantise themselves) and of bitsandbytes (8 and
4 bits).  What such a layer computes is seen at its hooks as in any other, so a patch is put beside it; the numbers
are only needed to hold the reading against the module, and for norms in reports.  Neither library is imported
before a model has brought it along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from controllability.arrays import Array

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
    return value.quant_state.dtype if form == "bitsandbytes 4" else value.dtype


def dequantised(module: Any, value: Any) -> Array:
    """The numbers that a quantised parameter of ``module`` stands for, as a new tensor."""
    form = kind(value)
    if form == "torchao":
        return value.dequantize().detach()  # detaching such a weight itself fails in inference mode
    if form == "bitsandbytes 4":
        four_bit = import_module("bitsandbytes.functional")
        return four_bit.dequantize_4bit(value.data, value.quant_state)
    return value.data.float() * (_row_scales(module, value).float() / 127)[:, None]


def _row_scales(module: Any, value: Any) -> Any:
    """The scale of each row of an 8-bit matrix, which moves from the parameter to the module in the first forward."""
    own = getattr(value, "SCB", None)
    return own if own is not None else module.state.SCB


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
        while state is not None:
            yield f"{path}.absmax", state.absmax
            yield f"{path}.code", state.code
            if state.offset is not None:
                yield f"{path}.offset", state.offset
            state, path = state.state2, f"{path}.nested"


def settings(value: Any) -> str:
    """What besides its tensors decides what a quantised parameter stands for, and how its layer computes with it."""
    form = kind(value)
    if form == "torchao":
        return f"{type(value).__name__} {tuple(value.shape)} {value.__tensor_flatten__()[1]}"
    if form == "bitsandbytes 4":
        return f"{value.quant_state.quant_type} {shape(value)} {value.quant_state.dtype} {value.quant_state.blocksize}"
    return form
