"""Writing a patch into the weights, and putting the originals back to the last bit."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor, nn

from architectures import quantised
from controllability.arrays.sharded import here
from controllability.deltas import Delta, ExpertLowRank, Shift
from controllability.errors import PatchError
from controllability.interfaces import Param
from controllability.models.hooks.carried_patches import TO_STAY, anything_applied, carry, state_of_model, uncompiled
from controllability.models.hooks.installation import HookStack, finishing
from controllability.models.hooks.layer_hooks import LayerHook, LayerHooks
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applier import Entry, entries_of
from controllability.models.patches.measured import before_merging, warn_if_fragile
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import Look, look_at, same_again
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.layer_sweep import LayerSweep, Sweeper
from controllability.models.sweep.report import Rounding
from controllability.models.sweep.source_run import Plan, with_reader_of_last_layer
from controllability.models.sweep.target_run import observe_target, silent

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


def solve_again(patch: PatchRecord, model: nn.Module, put: Callable[[Entry], None]) -> None:
    """Hand each layer's entries to ``put``, which writes them into ``model``, before the next layer is solved.  (new)

    A patch is solved from what the model computes; written into half precision it computes something else, and the layers behind were
    not made for that.  Here each one is solved on top of the rounded weights before it, in one target run and one source run.
    A layer runs twice: solved, and with its new weights.  Raises ``SideConditionFailed`` where a layer's numbers
    changed too much.
    """
    inputs = patch.inputs
    checked = checked_reading(model, inputs["target"], patch.report.place)
    jointly = patch.scope == "all"
    reading, proofs = checked.reading, checked.proofs(patch.report.via, patch.report.route, jointly)
    both, how = (inputs["target"], inputs["source"]), (inputs["positions"], checked.codebooks, checked.length)
    source_rows, target_rows = pair_positions(*both, patch.scope, *how)
    joint = patch.joint
    if joint is not None and jointly:
        joint = with_reader_of_last_layer(joint, model, checked, inputs["target"])
    with LayerHooks(model, reading) as hooks:
        targets, _ = observe_target(hooks, without_cache(model, inputs["target"]), target_rows, silent)
    derivations = {layer.index: layer.derivation for layer in patch.report.layers}
    plan = Plan(proofs, patch.scope, joint, [derivations.get(i, 0) for i in range(len(proofs))], metrics=patch.metrics)
    with HookStack() as installation:
        for layer, calls in zip(reading.layers, targets, strict=True):
            if not calls or not plan.moves(layer.index):
                continue  # this input does not reach it, or it is not patched
            solver = plan.solver(layer, 0, calls[0], source_rows)
            sweeper, watched = Sweeper(layer, [solver], lambda _: None), HookStack()
            installation.finally_do(watched.undo)
            LayerHook(model, layer, sweeper, watched, sequence_first=reading.architecture.sequence_first)
            installation.again(model.get_submodule(layer.end), _written(watched, solver, put))
        model(**without_cache(model, inputs["source"]))


def _written(watched: HookStack, solver: LayerSweep, put: Callable[[Entry], None]) -> Callable[[], None]:
    """Writes what a layer's run has solved; in the run with the new weights nobody listens."""

    def write() -> None:
        watched.undo()
        for entry in entries_of([solver]):
            put(entry)

    return write


def merge(patch: PatchRecord, model: nn.Module, corrected: bool | None = None, measured: bool = True) -> int:
    """Write the patch into the weights; returns how many bytes the kept originals take.  See ``ModelPatch.merge``."""
    model, inference = uncompiled(model), torch.is_inference_mode_enabled()
    with own_modes(model), patch._lock:
        if patch._merged_into is not None:
            raise PatchError("this patch is merged already: unmerge it first")
        patch.refuse_several("merged into one set of weights")
        patch.refuse_misuse(model)
        if anything_applied(model):
            raise PatchError("a patch is applied at the moment: leave its context before merging")
        refuse_quantised(model, patch.entries)
        stored = {entry.param.name: model.get_parameter(entry.param.name) for entry in patch.entries}
        refuse_unwritable(stored, inference)
        refuse_shared(model, patch.entries)
        known = bool(patch.inputs.get("target"))  # an imported adapter has no target
        if corrected and not known:
            raise PatchError("an adapter that was imported has no target to be corrected for: use corrected=False")
        if corrected is None:
            corrected = known and any(weight.dtype in HALF for weight in stored.values())
        before = None
        if measured and known:
            warn_if_fragile(patch, "merging", model)
            before = before_merging(patch, model)
        size = _merge(patch, model, stored, corrected)
        if before is not None:
            before.compare(patch, model)
        return size


