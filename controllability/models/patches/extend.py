"""Adding tokens to a patch of scope "all": the earlier tokens' outputs stay, and nothing of theirs is computed again.  And taking some out.

Each steered map keeps an orthonormal basis of what it read; a new token brings the direction that was missing.
Where a norm's scale serves all tokens it is found anew, and the left factors with it (timed apart); the
bases are not.  The source is the growing sequence without the context.  (theory 5, streaming; new)
"""

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import BadInput, NotVerified, PatchError, SideConditionFailed
from controllability.models.hooks.carried_patches import carried, uncompiled
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.applier import entries_of
from controllability.models.patches.record import (
    PLAIN,
    PatchRecord,
    Stream,
    TokenSequence,
    batch_of,
    complete,
    learned_by,
)
from controllability.models.patches.solve import solve
from controllability.models.reading.checked_reading import Checked, checked_reading
from controllability.models.reading.fingerprints import look_at
from controllability.models.reading.inputs import is_causal, refuse_bad_inputs
from controllability.models.reading.model_facts import keeps_cache
from controllability.models.reading.positions import Positions, pair_positions
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.one_pass import BothPasts, pasts_of, solved_in_one_pass
from controllability.models.sweep.records import LayerRecord, joined, record
from controllability.models.sweep.report import LayerReport, Layers
from controllability.models.sweep.source_run import Plan, only_near, refuse_unreached, sweep
from controllability.models.sweep.target_run import observe_target, silent
from controllability.solvers.served_tokens import NotContinued


@dataclass(frozen=True)
class Extension:
    """What one ``extend`` did: ``tokens`` added (``unlearn``: fewer than 0), ``seconds`` in all, of which ``scale_seconds`` on joint scales.

    ``grown`` says that a known sequence went on, whose caches were kept; ``anew`` that everything was solved again.
    """

    tokens: int
    seconds: float
    scale_seconds: float
    grown: bool
    anew: bool


def extend(
    patch: PatchRecord, model: nn.Module, target: Mapping[str, Any], source: Mapping[str, Any], positions: Any = None
) -> Extension:
    """Add one sequence, or the tokens behind a known one, to ``patch``.  See ``ModelPatch.extend``."""
    started = time.perf_counter()
    model = uncompiled(model)
    for role, inputs in (("target", target), ("source", source)):
        _refuse_inputs(inputs, role)
    with own_modes(model), patch._lock:
        stream = _refuse_unfit(patch, model)
        patch.refuse_misuse(model)
        checked = checked_reading(model, place=patch.report.place)
        for role, inputs in (("target", target), ("source", source)):
            refuse_bad_inputs(model, checked, inputs, role)
        step = _Step.of(stream, target, source, positions)
        inputs, rows = batch_of(step.among(stream.sequences))
        try:
            done = _gone_on(patch, model, checked, stream, step)
            if done:
                changed = _changes(patch, model, checked, step, *done, inputs, rows)
            else:
                changed = _anew(patch, model, inputs)
            scales = sum(s.run.journal.scale_seconds for s in done[0]) if done else 0.0
            found = Extension(step.count, time.perf_counter() - started, scales, step.grows, done is None)
            vars(patch).update(changed, extensions=[*patch.extensions, found])  # all of it or, interrupted, nothing
        except BaseException:
            step.known.caches = None  # they hold tokens that the patch does not
            raise
    return found


def unlearn(patch: PatchRecord, model: nn.Module, context: Mapping[str, Any]) -> Extension:
    """Take the sequences behind ``context`` out of ``patch``.  See ``ModelPatch.unlearn``."""
    started = time.perf_counter()
    model = uncompiled(model)
    _refuse_inputs(context, "context")
    with own_modes(model), patch._lock:
        sequences = _refuse_unfit(patch, model).sequences
        patch.refuse_misuse(model)
        kept = [s for s in sequences if not s.stands_behind(context["input_ids"][0].cpu())]
        if len(kept) == len(sequences):
            raise BadInput("unlearn: no sequence of this patch has it as its context")
        if not kept:
            raise BadInput("unlearn: it stands for nothing else: let the patch go")
        before = patch.report.tokens
        changed = _anew(patch, model, batch_of(kept)[0])
        found = Extension(changed["report"].tokens - before, time.perf_counter() - started, 0.0, False, True)
        vars(patch).update(changed, extensions=[*patch.extensions, found])
    return found


