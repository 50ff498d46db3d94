"""``patch_model``: from two runs of a live model to the patch that turns one into the other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from controllability.errors import BadInput, NotVerified
from controllability.models.applying import Entry
from controllability.models.fingerprints import state_of
from controllability.models.hooks import carried, load_of, refuse_compiled
from controllability.models.model_patch import ModelPatch, refuse_scope
from controllability.models.pairing import Rows, input_shape, pair
from controllability.models.random_input import input_embedding, refuse_ids, takes_cache
from controllability.models.reading_check import Checked, checked_reading
from controllability.models.report import LayerReport, Report, layer_report
from controllability.models.sweep import LayerSweep, Progress, check_finite, observe_target, sweep


def _silent(stage: str, done: int, total: int) -> None:
    return None


def patch_model(
    model: nn.Module,
    target: Mapping[str, Any],
    source: Mapping[str, Any],
    scope: str = "each",
    via: str = "input-output",
    route: str = "auto",
    positions: tuple[Any, Any] | None = None,
    progress: Progress = _silent,
) -> ModelPatch:
    """The patch with which the model at ``source`` gives what it gave at ``target``.

    ``target`` and ``source`` are keyword arguments of the model's own forward (``input_ids`` (B, T),
    ``attention_mask``, ``position_ids``, …).  Source positions correspond to the last positions of
    the target unless ``positions=(source, target)`` says otherwise.  Scope "each" gives every source
    position its own patch, "last" one patch that is exact at the last position.  The model is left
    as it was.  Raises ``BadInput``, ``ReadingError``, ``NotControllable`` or ``SideConditionFailed``.
    Source: [G, Thm 2, Alg. 1].

    >>> import torch
    >>> from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    >>> config = Gemma3TextConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)
    >>> model = Gemma3ForCausalLM(config).eval()
    >>> ids = torch.arange(5, 17)[None]
    >>> mp = patch_model(model, target={"input_ids": ids},
    ...     source={"input_ids": ids[:, -3:], "position_ids": torch.arange(9, 12)[None]})
    >>> with torch.no_grad(), mp.applied(model):
    ...     patched = model(ids[:, -3:], position_ids=torch.arange(9, 12)[None]).logits
    >>> bool(torch.allclose(patched, mp.target_logits, atol=1e-4))
    True
    """
    refuse_scope(scope)
    for name, value in (("via", via), ("route", route)):
        if not isinstance(value, str):
            raise BadInput(f"{name} must be a name, got {type(value).__name__}")
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model must be a torch module, got {type(model).__name__}")
    refuse_compiled(model)
    # inside torch.inference_mode the factors would be tensors that autograd refuses later
    with load_of(model).lock, torch.inference_mode(False), torch.no_grad():
        return _patch(model, target, source, scope, via, route, positions, progress)


def _patch(
    model: nn.Module,
    target: Mapping[str, Any],
    source: Mapping[str, Any],
    scope: str,
    via: str,
    route: str,
    positions: tuple[Any, Any] | None,
    progress: Progress,
) -> ModelPatch:
    started = time.perf_counter()
    for role, inputs in (("target", target), ("source", source)):
        _refuse_malformed(inputs, role)
    checked = checked_reading(model, target)
    for role, inputs in (("target", target), ("source", source)):
        _refuse_bad_inputs(model, checked, inputs, role)
    source_rows, target_rows = pair(target, source, scope, positions, _codebooks(checked), checked.length)
    shown = source_rows, target_rows  # where the logits are, one row of ids after the other
    if (books := _codebooks(checked)) > 1:
        shown = source_rows.repeated(books), target_rows.repeated(books)
    if (streams := _streams(checked)) > 1:
        if scope != "each":
            raise BadInput(
                f"scope {scope!r} is one patch for each sample, and {checked.reading.architecture.name} keeps {streams} "
                "states a position, each of which needs its own: use scope='each'"
            )
        source_rows, target_rows = source_rows.streamed(streams), target_rows.streamed(streams)
    proofs = checked.proofs(via, route)
    reading = checked.reading
    targets, target_output = observe_target(model, reading, without_cache(model, target), target_rows, progress)
    solvers, output = sweep(model, reading, proofs, targets, without_cache(model, source), source_rows, scope, progress)
    entries = tuple(
        Entry(param, delta, solver.layer.index, targets[solver.layer.index].index(solver.target))
        for solver in solvers
        for param, delta in solver.deltas().items()
    )
    last = reading.layers[-1]
    logits = _result(output)
    check_finite(logits, "source", last, "of the logits after")
    reports = [layer_report(s, s.target, checked.norms) for s in solvers]
    paired = paired_logits(_result(target_output), shown[1], logits, shown[0])
    _refuse_unreached(reports, solvers)
    _refuse_other_logits(logits, shown[0], _result(target_output), shown[1], reports)
    report = Report(
        scope, via, route, str(logits.dtype).removeprefix("torch."), len(source_rows.sample),
        sum(e.delta.numbers for e in entries), sum(e.delta.dense_numbers for e in entries),
        time.perf_counter() - started, reports,
    )  # fmt: skip
    kept = {"target": dict(target), "source": dict(source), "positions": positions}
    source_rows = replace(source_rows, before=solvers[0].before)
    mp = ModelPatch(
        entries, scope, source_rows, report, kept, logits, paired, carried(model), _model=weakref.ref(model),
    )  # fmt: skip
    mp._seen.update(state_of(model))
    return mp


# relative error at which a patched row is nowhere near its target: far above what rounding explains
UNREACHED = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}


def _refuse_unreached(reports: list[LayerReport], solvers: list[LayerSweep]) -> None:
    """The last line of defence: a layer that, patched, is nowhere near its target did something undeclared."""
    for report, solver in zip(reports, solvers, strict=True):
        if solver.proof.route in ("ball", "scale"):
            continue  # asked for, and known to amplify rounding
        assert solver.output is not None
        dtypes = {t.dtype for t in (solver.output, *solver.layer.params.values())} & set(UNREACHED)
        error, row = _worst_row(solver.output, solver.target.outputs[()])
        if error > max(UNREACHED[d] for d in dtypes):
            raise NotVerified(
                f"layer {report.index} ({solver.layer.name}), {solver.rows.name(row)}: with its patch it misses the "
                f"target run by {error:.2g} (relative), more than rounding explains: on this input the model computes "
                "something that its expression does not have (a mask, or a switch that depends on the input); "
                "nothing was changed"
            )


def _refuse_other_logits(
    logits: torch.Tensor, rows: Rows, target: torch.Tensor, target_rows: Rows, reports: list[LayerReport]
) -> None:
    """Every layer reached its target; so must what is computed from the last one, or something else reads the context."""
    per_position = logits.ndim == 3 and logits.shape[1] == rows.shape[1] and target.shape[1] == target_rows.shape[1]
    if per_position:
        found, wanted = rows.of(logits), target_rows.of(target)
    elif logits.ndim == 2 and logits.shape == target.shape:
        found, wanted = logits, target
    else:
        return  # fewer logits than positions were asked for
    if max(report.residual for report in reports) > UNREACHED[torch.float32]:
        return  # half precision, or a route that amplifies: the layers' residuals say it
    error, row = _worst_row(found, wanted)
    if error > 10 * UNREACHED.get(logits.dtype, 1e-3):
        where = rows.name(row) if per_position else f"sample {row}"
        why = (
            "something after the last patched layer depends on the context or on the token (a mixer, per-layer embeddings, "
            "an adapter that the runs choose differently)"
            if per_position
            else "the model's head reads a position that is not paired: name it, positions=(source, target)"
        )
        raise NotVerified(
            f"every layer reaches its target, and the model's output at {where} misses the target run by {error:.2g} "
            f"(relative): {why}; nothing was changed"
        )


def _worst_row(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, int]:
    """The largest relative error of a row (N, n), each against its own size, and which it is."""
    found, wanted = found.double(), wanted.double()
    size = wanted.abs().amax(-1).clamp_min(1e-6 * float(wanted.abs().max()) + 1e-300)
    errors = (found - wanted).abs().amax(-1) / size
    row = int(errors.argmax())
    return float(errors[row]), row


def _codebooks(checked: Checked) -> int:
    count = checked.reading.architecture.codebooks
    return count(checked.reading.config) if count else 1


def _streams(checked: Checked) -> int:
    count = checked.reading.architecture.streams
    return count(checked.reading.config) if count else 1


def paired_logits(target: torch.Tensor, rows: Rows, logits: torch.Tensor, source_rows: Rows) -> torch.Tensor:
    """The target's logits where the source's are: (B, T, vocabulary) if every source position has a pair.

    Otherwise one row a pair, (N, vocabulary), as ``mp.rows.of(mp.logits)`` gives the patched ones.  Where the caller
    kept fewer logits (``logits_to_keep``), or the model has one output a sample, they are returned as they are.
    """
    if target.ndim != 3 or target.shape[1] != rows.shape[1]:
        return target
    picked = rows.of(target)
    whole = source_rows.complete and logits.shape[:2] == source_rows.shape
    return picked.reshape(logits.shape) if whole else picked


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a run without a cache, for a model that knows of one."""
    return ({"use_cache": False} if takes_cache(model) else {}) | dict(inputs)


