"""From two runs of a live model to the patch that turns one into the other."""

import copy
import math
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from controllability.errors import BadInput
from controllability.interfaces import JointOptions
from controllability.models.hooks.carried_patches import carried
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.hooks.shards import refuse_unlike
from controllability.models.moments import Moments
from controllability.models.patches.applier import entries_of
from controllability.models.patches.record import PatchRecord, Stream
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import Look, look_at, settings_of
from controllability.models.reading.heads import Result, Runs, without_logits
from controllability.models.reading.inputs import cache_settled, refuse_bad_inputs, refuse_malformed
from controllability.models.reading.model_facts import modules_of
from controllability.models.reading.positions import Positions, pair_positions
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.records import LayerRecord
from controllability.models.sweep.report import Layers, Report
from controllability.models.sweep.shared_past import Past, seen_in_target
from controllability.models.sweep.source_run import (
    AFTER_THE_LAST_LAYER,
    Plan,
    refuse_not_finite,
    refuse_other_output,
    refuse_unreached,
    sweep,
    with_reader_of_last_layer,
)
from controllability.models.sweep.target_run import Progress, check_finite


def solve(
    model: nn.Module, target: Mapping[str, Any], source: Mapping[str, Any], scope: str, via: str, route: str,
    positions: tuple[Any, Any] | None, progress: Progress, joint: JointOptions,
    moments: Moments | None = None, past: Past | None = None, place: str | None = None, judged: int | None = None,
) -> PatchRecord:  # fmt: skip
    """The solved patch.  See ``controllability.patch_model`` for options and errors; ``past``: ``seen_in_target``, ``judged``: ``_refuse_unverified``."""
    started = time.perf_counter()
    for role, given in (("target", target), ("source", source)):
        refuse_malformed(given, role)
    checked = checked_reading(model, target, place)
    refuse_unlike(model, "inputs", (dict(target), dict(source), scope, via, route, positions, place))
    for role, given in (("target", target), ("source", source)):
        refuse_bad_inputs(model, checked, given, role)
    # what is kept is a copy: the caller may use the buffers again
    copies = (tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, dict(g)) for g in (target, source))
    target, source = (cache_settled(model, checked, given) for given in copies)
    positions, settings = copy.deepcopy(positions), settings_of(modules_of(model))
    source_rows, target_rows = pair_positions(target, source, scope, positions, checked.codebooks, checked.length)
    shown = source_rows, target_rows  # where the logits are, one row of ids after the other
    if (books := checked.codebooks) > 1:
        shown = source_rows.repeated(books), target_rows.repeated(books)
    if (streams := checked.streams) > 1:
        if scope == "last":
            raise BadInput(
                f"scope {scope!r} is one patch for each sample, and {checked.reading.architecture.name} keeps {streams} "
                "states a position, each of which needs its own: use scope='each'"
            )
        source_rows, target_rows = source_rows.streamed(streams), target_rows.streamed(streams)
    proofs = checked.proofs(via, route, scope == "all")
    reading = checked.reading
    if moments is not None:
        moments.refuse_other(reading)
    lean = Runs(model, without_logits(model, [target, source], checked.tried))
    with lean, LayerHooks(model, reading) as hooks, torch.inference_mode():  # small operations cost less there
        standing = with_reader_of_last_layer(joint, model, checked, target) if scope == "all" else joint
        targets, wanted = seen_in_target(hooks, lean, target, (target_rows, shown[1]), progress, past)
        plan = Plan(proofs, scope, standing, metrics=moments.metrics if moments is not None else None)
        kept: dict[LayerSweep, LayerRecord] = {}
        solvers, output = sweep(hooks, plan, targets, lean.inputs(source), source_rows, progress, kept)
        found = lean.of(output)
    entries = entries_of(solvers)
    del targets, output
    found, wanted = found.kept(), wanted.kept()
    check_finite(found.held, "source", reading.layers[-1], "of the logits after")
    records = [kept[s] for s in solvers]
    if joint.damping is None:  # else whoever asks measures it
        _refuse_unverified(solvers, records if joint.exact else None, found, wanted, shown[0], judged)
    report = Report(
        scope, proofs[0].via, route, str(found.dtype).removeprefix("torch."), len(source_rows.sample),
        sum(e.delta.numbers for e in entries), sum(e.delta.dense_numbers for e in entries),
        time.perf_counter() - started, Layers(records, checked.norms), source_rows.named(),
        fit=None if joint.exact else {"ridge": joint.ridge, "rank": joint.rank}, place=reading.place,
        level=reading.architecture.level if reading.place == "feed-forward" else "every layer",
    )  # fmt: skip
    inputs = {"target": target, "source": source, "positions": positions}
    seen = look_at(model)  # a setting that the model's own runs write is none
    seen = Look(seen.tensors, {name: value for name, value in seen.settings.items() if settings.get(name) == value})
    source_rows = replace(source_rows, before=solvers[0].before)
    mp = PatchRecord(
        entries, scope, source_rows, report, inputs, found, _as_pairs(wanted, found, shown[0]), carried(model), joint=joint,
        moments=moments, _model=weakref.ref(model), _seen=seen,
    )  # fmt: skip
    if scope == "all" and joint.damping is None:
        stream = Stream.of(solvers if joint.exact else [], inputs, [source_rows, target_rows])
        mp.stream = stream if stream.sequences else None
    return mp


