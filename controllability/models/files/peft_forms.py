"""How PEFT reaches each patched parameter: a LoRA beside a module, a LoRA on a parameter, a whole module, or not.

Everything that PEFT 0.21 does differently from one module to the next is said here, once:

- ``target_modules`` wraps a ``Linear`` or ``Conv1D`` and adds B A x to its output, so the module's forward must be theirs;
- ``target_parameters`` wraps the module that holds a 2-D or 3-D parameter and adds the dense ΔW while it runs.  Wrappers
  nest, the parameter registered last outermost, and each adds ``.base_layer`` to the names inside;
- stacked experts keep lora_A expert by expert, (experts · rank, ·), and lora_B rank by rank, (·, rank · experts).
  Which of the two sides of the stored matrices goes into A hangs on the module's ``is_transposed``;
- vectors have no LoRA form: ``modules_to_save`` keeps a copy of the whole module;
- names are matched by their ends.

And the tensors of an adapter: deltas in the layout of lora_A and lora_B, and back.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.errors import PatchError
from controllability.interfaces import Param
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form
from controllability.models.transformers_parts import is_conv1d

# PEFT takes these for the per-expert matrices of transformers 4, in models whose experts are stacked now
TAKEN_FOR_EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def forms_of(model: nn.Module, entries: Iterable[Entry]) -> dict[str, Form]:
    """Parameter name -> its form, for every parameter that the entries move.

    >>> import torch
    >>> from controllability.deltas import LowRank
    >>> from controllability.interfaces import Param
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> forms_of(model, [Entry(Param("0.weight"), LowRank(torch.ones(1, 2), torch.ones(1, 3)))])["0.weight"].kind
    'module'
    """
    entries = list(entries)
    names = list(dict.fromkeys(entry.param.name for entry in entries))
    whole = {e.module for e in entries if isinstance(e.delta, Shift) or len(_shape(model, e.param.name)) not in (2, 3)}
    stacked = any(parameter.ndim > 2 for parameter in model.parameters())
    found = {name: _form(model, name, whole, stacked) for name in names}
    return {name: _named(model, name, form, found) for name, form in found.items()}


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute == "weight" and plain_linear(module) == "out_in":  # weights of 4 bits are packed
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    stored = module._parameters.get(attribute)
    return () if stored is None else tuple(stored.shape)


def _form(model: nn.Module, name: str, whole: set[str], stacked: bool) -> Form:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    shape = _shape(model, name)
    if why := _unreachable(model, path, module, attribute):
        return Form("none", shape, why=why)
    if path in whole:
        within = next((n for n, _ in module.named_children()), None)
        why = f"a vector in module {path}, which holds others ({within}, …): PEFT could only save all of them"
        return Form("dense", shape) if within is None else Form("none", shape, why=why)
    plain = plain_linear(module)
    if plain and attribute == "weight" and not (stacked and path.rpartition(".")[2] in TAKEN_FOR_EXPERTS):
        return Form("module", shape, swapped=plain == "in_out")
    return Form("parameter", shape, swapped=len(shape) == 3 and bool(getattr(module, "is_transposed", False)))


def plain_linear(module: nn.Module) -> str:
    """How a module stores the matrix of y = W x + b, if that is all it does: 'out_in', 'in_out', or ''."""
    forward = type(module).forward
    quantised = type(module).__module__.startswith("bitsandbytes.")  # the same map from packed weights
    if isinstance(module, nn.Linear) and (quantised or forward is nn.Linear.forward):
        return "out_in"
    return "in_out" if is_conv1d(module) else ""


def _unreachable(model: nn.Module, path: str, module: nn.Module, attribute: str) -> str:
    if module._parameters.get(attribute) is None:
        return "it is no parameter of its module, and PEFT reaches nothing else"
    if not path:
        return "it lies in the model itself, which PEFT cannot wrap"
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is module and name != path]
    if names:
        return f"module {path} is also {names[0]}, and PEFT would reach one of them only"
    alike = [name for name, _ in model.named_modules() if name.endswith(f".{path}")]
    if alike:
        return f"PEFT matches names by their ends and would also reach module {alike[0]}"
    return ""


def _named(model: nn.Module, name: str, form: Form, forms: dict[str, Form]) -> Form:
    """The form with its key: each wrapper around a module adds '.base_layer' to what is inside it."""
    path, _, attribute = name.rpartition(".")
    wrapped = [other.rpartition(".")[::2] for other, f in forms.items() if f.kind == "parameter"]
    key, walked = "", ""
    for part in path.split("."):
        key = f"{key}.{part}" if key else part
        walked = f"{walked}.{part}" if walked else part
        if walked != path:
            key += ".base_layer" * sum(owner == walked for owner, _ in wrapped)
    if form.kind == "parameter":
        order = list(model.get_submodule(path)._parameters)
        later = [a for owner, a in wrapped if owner == path and order.index(a) > order.index(attribute)]
        key += ".base_layer" * len(later)
    return Form(form.kind, form.shape, form.swapped, key, form.why)


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
