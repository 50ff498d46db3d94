"""W + ΔW as a parameter can hold it, and what the rounding costs.  (new)"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from controllability.arrays.sharded import here
from controllability.deltas import Delta, ExpertLowRank, Shift
from controllability.errors import PatchError
from controllability.interfaces import Param
from controllability.models.sweep.report import Rounding

HALF = (torch.float16, torch.bfloat16)
ROWS = 1024  # of a matrix that are written at a time: no second matrix is held


@torch.no_grad()
def write(stored: Tensor, param: Param, delta: Delta, reads: Tensor | None = None) -> Rounding:
    """stored += ΔW in place, summed in a wider dtype and rounded once; returns what rounding cost.

    ``reads`` (in,) is the input that a matrix was solved for, where there is one.  Raises ``PatchError``, when it is written, for
    a sum that is not finite.
    """
    delta = delta.mapped(lambda held: held.to(stored.device))
    stored = stored[param.index] if param.index else stored
    loss, size = Loss(), float(delta.norms().double().square().sum()) ** 0.5
    if isinstance(delta, Shift):
        exact = stored.to(wider(stored.dtype)) + delta.value.reshape(-1, *stored.shape)[0]
        stored.copy_(exact)
        loss.squares = float((stored - exact).double().square().sum())
    elif isinstance(delta, ExpertLowRank):
        matrices = stored.view(delta.experts, -1, stored.shape[-1])
        one = delta.row(0) if delta.left.ndim > 3 else delta
        for slot, expert in enumerate(one.index.tolist()):
            own = one.right[slot][0] if len(one.right[slot]) == 1 else None  # a multiple of its input
            _add(matrices[expert], one.left[slot], one.right[slot], delta.transposed, own, loss)
    else:
        left, right = (f.reshape(-1, f.shape[-1]) for f in (delta.left, delta.right))
        _add(stored, left, right, delta.transposed, reads, loss)
    if not isfinite(loss.squares):
        raise PatchError(
            f"parameter {param} would not be finite: W + ΔW leaves the range of {str(stored.dtype).removeprefix('torch.')} "
            f"(up to {torch.finfo(stored.dtype).max:.2g}); use applied(), or a model in a wider dtype"
        )
    return Rounding(str(param), loss.squares**0.5 / size if size else 0.0, loss.missed)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a sum is exact enough to see what rounding it to ``dtype`` costs."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _add(stored: Tensor, left: Tensor, right: Tensor, transposed: bool, x: Tensor | None, loss: "Loss") -> None:
    """W += leftᵀ right, a block of rows at a time; W is a view, (out, in), of what is stored."""
    matrix, dtype = stored.T if transposed else stored, wider(stored.dtype)
    left, right = left.to(dtype), right.to(dtype)
    x = None if x is None else x.to(stored.device, dtype)
    misses, reached = [], []
    rows = ROWS if here(matrix) is matrix else matrix.shape[0]  # a part of what is split over devices would be a copy
    for start in range(0, matrix.shape[0], rows):
        block = matrix[start : start + rows]
        exact = block.to(dtype) + left[:, start : start + rows].T @ right
        block.copy_(exact)
        if x is not None:
            wanted = exact @ x
            misses.append((block.to(dtype) @ x - wanted).abs().max())
            reached.append(wanted.abs().max())
        loss.squares += float((block - exact).double().square().sum())
    if x is not None and float(size := torch.stack(reached).max()):
        loss.missed = max(loss.missed or 0.0, float(torch.stack(misses).max() / size))


@dataclass
class Loss:
    """What one parameter loses: Σ E² of what was stored less W + ΔW, and the largest part of an output that is missed."""

    squares: float = 0.0
    missed: float | None = None
