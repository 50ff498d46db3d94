"""Adding tokens to a patch of scope "all": the earlier tokens' outputs stay, and nothing of theirs is computed again.

Each steered map keeps an orthonormal basis of what it read; a new token brings the direction that was missing.
Where a norm's scale serves all tokens it is found anew, and the left factors with it (timed apart); the
bases are not.  The source is the growing sequence without the context.  (theory 5, streaming; new)
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controllability.errors import BadInput, PatchError
from controllability.jointly.known import Known
from controllability.models.applying import Entry, own
from controllability.models.fingerprints import state_of
from controllability.models.hooks import carried, load_of, uncompiled
from controllability.models.last_defence import refuse_unreached
from controllability.models.pairing import Rows, pair
from controllability.models.reading_check import checked_reading
from controllability.models.recording import LayerRecord, joined, record
from controllability.models.report import LayerReport, Layers
from controllability.models.sweep import LayerSweep, observe_target, sweep
from controllability.models.watch import LayerHooks
from controllability.rules.jointly import NEAREST, NotContinued
from controllability.trace import Path

if TYPE_CHECKING:
    from controllability.models.model_patch import ModelPatch

Learned = dict[tuple[int, int], dict[Path, Known]]  # (layer, call) -> what each steered leaf knows of its tokens
PLAIN = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Extension:
    """What one ``extend`` did: ``tokens`` added, ``seconds`` in all, of which ``scale_seconds`` on joint scales.

    ``grown`` says that a known sequence went on, whose caches were kept; ``anew`` that everything was solved again.
    """

    tokens: int
    seconds: float
    scale_seconds: float
    grown: bool
    anew: bool


@dataclass(eq=False)
class Sequence:
    """One sequence of the set: ids (n,) of both runs, (source, target) pairs, and the caches of both runs."""

    target: Tensor
    source: Tensor
    pairs: list[tuple[int, int]]
    caches: tuple[Any, Any] | None = None

    def new_tokens(self, target: Tensor, source: Tensor) -> int:
        """How many tokens both ids have behind this sequence's; 0 where they do not go on from it alike."""
        count = len(target) - len(self.target)
        same = count > 0 and count == len(source) - len(self.source)
        if not same or not torch.equal(target[:-count], self.target) or not torch.equal(source[:-count], self.source):
            return 0
        return count if torch.equal(target[-count:], source[-count:]) else 0


@dataclass(eq=False)
class Stream:
    """What a patch of scope "all" remembers, to go on from: its tokens leaf by leaf, and its sequences."""

    learned: Learned
    sequences: list[Sequence] = field(default_factory=list)

    @staticmethod
    def of(
        solvers: list[LayerSweep], calls: list[tuple[int, int]], inputs: Mapping[str, Any], pairs: list[Any]
    ) -> Stream:
        """From a solved patch; ``pairs`` are its (source rows, target rows)."""
        learned = {at: dict(solver.run.learned) for at, solver in zip(calls, solvers, strict=True)}
        return Stream(learned, _sequences(inputs, *pairs))


def extend(
    patch: ModelPatch, model: nn.Module, target: Mapping[str, Any], source: Mapping[str, Any], positions: Any = None
) -> Extension:
    """Add one sequence, or the tokens behind a known one, to ``patch``.  See ``ModelPatch.extend``."""
    started = time.perf_counter()
    model = uncompiled(model)
    stream = _refuse_unfit(patch, model)
    for role, inputs in (("target", target), ("source", source)):
        _refuse_inputs(inputs, role)
    with load_of(model).lock, torch.inference_mode(False), torch.no_grad():
        patch._refuse_misuse(model)
        step = _Step.of(stream, target, source, positions, model)
        try:
            done = _solved(patch, model, stream, step)
        except NotContinued:
            step.known.caches = None
            done = None
        except BaseException:
            step.known.caches = None  # they may hold tokens that were refused
            raise
        if done is None:
            _solve_anew(patch, model, stream, step)
        else:
            _take(patch, model, stream, step, *done)
    scales = sum(s.run.journal.scale_seconds for s in done[0]) if done else 0.0
    found = Extension(step.count, time.perf_counter() - started, scales, step.grows, done is None)
    patch.extensions.append(found)
    return found


