"""Patches on disk: safetensors and JSON, written atomically, tied to the weights they were made for."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from controllability.arrays.sharded import gathered
from controllability.deltas import ExpertLowRank, LowRank, Shift
from controllability.errors import PatchError, in_a_line
from controllability.interfaces import JointOptions, Param
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.peft_forms import forms_of
from controllability.models.files.tensor_files import read_json, read_tensors
from controllability.models.hooks.carried_patches import TO_STAY
from controllability.models.hooks.shards import once
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form, PatchRecord
from controllability.models.reading.fingerprints import Look, in_words
from controllability.models.reading.inputs import refuse_malformed
from controllability.models.reading.positions import Positions
from controllability.models.sweep.report import Report, Sensitivity
from controllability.version import __version__

FORMAT, VERSION = "controllability-patch", 4
TENSORS, DESCRIPTION = "patch.safetensors", "patch.json"


def save_patch(patch: PatchRecord, directory: Path, model: nn.Module | None) -> Path:
    """Write ``patch`` into ``directory``, which must be new or empty; nothing is left behind on failure.

    Raises ``PatchError``: directory occupied or not writable, patch applied at the moment, made on top of
    other patches, or from nested inputs.
    """
    split = patch.split(model)
    once(lambda: refuse_unusable(directory), split)
    for role in ("source", "target"):
        for name, value in patch.inputs[role].items():
            if isinstance(value, dict | list | tuple):
                raise PatchError(f"{role}: {name} is a {type(value).__name__}, which a saved patch cannot hold")
    model = model if model is not None else (patch.model() if patch.fingerprint is None else None)
    if patch.made_under:
        raise PatchError(
            "this patch was made while other patches were on the model: it has no meaning on its own, save those and redo it; "
            f"if they are merged and to stay: {TO_STAY}"
        )
    mark = patch.mark()
    if model is not None and (patch._model is None or patch._model() is not model):
        patch.refuse_other_model(model)
    tensors, description = _tensors(patch), _description(patch, mark, model)
    once(lambda: _write(directory, tensors, description), split)
    return directory


def _write(directory: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    with written(directory) as folder:
        save_file(tensors, folder / TENSORS)
        description["tensors_sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        description["sha256"] = _digest(description)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, allow_nan=False), encoding="utf-8")


def _digest(description: dict[str, Any]) -> str:
    """SHA-256 of a description without its own checksum."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _tensors(patch: PatchRecord) -> dict[str, Tensor]:
    tensors = {"rows.sample": patch.rows.sample, "rows.position": patch.rows.position}
    for entry in patch.entries:
        for name, value in vars(entry.delta).items():
            if isinstance(value, Tensor):
                tensors[f"{_key(entry)}::{'shift' if name == 'value' else name}"] = value
    for role in ("source", "target"):
        for name, value in patch.inputs[role].items():
            if isinstance(value, Tensor):
                tensors[f"{role}::{name}"] = value
    if patch.inputs.get("positions") is not None:
        for role, value in zip(("source", "target"), patch.inputs["positions"], strict=True):
            tensors[f"positions::{role}"] = torch.as_tensor(value)
    return {name: gathered(value.detach()).cpu().clone().contiguous() for name, value in tensors.items()}


def _key(entry: Entry) -> str:
    return f"{entry.param}@{entry.call}" if entry.call else str(entry.param)


def _described(entry: Entry) -> dict[str, Any]:
    """What the tensors of an entry do not say."""
    delta = entry.delta
    kind = "shift" if isinstance(delta, Shift) else "experts" if isinstance(delta, ExpertLowRank) else "low rank"
    return {
        "parameter": entry.param.name, "slices": [[s.start, s.stop, s.step] for s in entry.param.index],
        "layer": entry.layer, "call": entry.call, "kind": kind,
        "transposed": isinstance(delta, LowRank) and delta.transposed,
        "experts": delta.experts if isinstance(delta, ExpertLowRank) else 0,
    }  # fmt: skip


def _description(patch: PatchRecord, mark: str, model: nn.Module | None) -> dict[str, Any]:
    runs = {role: patch.inputs[role] for role in ("source", "target")}
    ids = {role: run["input_ids"].tolist() for role, run in runs.items() if "input_ids" in run}
    plain = {r: {n: v for n, v in run.items() if isinstance(v, bool | int | float | str)} for r, run in runs.items()}
    kind = getattr(getattr(model, "config", None), "model_type", "")
    name = patch.model_name if model is None else str(getattr(model, "name_or_path", ""))
    forms = patch.forms if model is None else forms_of(model, patch.entries)
    return {
        "format": FORMAT, "version": VERSION, "written_by": f"controllability {__version__}", "fingerprint": mark,
        "model_type": kind if isinstance(kind, str) else "", "scope": patch.scope, "via": patch.report.via,
        "route": patch.report.route, "together": patch.joint.to_dict() if patch.joint is not None else None,
        "valid_for": {"token_ids": ids, "options": plain}, "rows_shape": list(patch.rows.shape),
        "rows_before": patch.rows.before, "entries": [_described(entry) for entry in patch.entries],
        "report": patch.report.to_dict(), "model": name, "forms": {n: form.to_dict() for n, form in forms.items()},
        "settings": {name: in_words(value) for name, value in patch._seen.settings.items()},
    }  # fmt: skip


