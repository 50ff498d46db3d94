"""Writing a patch into the weights, what rounding costs there, and putting the originals back to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from architectures import quantised
from controllability.deltas import Delta, ExpertLowRank, Shift
from controllability.errors import PatchError
from controllability.interfaces import Param
from controllability.models.hooks.carried_patches import (
    anything_applied,
    carried,
    carry,
    drop,
    state_of_model,
    uncompiled,
)
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHook, LayerHooks
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import State, same_again, state_of
from controllability.models.reading.heads import Result, Runs, compare_results, without_logits
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.effects import with_tensors
from controllability.models.sweep.fallbacks import Plan, with_reader_of_last_layer
from controllability.models.sweep.layer_sweep import Sweeper
from controllability.models.sweep.report import Rounding
from controllability.models.sweep.target_run import observe_target, silent


def merge(patch: PatchRecord, model: nn.Module, corrected: bool = False) -> int:
    """Write the patch into the weights; returns how many bytes the kept originals take.  See ``ModelPatch.merge``."""
    if patch._merged_into is not None:
        raise PatchError("this patch is merged already: unmerge it first")
    patch.refuse_several("merged into one set of weights")
    with state_of_model(model).lock:
        return _merge(patch, model, corrected)


def _merge(patch: PatchRecord, model: nn.Module, corrected: bool) -> int:
    model = uncompiled(model)
    patch.refuse_misuse(model)
    if anything_applied(model):
        raise PatchError("a patch is applied at the moment: leave its context before merging")
    refuse_quantised(model, patch.entries)
    refuse_shared(model, patch.entries)
    originals: dict[str, Tensor] = {}
    rounding: list[Rounding] = []
    patch._before_merge = state_of(model)
    try:
        for entry in solved_again(patch, model) if corrected else patch.entries:
            stored = model.get_parameter(entry.param.name)
            originals.setdefault(entry.param.name, stored.detach().clone())
            rounding.append(write(stored, entry.param, entry.delta))
    except BaseException as error:
        restore(model, originals, patch._before_merge)
        if isinstance(error, RuntimeError):  # inference tensors, expanded weights
            why = str(error).splitlines()[0]
            raise PatchError(f"the weights cannot be written to: {why}; nothing was changed") from None
        raise
    patch._originals, patch._merged_into = originals, model
    patch.report = replace(patch.report, rounding=rounding)
    patch._merged_state = state_of(model)
    carry(model, patch.id, None, patch.parameters)
    return sum(t.numel() * t.element_size() for t in originals.values())


def unmerge(patch: PatchRecord, model: nn.Module) -> None:
    """Put the original weights back, bit for bit.  See ``ModelPatch.unmerge``."""
    model = uncompiled(model)
    with state_of_model(model).lock:
        if patch._merged_into is not model:
            raise PatchError("this patch is not merged into this model")
        if carried(model)[-1:] != (patch.id,):
            raise PatchError("another patch was applied or merged after this one: undo that first")
        now = state_of(model)
        changed = [name for name in patch._originals if now.get(name) != patch._merged_state.get(name)]
        if changed:
            raise PatchError(f"parameter {changed[0]} changed since the merge: unmerging would overwrite that")
        restore(model, patch._originals, patch._before_merge)
        patch._originals, patch._merged_into = {}, None
        drop(model, patch.id)


def solved_again(patch: PatchRecord, model: nn.Module) -> Iterator[Entry]:
    """The entries of a patch of one set of weights, each layer's solved when it is asked for.  (new)

    A patch is solved from what the model computes; written into half precision it computes something else, and the
    layers behind were not made for that.  Whoever writes the entries into ``model`` before asking for more gets layers
    that make good what rounding did before them; what is left is the last one's own.  Costs one target run, and one
    source run a layer.  Raises ``SideConditionFailed`` where a layer's numbers changed too much.
    """
    inputs = patch.inputs
    checked = checked_reading(model, inputs["target"])
    jointly = patch.scope == "all"
    reading, proofs = checked.reading, checked.proofs(patch.report.via, patch.report.route, jointly)
    source_rows, target_rows = pair_positions(
        inputs["target"], inputs["source"], patch.scope, inputs["positions"], checked.codebooks, checked.length
    )
    joint = patch.joint
    if joint is not None and jointly:
        joint = with_reader_of_last_layer(joint, model, checked, inputs["target"])
    with LayerHooks(model, reading) as hooks:
        targets, _ = observe_target(hooks, without_cache(model, inputs["target"]), target_rows, silent)
    source = without_cache(model, inputs["source"])
    derivations = {layer.index: layer.derivation for layer in patch.report.layers}
    plan = Plan(proofs, patch.scope, joint, [derivations.get(i, 0) for i in range(len(proofs))])
    for layer, calls in zip(reading.layers, targets, strict=True):
        if not calls:
            continue  # this input does not reach it
        solver = plan.solver(layer, 0, calls[0], source_rows)
        sweeper, installation = Sweeper(layer, [solver], lambda _: None), HookStack()
        try:
            LayerHook(model, layer, sweeper, installation, sequence_first=reading.architecture.sequence_first)
            model(**source)
        finally:
            installation.undo()
        yield from (Entry(param, delta, layer.index) for param, delta in solver.deltas().items())


@dataclass(frozen=True)
class MergedError:
    """A merged model against the target run, at the paired positions: errors relative unless called logit errors.

    ``applied`` is the error of the sweep itself, whose patch was not rounded and whose layers make good
    for each other; ``top1`` the share of positions whose first choice is the target's.
    """

    relative_error: float
    max_logit_error: float
    applied: float
    top1: float

    def __str__(self) -> str:
        return (
            f"merged: relative error {self.relative_error:.2g} (applied: {self.applied:.2g}), largest logit error "
            f"{self.max_logit_error:.2g}, first choice as in the target at {self.top1:.0%} of the positions"
        )


@torch.no_grad()
def merged_error(patch: PatchRecord, model: nn.Module) -> MergedError:
    """Run the merged model on the patch's own source and hold it against the target run's logits.

    Raises ``PatchError`` when the patch is not merged into ``model``, or was loaded: the target's logits are not saved.
    """
    if patch._merged_into is not uncompiled(model):
        raise PatchError("this patch is not merged into this model: merge it first")
    if patch.output is None or patch.target_output is None:
        raise PatchError("a loaded patch does not hold the target's logits: compare with `controllability verify`")
    source = patch.inputs["source"]
    with Runs(model, without_logits(model, [source])) as run:
        found = run(source)
    found, applied, wanted = (_at_pairs(x, patch) for x in (found, patch.output, patch.target_output))
    merged, swept = compare_results(wanted, found, applied)
    return MergedError(merged.relative_error, merged.max_logit_error, swept.relative_error, merged.top1_agreement)


def _at_pairs(result: Result, patch: PatchRecord) -> Result:
    """The paired positions; the target's are kept there already, unless every position has a pair."""
    return result.at(patch.rows) if result.held.shape[:2] == patch.rows.shape else result


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
def write(stored: Tensor, param: Param, delta: Delta) -> Rounding:
    """stored += ΔW in place, summed in a wider dtype and rounded once; returns what rounding cost.

    In blocks of rows, so that no second matrix is held.
    """
    delta = with_tensors(delta, lambda held: held.to(stored.device))
    stored = stored[param.index] if param.index else stored
    loss, size = Loss(), float(delta.norms().double().square().sum()) ** 0.5
    if isinstance(delta, Shift):
        value = delta.value.reshape(-1, stored.shape[-1])[0]
        exact = stored.to(wider(stored.dtype)) + value
        stored.copy_(exact)
        loss.block(stored - exact, exact, None)
    elif isinstance(delta, ExpertLowRank):
        matrices = stored.view(delta.experts, -1, stored.shape[-1])
        one = delta.row(0) if delta.left.ndim > 3 else delta
        for slot, expert in enumerate(one.index.tolist()):
            _add(matrices[expert], one.left[slot], one.right[slot], delta.transposed, loss)
    else:
        left, right = (f.reshape(-1, f.shape[-1]) for f in (delta.left, delta.right))
        _add(stored, left, right, delta.transposed, loss)
    return loss.of(str(param), size)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a sum is exact enough to see what rounding it to ``dtype`` costs."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _add(stored: Tensor, left: Tensor, right: Tensor, transposed: bool, loss: Loss) -> None:
    dtype = wider(stored.dtype)
    left, right = left.to(dtype), right.to(dtype)
    x = right[0] if len(right) == 1 else None  # a multiple of the input that the patch was solved for
    rows, columns = (right, left) if transposed else (left, right)
    for start in range(0, stored.shape[0], 1024):
        block = stored[start : start + 1024]
        exact = block.to(dtype) + rows[:, start : start + 1024].T @ columns
        block.copy_(exact)
        lost = block - exact
        if transposed:
            loss.block(lost.T, exact.T, None if x is None else x[start : start + 1024])
        else:
            loss.block(lost, exact, x)
    loss.finish(summed=transposed)