def _refuse_unfit(patch: ModelPatch, model: nn.Module) -> Stream:
    if patch.scope != "all" or patch.together is None or not patch.together.exact:
        raise PatchError(f"only an exact patch of scope 'all' can be extended, and this one is of scope '{patch.scope}'"
                         + ("" if patch.scope != "all" else ", a fit (ridge or rank)"))  # fmt: skip
    if patch._merged_into is not None or patch.id in carried(model):
        raise PatchError("this patch is on the model at the moment: leave applied() or unmerge before extending it")
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

    known: Sequence  # as it was; empty for a new one
    after: Sequence
    new: list[tuple[int, int]]
    grows: bool

    @property
    def count(self) -> int:
        """How many tokens are added."""
        return len(self.new)

    @staticmethod
    def of(
        stream: Stream, target: Mapping[str, Any], source: Mapping[str, Any], positions: Any, model: nn.Module
    ) -> _Step:
        there, here = target["input_ids"][0].cpu(), source["input_ids"][0].cpu()
        if positions is None:
            for known in stream.sequences:
                if count := known.new_tokens(there, here):
                    new = [(len(known.source) + i, len(known.target) + i) for i in range(count)]
                    return _Step(known, Sequence(there, here, known.pairs + new), new, True)
        rows, wanted = pair({"input_ids": there[None]}, {"input_ids": here[None]}, "all", positions)
        new = list(zip(rows.position.tolist(), wanted.position.tolist(), strict=True))
        return _Step(Sequence(there[:0], here[:0], []), Sequence(there, here, new), new, False)


def _solved(patch: ModelPatch, model: nn.Module, stream: Stream, step: _Step) -> tuple[list[LayerSweep], Learned, Any]:
    """Both runs over the new tokens (over the whole sequence where it has no caches yet), solving for them."""
    checked = checked_reading(model)
    reading, proofs = checked.reading, checked.proofs(patch.report.via, patch.report.route, True)
    caches = _caches(patch, model, step)
    skip_source, skip_target = (len(step.known.source), len(step.known.target)) if caches else (0, 0)
    rows = _rows([s - skip_source for s, _ in step.new], len(step.after.source) - skip_source)
    wanted = _rows([t - skip_target for _, t in step.new], len(step.after.target) - skip_target)
    target, source = (
        {"input_ids": step.after.target[None, skip_target:]},
        {"input_ids": step.after.source[None, skip_source:]},
    )
    device = next(model.parameters()).device
    target, source = ({k: v.to(device) for k, v in inputs.items()} for inputs in (target, source))
    if caches:
        target |= {"past_key_values": caches[0], "use_cache": True}
        source |= {"past_key_values": caches[1], "use_cache": True}
    elif _keeps_cache(model):
        target, source = target | {"use_cache": True}, source | {"use_cache": True}
    silent = lambda *_: None  # noqa: E731
    with LayerHooks(model, reading) as hooks, torch.inference_mode():
        targets, there = observe_target(hooks, target, wanted, silent)
        derivations = [layer.derivation for layer in _each_layer(patch)]
        solvers, here = sweep(
            hooks, proofs, targets, source, rows, "all", silent, patch.together, stream.learned, derivations
        )
    refuse_unreached(solvers)
    if any(taken.route == NEAREST for s in solvers for taken in s.run.journal.routes):
        raise NotContinued("a layer that later ones make good gives its earlier tokens something else now")
    learned = {(s.layer.index, targets[s.layer.index].index(s.target)): dict(s.run.learned) for s in solvers}
    both = tuple(getattr(output, "past_key_values", None) for output in (there, here))
    return solvers, learned, both if all(type(c).__name__ == "DynamicCache" for c in both) else None


def _keeps_cache(model: nn.Module) -> bool:
    """Whether a run of token ids can be gone on from: a causal model of transformers with its plain cache."""
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(getattr(model, "_is_stateful", True) is False and hasattr(model, "generate") and decoder)


def _each_layer(patch: ModelPatch) -> list[LayerReport | LayerRecord]:
    """One report a layer, of its first call; records where they are there: reports are written when they are read."""
    layers = patch.report.layers
    found: dict[int, Any] = {}
    for layer in layers.records if isinstance(layers, Layers) else layers:
        found.setdefault(layer.index, layer)
    return [found[index] for index in sorted(found)]


def _caches(patch: ModelPatch, model: nn.Module, step: _Step) -> tuple[Any, Any] | None:
    """The caches of the known tokens in both runs; filled once for a sequence that has none."""
    if not step.grows:
        return None
    if step.known.caches is None and _keeps_cache(model):
        device = next(model.parameters()).device
        with torch.inference_mode():
            there = model(input_ids=step.known.target[None].to(device), use_cache=True)
            with patch.applied(model):
                here = model(input_ids=step.known.source[None].to(device), use_cache=True)
        found = tuple(getattr(output, "past_key_values", None) for output in (there, here))
        if all(type(cache).__name__ == "DynamicCache" for cache in found):
            step.known.caches = found  # type: ignore[assignment]
    return step.known.caches