def read_patch(directory: str | Path) -> PatchRecord:
    """The patch in a directory that ``save_patch`` wrote.  See ``controllability.load_patch``."""
    directory = Path(directory)
    description = _read_description(directory)
    tensors, _, digest = read_tensors(directory / TENSORS)
    if digest != description.get("tensors_sha256"):
        raise PatchError(f"{directory / TENSORS} is corrupt or truncated: its checksum is not the one that was saved")
    try:
        return _build(description, tensors)
    except Exception as error:  # whatever a description that was tampered with may cause
        text = in_a_line(error, 200)
        raise PatchError(f"{directory} is corrupt: {type(error).__name__} {text}") from None


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / DESCRIPTION
    adapter = (directory / "adapter_config.json").is_file()
    hint = "; it is a PEFT adapter: ct.import_peft(directory, model) reads those" if adapter else ""
    description = read_json(path, f"{directory} is not a saved patch: it has no {DESCRIPTION}{hint}")
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise PatchError(f"{path} is not a description of a patch")
    if (version := description.get("version")) != VERSION:
        raise PatchError(f"{path} has format version {version}, this program reads version {VERSION}")
    if description.pop("sha256", None) != _digest(description):
        raise PatchError(f"{path} is corrupt: it is not what was saved (its checksum differs)")
    return description


def _build(description: dict[str, Any], tensors: dict[str, Tensor]) -> PatchRecord:
    entries = []
    for item in description["entries"]:
        param = Param(item["parameter"], index=tuple(slice(*s) for s in item["slices"]))
        entry = Entry(param, Shift(torch.zeros(0)), int(item["layer"]), int(item["call"]))
        held = {part: tensors.get(f"{_key(entry)}::{part}") for part in ("left", "right", "index", "shift")}
        transposed = bool(item["transposed"])
        if item["kind"] == "low rank":
            delta: Any = LowRank(held["left"], held["right"], transposed)
        elif item["kind"] == "experts":
            delta = ExpertLowRank(held["left"], held["right"], transposed, held["index"], int(item["experts"]))
        else:
            delta = Shift(held["shift"])
        if any(v is None for v in vars(delta).values()):
            raise PatchError(f"the tensors of {item['parameter']} are missing")
        entries.append(dataclasses.replace(entry, delta=delta))
    inputs: dict[str, Any] = {
        role: dict(description["valid_for"]["options"][role])
        | {name.removeprefix(f"{role}::"): value for name, value in tensors.items() if name.startswith(f"{role}::")}
        for role in ("source", "target")
    }
    positions = tuple(tensors.get(f"positions::{role}") for role in ("source", "target"))
    inputs["positions"] = positions if positions[0] is not None else None
    if "settings" not in description:  # of an earlier version, which said nothing by ``use_cache``
        inputs["source"].pop("use_cache", None)
    shape = (int(description["rows_shape"][0]), int(description["rows_shape"][1]))
    rows = Positions(tensors["rows.sample"], tensors["rows.position"], shape, int(description["rows_before"]))
    report = Report.from_dict(description["report"])
    _ = f"{report}{report.table()}"  # what cannot be shown is no report
    _refuse_unsound(entries, rows, inputs)
    return PatchRecord(
        tuple(entries), description["scope"], rows, report, inputs,
        fingerprint=description["fingerprint"], model_name=str(description["model"]),
        measured=Sensitivity.from_dict(told) if (told := description["report"].get("sensitivity")) else None,
        joint=JointOptions.from_dict(description["together"]) if description["together"] is not None else None,
        forms={name: Form.from_dict(form) for name, form in description["forms"].items()},
        _seen=Look({}, dict(description.get("settings", {}))),
    )  # fmt: skip


def _refuse_unsound(entries: list[Entry], rows: Positions, inputs: dict[str, Any]) -> None:
    """Raise ``PatchError`` or ``BadInput`` for tensors that do not fit each other, whatever their checksums are."""
    count = len(rows.sample)
    for at, size in zip((rows.sample, rows.position), rows.shape, strict=True):
        if at.dtype != torch.int64 or at.shape != (count,) or bool(((at < 0) | (at >= size)).any()):
            raise PatchError(f"its positions lie outside of its input of shape {rows.shape}")
    for role in ("source", "target"):
        if inputs[role]:  # an imported adapter has neither, a part of a patch no target
            refuse_malformed(inputs[role], role)
    for entry in entries:
        held = {name: value for name, value in vars(entry.delta).items() if isinstance(value, Tensor)}
        first, *others = factors = [value for name, value in held.items() if name != "index"]
        axes = len(held)  # a token has one for each of the tensors
        fits = first.ndim == axes or (first.ndim == axes + 1 and len(first) == count)
        fits = fits and all(v.shape[:-1] == first.shape[:-1] for v in others)
        if not fits or not all(v.is_floating_point() and bool(v.isfinite().all()) for v in factors):
            raise PatchError(f"the factors of {entry.param} are not of {count} tokens, or not finite")
