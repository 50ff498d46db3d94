"""The tensors of an adapter: deltas in the layout of lora_A and lora_B, and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from controllability.deltas import Delta, ExpertLowRank, LowRank
from controllability.errors import PatchError
from controllability.interfaces import Param
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form


class Factors(NamedTuple):
    """rowsᵀ columns, added to a stored matrix (m, n): ``rows`` (r, m), ``columns`` (r, n); or to that of one expert."""

    rows: Tensor
    columns: Tensor
    expert: int | None = None


def lora_tensors(entries: Sequence[Entry], form: Form, least: int = 1) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) of one parameter from all deltas on it, zeros up to rank ``least``; their scaling is 1."""
    found = [factors for entry in entries for factors in _factors(entry, form.shape)]
    like = found[0].rows
    count = form.shape[0] if len(form.shape) == 3 else 1
    planes = [[f for f in found if (f.expert or 0) == expert] for expert in range(count)]
    rank = max(least, *(sum(len(f.rows) for f in plane) for plane in planes))
    rows, columns = (like.new_zeros(count, rank, size) for size in form.shape[-2:])
    for expert, plane in enumerate(planes):
        start = 0
        for f in plane:
            rows[expert, start : start + len(f.rows)] = f.rows
            columns[expert, start : start + len(f.rows)] = f.columns
            start += len(f.rows)
    a, b = (rows, columns) if form.swapped else (columns, rows)
    return a.reshape(count * rank, -1), b.permute(2, 1, 0).reshape(b.shape[2], rank * count)


def rank_of(lora_a: Tensor, form: Form) -> int:
    """The rank that PEFT is told: per expert where they are stacked."""
    return lora_a.shape[0] // (form.shape[0] if len(form.shape) == 3 else 1)


def lora_factors(lora_a: Tensor, lora_b: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """(rows (…, r, m), columns (…, r, n)) of the stored parameter; experts, if any, lead.  Undoes ``lora_tensors``.

    Raises ``PatchError`` where the tensors do not fit the parameter.
    """
    count = form.shape[0] if len(form.shape) == 3 else 1
    m, n = form.shape[-2:]
    a_size, b_size = (m, n) if form.swapped else (n, m)
    fits = lora_a.ndim == lora_b.ndim == 2 and (lora_a.shape[1], lora_b.shape[0]) == (a_size, b_size)
    if not fits or lora_a.shape[0] != lora_b.shape[1] or not lora_a.shape[0] or lora_a.shape[0] % count:
        raise PatchError(
            f"lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} do not fit the model's {tuple(form.shape)}"
        )
    a = lora_a.reshape(count, -1, a_size)
    b = lora_b.reshape(b_size, -1, count).permute(2, 1, 0)
    rows, columns = (a, b) if form.swapped else (b, a)
    return (rows, columns) if len(form.shape) == 3 else (rows[0], columns[0])


def _factors(entry: Entry, shape: tuple[int, ...]) -> list[Factors]:
    """A delta of one set of weights, in the orientation in which its parameter is stored, padded to its size."""
    delta, index = entry.delta, entry.param.index
    assert isinstance(delta, LowRank)
    if not isinstance(delta, ExpertLowRank):
        left, right = (f.reshape(-1, f.shape[-1]) for f in (delta.left, delta.right))
        rows, columns = (right, left) if delta.transposed else (left, right)
        return [Factors(_placed(rows, index, 0, shape[-2]), _placed(columns, index, 1, shape[-1]))]
    one = delta.row(0) if delta.left.ndim > 3 else delta
    found = []
    for slot, expert in enumerate(one.index.tolist()):
        rows, columns = (one.right, one.left) if delta.transposed else (one.left, one.right)
        if len(shape) == 3:
            place, rest = range(shape[0])[index[0]][expert] if index else expert, index[1:]
            placed = _placed(rows[slot], rest, 0, shape[1]), _placed(columns[slot], rest, 1, shape[2])
            found.append(Factors(*placed, place))
        else:  # (experts · rows, columns): one block of rows an expert
            block = rows.shape[-1]
            whole = rows.new_zeros(rows.shape[-2], block * delta.experts)
            whole[:, expert * block : (expert + 1) * block] = rows[slot]
            found.append(Factors(_placed(whole, index, 0, shape[0]), _placed(columns[slot], index, 1, shape[1])))
    return found


def _placed(factor: Tensor, index: tuple[slice, ...], axis: int, size: int) -> Tensor:
    """A factor of a slice as one of the whole axis, zero elsewhere."""
    if len(index) <= axis:
        return factor
    whole = factor.new_zeros(len(factor), size)
    whole[:, index[axis]] = factor
    return whole


def low_rank(param: Param, rows: Tensor, columns: Tensor, transposed: bool, experts: int | None) -> Delta:
    """The delta of ``param`` (maybe a slice of the stored parameter) from factors of the whole, one row of tokens.

    ``experts`` is how many lie stacked: in a leading axis of the factors, or in blocks of rows.  Those that nothing
    is added to are left out.
    """
    if experts is None:
        rows, columns = _cut(rows, param.index, 0), _cut(columns, param.index, 1)
        left, right = (columns, rows) if transposed else (rows, columns)
        return LowRank(left[None], right[None], transposed)
    if rows.ndim == 2:
        rows = rows.reshape(len(rows), experts, -1).transpose(0, 1)
        columns = columns[None].expand(experts, -1, -1)
    elif param.index:
        some, rest = param.index[0], param.index[1:]
        rows, columns = _cut(rows[some], rest, 0), _cut(columns[some], rest, 1)
    moved = ((rows != 0).any(-1) & (columns != 0).any(-1)).any(-1).nonzero()[:, 0]
    rows, columns = rows[moved], columns[moved]
    left, right = (columns, rows) if transposed else (rows, columns)
    return ExpertLowRank(left[None].contiguous(), right[None].contiguous(), transposed, moved[None], experts)


def _cut(factor: Tensor, index: tuple[slice, ...], axis: int) -> Tensor:
    return factor[..., index[axis]] if len(index) > axis else factor


def split_dense(change: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """(rows, columns) of a difference (…, m, n) of matrices with entries up to ``size``: what rises above rounding."""
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    floor = size * max(change.shape[-2:]) * torch.finfo(change.dtype).eps
    rank = max(1, int((s > floor).sum(-1).max()))
    rows = (u * s[..., None, :])[..., :rank].transpose(-1, -2)
    return rows.to(change.dtype).contiguous(), v[..., :rank, :].to(change.dtype).contiguous()
