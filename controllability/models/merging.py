"""Writing a patch into the weights, and putting the originals back to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from controllability.deltas import Delta, ExpertLowRank, Shift
from controllability.errors import PatchError
from controllability.interfaces import Param
from controllability.models.applying import Entry, to_device


def refuse_shared(model: nn.Module, entries: tuple[Entry, ...]) -> None:
    """Raise ``PatchError`` where a patched parameter is used under another name: merging would change that use too."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    spans = [(v.data_ptr(), v.data_ptr() + v.numel() * v.element_size(), n) for n, v in held if v.numel()]
    known = {n: (start, end) for start, end, n in spans}
    for name in dict.fromkeys(entry.param.name for entry in entries):
        start, end = known[name]
        others = [n for s, e, n in spans if n != name and s < end and start < e]
        if others:
            raise PatchError(
                f"parameter {name} is also {', '.join(others)}: merging would change that as well; use applied()"
            )


@torch.no_grad()
def write(stored: Tensor, param: Param, delta: Delta) -> None:
    """stored += ΔW in place, summed in float32 or better, in blocks so that no second matrix is held."""
    delta = to_device(delta, stored)
    stored = stored[param.index] if param.index else stored
    if isinstance(delta, Shift):
        value = delta.value.reshape(-1, stored.shape[-1])[0]
        stored.copy_((stored.to(value.dtype) + value).to(stored.dtype))
    elif isinstance(delta, ExpertLowRank):
        matrices = stored.view(delta.experts, -1, stored.shape[-1])
        one = delta.row(0) if delta.left.ndim > 3 else delta
        for slot, expert in enumerate(one.index.tolist()):
            _add(matrices[expert], one.left[slot], one.right[slot], delta.transposed)
    else:
        left, right = (f.reshape(-1, f.shape[-1]) for f in (delta.left, delta.right))
        _add(stored, left, right, delta.transposed)


def _add(stored: Tensor, left: Tensor, right: Tensor, transposed: bool) -> None:
    rows, columns = (right, left) if transposed else (left, right)
    for start in range(0, stored.shape[0], 1024):
        block = stored[start : start + 1024]
        block.copy_((block.to(left.dtype) + rows[:, start : start + 1024].T @ columns).to(stored.dtype))


@torch.no_grad()
def restore(model: nn.Module, originals: dict[str, Tensor]) -> None:
    for name, value in originals.items():
        path, _, attribute = name.rpartition(".")
        stored = model.get_submodule(path)._parameters[attribute]
        assert stored is not None
        stored.copy_(value)