@torch.no_grad()
def restore(model: nn.Module, originals: dict[str, Tensor], before: State) -> None:
    """Put the originals back into the parameters, in place: the model is in the state ``before`` again."""
    for name, value in originals.items():
        model.get_parameter(name).copy_(value)
    same_again(model, originals, before)


@dataclass
class Loss:
    """Adds up, block by block, what one parameter loses."""

    squares: float = 0.0
    missed: float | None = None
    _miss: list[Tensor] = field(default_factory=list)
    _reach: list[Tensor] = field(default_factory=list)

    def block(self, lost: Tensor, exact: Tensor, x: Tensor | None) -> None:
        """E and W + ΔW of some rows (or of a vector), and the input of the map, if it had but one."""
        self.squares += float(lost.double().square().sum())
        if x is not None:
            self._miss.append(lost @ x)
            self._reach.append(exact @ x)

    def finish(self, summed: bool) -> None:
        """A matrix is done: its blocks' effects are parts of one vector, or (stored transposed) terms of a sum."""
        if not self._miss:
            return
        miss, reach = (torch.stack(parts).sum(0) if summed else torch.cat(parts) for parts in (self._miss, self._reach))
        largest = float(reach.abs().max())
        if largest:
            self.missed = max(self.missed or 0.0, float(miss.abs().max()) / largest)
        self._miss, self._reach = [], []

    def of(self, parameter: str, size: float) -> Rounding:
        """The result; ``size`` is ‖ΔW‖."""
        return Rounding(parameter, self.squares**0.5 / size if size else 0.0, self.missed)