def _gone_on(
    patch: PatchRecord, model: nn.Module, checked: Checked, stream: Stream, step: "_Step"
) -> tuple[list[LayerSweep], Any] | None:
    """The new tokens solved for, with what the earlier ones give as it is; None where everything has to be solved anew."""
    if not (stream.goes_on and complete(step.after) and is_causal(model, checked)):
        return None
    try:
        return _solved(patch, model, checked, stream, step, _caches(patch, model, step))
    except (NotContinued, SideConditionFailed, NotVerified):  # solved at once it may be possible, or is refused
        step.known.caches = None
        return None


def _refuse_unfit(patch: PatchRecord, model: nn.Module) -> Stream:
    if patch.scope != "all" or patch.joint is None:
        raise PatchError(f"only a patch of scope 'all' can be extended or unlearn, not one of scope '{patch.scope}'")
    if patch.joint.damping is not None:
        raise PatchError("a fit of a strength is not extended and unlearns nothing: its tokens count by what their own context changes; "
                         "compile another context on top (merge this patch first), and unmerge what is to go")  # fmt: skip
    if patch._merged_into is not None or patch.id in carried(model):
        raise PatchError("this patch is on the model: leave applied() or unmerge before extending or unlearning")
    if patch.stream is None:
        raise PatchError(
            "this patch does not remember its tokens (it was loaded, or made from inputs other than token ids): make it again"
        )
    return patch.stream


def _refuse_inputs(inputs: Mapping[str, Any], role: str) -> None:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise BadInput(f"{role}: give input_ids of one sequence, (1, T)")
    if other := sorted(set(inputs) - set(PLAIN)):
        raise BadInput(f"{role}: a patch is extended by token ids alone; leave out {', '.join(other)}")
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise BadInput(f"{role}: give one sequence without padding")


@dataclass(eq=False)
class _Step:
    """One extension: the sequence as it will be, and which of its positions are new."""

    known: TokenSequence  # as it was; empty for a new one
    after: TokenSequence
    new: Tensor  # (k, 2)
    grows: bool

    @property
    def count(self) -> int:
        """How many tokens are added."""
        return len(self.new)

    def inputs(self, caches: Any, device: torch.device, keep: bool) -> tuple[list[dict[str, Any]], list[Positions]]:
        """(inputs of both runs, their rows of the new tokens), the target's first; what is in ``caches`` is left out."""
        inputs, rows = [], []
        for side, role in ((1, "target"), (0, "source")):
            skip = len(getattr(self.known, role)) if caches else 0
            ids = getattr(self.after, role)[skip:]
            past = {"past_key_values": caches[1 - side]} if caches else {}
            inputs.append({"input_ids": ids[None].to(device)} | past | ({"use_cache": True} if keep else {}))
            positions = self.new[:, side] - skip
            rows.append(Positions(torch.zeros_like(positions), positions, (1, len(ids))))
        return inputs, rows

    def among(self, sequences: list[TokenSequence]) -> list[TokenSequence]:
        """All sequences as they will be."""
        if self.grows:
            return [self.after if s is self.known else s for s in sequences]
        return [*sequences, self.after]

    @staticmethod
    def of(stream: Stream, target: Mapping[str, Any], source: Mapping[str, Any], positions: Any) -> "_Step":
        there, here = (inputs["input_ids"][0].cpu().clone() for inputs in (target, source))
        if positions is None:
            for known in stream.sequences:
                if count := known.new_tokens(there, here):
                    new = torch.arange(count)[:, None] + torch.tensor([len(known.source), len(known.target)])
                    return _Step(known, TokenSequence(there, here, torch.cat([known.pairs, new])), new, True)
        rows, wanted = pair_positions({"input_ids": there[None]}, {"input_ids": here[None]}, "all", positions)
        new = torch.stack([rows.position, wanted.position], -1).long()
        return _Step(TokenSequence(there[:0], here[:0], new[:0]), TokenSequence(there, here, new), new, False)