def parse_joint_options(scope: str, ridge: float, rank: int | None, keep_rms: bool) -> JointOptions:
    """How many tokens are solved for at once.  Raises ``BadInput`` for options that make no sense."""
    number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
    if not number or not 0 <= ridge <= sys.float_info.max:
        raise BadInput(f"ridge must be a finite number from 0 on, got {ridge!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise BadInput(f"rank must be a whole number from 1 on, or None, got {rank!r}")
    if not isinstance(keep_rms, bool):
        raise BadInput(f"keep_rms must be True or False, got {keep_rms!r}")
    if scope != "all" and (ridge or rank is not None or keep_rms):
        raise BadInput(f"ridge, rank and keep_rms belong to scope 'all' (one patch for many tokens), not to {scope!r}")
    return JointOptions(float(ridge), rank, keep_rms)


def _refuse_unverified(
    solvers: list[LayerSweep], records: list[LayerRecord] | None, output: Result, wanted: Result, rows: Positions,
    judged: int | None = None,
) -> None:  # fmt: skip
    """Every layer must have reached its target, as its record says, and so must what is computed from the last one.

    ``judged``: of each sample's pairs only the last so many are held against the target's logits, the states of all of them.
    """
    found, per_position = output.at(rows), output.held.ndim == 3
    comparable = found.held.ndim == 2 and found.held.shape == wanted.held.shape
    if judged is not None and comparable and per_position:
        late = rows.sample.bincount().cumsum(0)[rows.sample] - torch.arange(len(rows.sample)) <= judged
        rows = Positions(rows.sample[late], rows.position[late], rows.shape)
        found, wanted = (replace(result, held=result.held[late]) for result in (found, wanted))
    if records is not None:
        worst = refuse_unreached(solvers, records)
        head = "the model's head reads a position that is not paired: name it, positions=(source, target)"
        name, why = (rows.name, AFTER_THE_LAST_LAYER) if per_position else ("sample {}".format, head)
        if comparable:
            refuse_other_output(found, wanted, worst, name, why)
    elif comparable:
        refuse_not_finite(found, rows.name)


def _as_pairs(wanted: Result, found: Result, rows: Positions) -> Result:
    """The target's rows of the pairs as (B, P, n), P pairs a sample: those of samples with fewer stand at the end, after NaN.

    Where the caller kept fewer logits (``logits_to_keep``), or the model has one output a sample, they stay as they are.
    """
    if wanted.held.ndim != 2 or found.held.ndim != 3:
        return wanted
    counts = rows.sample.bincount(minlength=rows.shape[0])
    place = torch.arange(len(rows.sample)) + (counts.max() - counts.cumsum(0))[rows.sample]
    held = wanted.held.new_full((rows.shape[0], int(counts.max()), wanted.held.shape[-1]), math.nan)
    held[rows.sample, place] = wanted.held
    return replace(wanted, held=held)