def _take(
    patch: ModelPatch, model: nn.Module, stream: Stream, step: _Step, solvers: list[LayerSweep], learned: Learned, caches: Any
) -> None:  # fmt: skip
    """Let the patch be the extended one."""
    entries = tuple(
        Entry(param, own(delta), solver.layer.index, at[1])
        for solver, at in zip(solvers, learned, strict=True)
        for param, delta in solver.deltas().items()
    )
    step.after.caches = caches
    if step.grows:
        stream.sequences[stream.sequences.index(step.known)] = step.after
    else:
        stream.sequences.append(step.after)
    stream.learned = learned
    layers = patch.report.layers
    norms = checked_reading(model).norms
    records = [record(s) for s in solvers]
    if isinstance(layers, Layers):
        records = [joined(a, b) for a, b in zip(layers.records, records, strict=True)]
    inputs, rows = together(stream.sequences)
    patch.entries, patch.inputs, patch.rows, patch.logits, patch.target_logits = entries, inputs, rows, None, None
    patch.report = replace(
        patch.report, layers=Layers(records, norms), tokens=patch.report.tokens + step.count,
        numbers=sum(e.delta.numbers for e in entries), dense_numbers=sum(e.delta.dense_numbers for e in entries),
        pairs=rows.named(),
    )  # fmt: skip
    patch._model, patch.fingerprint = weakref.ref(model), None
    patch._seen.update(state_of(model))


def _solve_anew(patch: ModelPatch, model: nn.Module, stream: Stream, step: _Step) -> None:
    """Every sequence at once, with the new one among them."""
    from controllability.models.patching import patch_model

    sequences = [step.after if s is step.known else s for s in stream.sequences]
    sequences += [] if step.grows else [step.after]
    inputs, _ = together(sequences)
    device = next(model.parameters()).device
    runs = [{k: v.to(device) for k, v in inputs[role].items()} for role in ("target", "source")]
    asked = patch.together
    assert asked is not None
    made = patch_model(
        model, *runs, scope="all", via=patch.report.via, route=patch.report.route, positions=inputs["positions"],
        keep_rms=asked.keep_rms,
    )  # fmt: skip
    for name in ("entries", "inputs", "rows", "report", "logits", "target_logits", "stream", "fingerprint", "_seen"):
        setattr(patch, name, getattr(made, name))


def together(sequences: list[Sequence]) -> tuple[dict[str, Any], Rows]:
    """(the inputs of all sequences as one batch padded on the right, the source's rows)."""
    batch: dict[str, dict[str, Tensor]] = {}
    for role in ("target", "source"):
        ids = [getattr(s, role) for s in sequences]
        whole = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        mask = torch.zeros_like(whole)
        for row, each in enumerate(ids):
            whole[row, : len(each)], mask[row, : len(each)] = each, 1
        batch[role] = {"input_ids": whole} | ({"attention_mask": mask} if not bool(mask.all()) else {})
    most = max(len(s.pairs) for s in sequences)
    length = batch["source"]["input_ids"].shape[1]
    chosen = []
    for s in sequences:
        free = list(range(len(s.source), length))  # padding: pairs of it count for nothing
        if len(s.pairs) + len(free) < most:
            raise BadInput(
                "sequences that leave positions out cannot be put into one batch: pair every position, or all but the first"
            )
        chosen.append(s.pairs + [(p, 0) for p in free[: most - len(s.pairs)]])
    found = torch.tensor(chosen)
    positions = (found[..., 0], found[..., 1])
    rows, _ = pair(batch["target"], batch["source"], "all", positions)
    return {**batch, "positions": positions}, rows


def _sequences(inputs: Mapping[str, Any], rows: Rows, wanted: Rows) -> list[Sequence]:
    """The samples of a batch as sequences of their own, padding left out; [] for inputs that are not plain token ids."""
    found: list[Sequence] = []
    kept: dict[str, list[Tensor]] = {}
    for role in ("target", "source"):
        given = {k: v for k, v in inputs[role].items() if v is not None}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or set(given) - {*PLAIN, "logits_to_keep"}:
            return []
        if ids.shape[1] != (rows if role == "source" else wanted).shape[1]:
            return []  # several states a position
        mask = given.get("attention_mask")
        kept[role] = [(m != 0).nonzero()[:, 0] for m in (torch.ones_like(ids) if mask is None else mask).cpu()]
    for b in range(len(kept["source"])):
        here, there = ({int(p): i for i, p in enumerate(kept[role][b])} for role in ("source", "target"))
        at = (rows.sample == b).nonzero()[:, 0].tolist()
        pairs = [(here[int(rows.position[i])], there[int(wanted.position[i])]) for i in at]
        ids = [inputs[role]["input_ids"][b].cpu()[kept[role][b]] for role in ("target", "source")]
        found.append(Sequence(ids[0], ids[1], pairs))
    return found


def _rows(positions: list[int], length: int) -> Rows:
    return Rows(torch.zeros(len(positions), dtype=torch.long), torch.tensor(positions), (1, length))