def _merge(patch: PatchRecord, model: nn.Module, stored: dict[str, nn.Parameter], corrected: bool) -> int:
    originals: dict[str, Tensor] = {}
    rounding: list[Rounding] = []
    patch._before_merge = look_at(model)

    def put(entry: Entry) -> None:
        weight = stored[entry.param.name]
        originals.setdefault(entry.param.name, weight.detach().clone())
        try:
            with torch.inference_mode(weight.is_inference()):
                rounding.append(write(weight, entry.param, entry.delta, entry.reads))
        except RuntimeError as error:
            if torch.equal(weight, originals[entry.param.name]):
                del originals[entry.param.name]  # to put it back would fail as well
            why = str(error).splitlines()[0]
            raise PatchError(f"parameter {entry.param.name} cannot be written to: {why}; nothing was changed") from None

    try:
        if corrected:
            solve_again(patch, model, put)
        else:
            for entry in patch.entries:
                put(entry)
    except BaseException:
        finishing(lambda: restore(model, originals, patch._before_merge))
        raise
    patch._originals, patch._merged_into = originals, model
    patch.report = replace(patch.report, rounding=rounding)
    patch._merged_state = look_at(model)
    carry(model, patch.id, None, patch.parameters, weakref.ref(patch))
    return sum(t.numel() * t.element_size() for t in originals.values())


def unmerge(patch: PatchRecord, model: nn.Module) -> None:
    """Put the original weights back, bit for bit.  See ``ModelPatch.unmerge``."""
    model = uncompiled(model)
    with own_modes(model), patch._lock:
        if patch._merged_into is not model:
            raise PatchError(
                f"this patch is not merged into this model; only the object that was merged holds the originals; {TO_STAY}"
            )
        on_it = state_of_model(model).patches
        if not on_it or on_it[-1].patch_id != patch.id:
            raise PatchError("another patch was applied or merged after this one: undo that first")
        now, merged = look_at(model).tensors, patch._merged_state.tensors
        changed = [name for name in patch._originals if now.get(name) != merged.get(name)]
        if changed:
            raise PatchError(f"parameter {changed[0]} changed since the merge: unmerging would overwrite that")
        finishing(lambda: restore(model, patch._originals, patch._before_merge))
        patch._originals, patch._merged_into = {}, None
        on_it.pop()


@contextmanager
def as_weights(patch: PatchRecord, model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the patch is in the weights themselves.  See ``ModelPatch.applied``."""
    with state_of_model(model).lock:
        merge(patch, model, measured=False)
        try:
            yield model
        finally:
            state_of_model(model).lock.hand_over()
            unmerge(patch, model)


def finalize_merges(model: nn.Module) -> int:
    """Let the weights with all patches that are merged into ``model`` be its own: their originals are let go, for good.

    Says how many patches that were.  The model is then like any other; the patch objects are not needed, and those that are
    left can no longer be unmerged.  Raises ``PatchError`` while a patch is applied.  Source: new.

    >>> # mp.merge(model); del mp; ct.finalize_merges(model)
    """
    model = uncompiled(model)
    with state_of_model(model).lock:
        if anything_applied(model):
            raise PatchError("a patch is applied at the moment: leave its context before making merges final")
        merged = state_of_model(model).patches
        for patch in filter(None, (item.record() for item in merged if item.record is not None)):
            patch._originals, patch._merged_into = {}, None
        count = len(merged)
        merged.clear()
        return count


def refuse_unwritable(stored: dict[str, nn.Parameter], inference: bool) -> None:
    """Raise ``PatchError`` for a parameter that torch does not let be written to, or that holds a number in two places.

    ``inference`` says whether the caller is inside of ``torch.inference_mode``.
    """
    for name, weight in stored.items():
        if weight.is_inference() and not inference:
            raise PatchError(
                f"parameter {name} was made inside of torch.inference_mode() and cannot be written to outside: load the model "
                "outside of it, or merge inside of it; nothing was changed"
            )
        reach = 0  # of the axes with smaller steps
        for step, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
            if size > 1 and step <= reach:
                raise PatchError(
                    f"parameter {name} is expanded: several of its entries are one number in memory; "
                    "store a copy (weight.contiguous()), or use applied(); nothing was changed"
                )
            reach += step * (size - 1)


def refuse_quantised(model: nn.Module, entries: tuple[Entry, ...]) -> None:
    """Raise ``PatchError`` where a patched parameter is quantised: a sum would have to be rounded to its few levels."""
    for entry in entries:
        if quantised.kind(model.get_parameter(entry.param.name)):
            raise PatchError(
                f"parameter {entry.param.name} is quantised, and the patch cannot be written into its few levels: use "
                "applied(), which computes the patch beside the layer, or export it as an adapter; nothing was changed"
            )


def refuse_shared(model: nn.Module, entries: tuple[Entry, ...]) -> None:
    """Raise ``PatchError`` where a patched parameter is used under another name: merging would change that use too."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    here_held = [(n, here(v)) for n, v in held if v.numel()]
    spans = [(v.data_ptr(), v.data_ptr() + v.numel() * v.element_size(), n) for n, v in here_held]
    known = {n: (start, end) for start, end, n in spans}
    for name in dict.fromkeys(entry.param.name for entry in entries):
        start, end = known[name]
        others = [n for s, e, n in spans if n != name and s < end and start < e]
        if others:
            raise PatchError(
                f"parameter {name} is also {', '.join(others)}: merging would change that as well; use applied()"
            )


def restore(model: nn.Module, originals: dict[str, Tensor], before: Look) -> None:
    """Put the originals back into the parameters, in place: the model is in the state ``before`` again."""
    for name, value in originals.items():
        weight = model.get_parameter(name)
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.copy_(value)
    same_again(model, originals, before)