def _solved(
    patch: PatchRecord, model: nn.Module, checked: Checked, stream: Stream, step: _Step, caches: Any
) -> tuple[list[LayerSweep], Any]:
    """Both runs over the new tokens (over the whole sequence without ``caches``), solving for them."""
    proofs = checked.proofs(patch.report.via, patch.report.route, True)
    derivations = [layer.derivation for layer in _each_layer(patch)]
    device = next(model.parameters()).device
    assert patch.joint is not None
    wish = replace(patch.joint, read_by="norm")  # if that would count, everything is solved anew
    plan = Plan(proofs, "all", wish, derivations, stream.learned, patch.metrics)
    with LayerHooks(model, checked.reading) as hooks, torch.inference_mode():
        if isinstance(caches, BothPasts):
            ids = step.after.source[-step.count :].to(device)
            targets, solvers = solved_in_one_pass(hooks, plan, caches, ids)
            pasts: Any = caches.after(step.count)
        else:
            inputs, (wanted, rows) = step.inputs(caches, device, keeps_cache(model))
            targets, there = observe_target(hooks, inputs[0], wanted, silent)
            solvers, here = sweep(hooks, plan, targets, inputs[1], rows, silent)
            pasts = caches  # which have grown by themselves
    if caches is None and keeps_cache(model):
        with torch.inference_mode():
            pasts = pasts_of(model, there, here, (step.after.target, step.after.source))
    refuse_unreached(solvers)
    if only_near(solvers):
        raise NotContinued("a layer that later ones make good gives its earlier tokens something else now")
    return solvers, pasts


def _each_layer(patch: PatchRecord) -> list[LayerReport | LayerRecord]:
    """One report a layer, of its first call; records where they are there: reports are written when they are read."""
    layers = patch.report.layers
    found: dict[int, Any] = {}
    for layer in layers.records if isinstance(layers, Layers) else layers:
        found.setdefault(layer.index, layer)
    return [found[index] for index in sorted(found)]


def _caches(patch: PatchRecord, model: nn.Module, step: _Step) -> BothPasts | tuple[Any, Any] | None:
    """The caches of the known tokens in both runs; filled once for a sequence that has none, and side by side if that can be."""
    known = step.known
    if not step.grows or not keeps_cache(model):
        return None
    with torch.inference_mode():
        if known.caches is None:
            device = next(model.parameters()).device
            there = model(input_ids=known.target[None].to(device), use_cache=True)
            with applied(patch, model):
                here = model(input_ids=known.source[None].to(device), use_cache=True)
            known.caches = pasts_of(model, there, here, (known.target, known.source))
    return known.caches


def _changes(
    patch: PatchRecord, model: nn.Module, checked: Checked, step: _Step, solvers: list[LayerSweep], caches: Any,
    inputs: dict[str, Any], rows: Positions,
) -> dict[str, Any]:  # fmt: skip
    """What of the patch is another when it is the extended one."""
    assert patch.stream is not None
    entries, layers, records = entries_of(solvers), patch.report.layers, [record(s) for s in solvers]
    if isinstance(layers, Layers):
        records = [joined(a, b) for a, b in zip(layers.records, records, strict=True)]
    report = replace(
        patch.report, layers=Layers(records, checked.norms), tokens=patch.report.tokens + step.count,
        numbers=sum(e.delta.numbers for e in entries), dense_numbers=sum(e.delta.dense_numbers for e in entries),
        pairs=rows.named(),
    )  # fmt: skip
    same = patch._model is not None and patch._model() is model  # then its parameters were looked at a moment ago
    seen = patch._seen._replace(tensors=patch._seen.tensors | look_at(model, parameters=not same).tensors)
    step.after.caches = caches
    return {
        "entries": entries, "inputs": inputs, "rows": rows, "output": None, "target_output": None, "report": report,
        "stream": Stream(learned_by(solvers), step.among(patch.stream.sequences)), "_seen": seen,
        "_model": weakref.ref(model), "fingerprint": None, "measured": None,
    }  # fmt: skip


def _anew(patch: PatchRecord, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same where every sequence is solved for at once, with the new one among them."""
    device = next(model.parameters()).device
    there, here = ({k: v.to(device) for k, v in inputs[role].items()} for role in ("target", "source"))
    assert patch.joint is not None
    asked = patch.report.via, patch.report.route, inputs["positions"]
    made = solve(model, there, here, "all", *asked, silent, patch.joint, patch.moments, place=patch.report.place)
    made.report = replace(made.report, probe=patch.report.probe)
    names = "entries inputs rows report output target_output stream fingerprint measured _seen"
    return {name: getattr(made, name) for name in names.split()}
