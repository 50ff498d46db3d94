"""``patch_model``: from two runs of a live model to the patch that turns one into the other."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from controllability.errors import BadInput
from controllability.models.hooks import carried, refuse_compiled
from controllability.models.model_patch import Entry, ModelPatch, refuse_scope
from controllability.models.pairing import input_shape, pair
from controllability.models.reading_check import Checked, checked_reading
from controllability.models.report import Report, layer_report
from controllability.models.sweep import Progress, check_finite, observe_target, sweep


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
    refuse_compiled(model)
    started = time.perf_counter()
    checked = checked_reading(model)
    for role, inputs in (("target", target), ("source", source)):
        _refuse_bad_inputs(model, checked, inputs, role)
    source_rows, target_rows = pair(target, source, scope, positions)
    proofs = checked.proofs(via, route)
    layers = checked.reading.layers
    with torch.no_grad():
        targets, target_output = observe_target(model, layers, proofs, _without_cache(target), target_rows, progress)
        solvers, output = sweep(model, layers, proofs, targets, _without_cache(source), source_rows, scope, progress)
    entries = tuple(Entry(param, delta) for solver in solvers for param, delta in solver.deltas().items())
    last = layers[-1]
    logits = _result(output)
    check_finite(logits, "source", last, "of the logits after")
    reports = [layer_report(s, t, checked.norms) for s, t in zip(solvers, targets, strict=True)]
    report = Report(
        scope, via, route, str(logits.dtype).removeprefix("torch."), len(source_rows.sample),
        sum(e.delta.numbers for e in entries), sum(e.delta.dense_numbers for e in entries),
        time.perf_counter() - started, reports,
    )  # fmt: skip
    kept = {"target": dict(target), "source": dict(source), "positions": positions}
    mp = ModelPatch(
        entries, scope, source_rows, report, kept, logits,
        paired_logits(_result(target_output), target_rows, logits, scope), carried(model), _model=weakref.ref(model),
    )  # fmt: skip
    mp._seen.update(mp.look(model))
    return mp


def paired_logits(target_logits: torch.Tensor, rows: Any, like: torch.Tensor, scope: str) -> torch.Tensor:
    """The target's logits in the layout of the source's: (B, T, vocabulary), or the last position alone.

    Where the caller kept fewer logits (``logits_to_keep``), or pairs are not all positions, the target's
    rows (N, vocabulary) are returned as they are kept.
    """
    if target_logits.shape == like.shape:
        return target_logits
    if target_logits.shape[1] != rows.shape[1]:
        return target_logits
    picked = rows.of(target_logits)
    if scope == "each" and picked.shape[0] == like.shape[0] * like.shape[1]:
        return picked.reshape(like.shape)
    return picked


def _without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_cache": False} | dict(inputs)


def _result(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _refuse_bad_inputs(model: nn.Module, checked: Checked, inputs: Mapping[str, Any], role: str) -> None:
    _, length = input_shape(inputs, role)
    limit = getattr(checked.reading.config, "max_position_embeddings", None)
    positions = inputs.get("position_ids")
    reach = length if positions is None else int(positions.max()) + 1
    if limit is not None and reach > limit:
        raise BadInput(f"{role}: position {reach - 1} lies beyond the model's limit of {limit} positions")
    if "input_ids" in inputs:
        vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr, arg-type]
        ids = inputs["input_ids"]
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise BadInput(
                f"{role}: token ids must lie in 0 … {vocabulary - 1}, got {int(ids.min())} … {int(ids.max())}"
            )