def _result(output: Any) -> torch.Tensor:
    """The logits of a run, or its last hidden states: by name, or the tensor itself, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    for name in ("logits", "last_hidden_state"):
        held = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(held, torch.Tensor):
            return held
    if isinstance(found, torch.Tensor):
        return found
    raise BadInput(
        f"the model returned a {type(output).__name__} without logits: its forward must return a tensor (B, T, n), "
        "or an object with .logits or .last_hidden_state"
    )


def _refuse_malformed(inputs: Mapping[str, Any], role: str) -> None:
    input_shape(inputs, role)
    for name, value in inputs.items():
        cache = name == "past_key_values" and value is not None
        if cache or not _is_plain(value):
            why = "both runs are done without a cache" if cache else "it could not be saved or repeated"
            raise BadInput(f"{role}: {name} is a {type(value).__name__}; give tensors and plain values only ({why})")
    if inputs.get("return_dict") is False:
        raise BadInput(f"{role}: return_dict=False is not supported")
    if inputs.get("use_cache"):
        raise BadInput(f"{role}: use_cache=True is not supported: both runs are done without a cache")


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, a plain value, or a dict, list or tuple of such."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor | bool | int | float | str | None)


def _refuse_bad_inputs(model: nn.Module, checked: Checked, inputs: Mapping[str, Any], role: str) -> None:
    batch, length = input_shape(inputs, role, checked.length)
    embedding = input_embedding(model)
    if embedding is None and isinstance(checked.embedding, nn.Embedding):
        embedding = checked.embedding.weight
    limit = getattr(checked.reading.config, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None
    positions = inputs.get("position_ids")
    if positions is not None and (
        not isinstance(positions, torch.Tensor) or positions.shape not in ((batch, length), (1, length))
    ):
        raise BadInput(f"{role}: position_ids must be a tensor of shape {(batch, length)}")
    if positions is not None and (positions.dtype not in (torch.int64, torch.int32) or int(positions.min()) < 0):
        raise BadInput(
            f"{role}: position_ids must be integers from 0 on, got {positions.dtype} from {positions.min().item()}"
        )
    reach = length if positions is None else int(positions.max()) + 1
    if limit is not None and reach > limit:
        raise BadInput(f"{role}: position {reach - 1} lies beyond the model's limit of {limit} positions")
    if embedding is None:
        return
    embeds = inputs.get("inputs_embeds")
    own = checked.reading.architecture.embeds
    width = own(model.config) if own else int(embedding.shape[1])
    if embeds is not None and (embeds.shape[-1] != width or embeds.dtype != embedding.dtype):
        wanted = f"{embedding.dtype} of width {width}"
        raise BadInput(f"{role}: inputs_embeds must be {wanted}, got {embeds.dtype} of shape {tuple(embeds.shape)}")
    if "input_ids" in inputs:
        refuse_ids(inputs["input_ids"], int(embedding.shape[0]), role)
