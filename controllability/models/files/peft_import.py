"""Reading a LoRA adapter as a patch, ours or anybody's whose matrices stand where patches are applied; which configs can be honoured."""

import math
import re
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from architectures.reading import architecture_of
from controllability.deltas import Delta, Shift
from controllability.errors import PatchError, ReadingError
from controllability.interfaces import Component, Param, node, updates_of
from controllability.models.files.peft_forms import lora_factors, low_rank, plain_linear, rank_of, split_dense
from controllability.models.files.tensor_files import read_json, read_tensors
from controllability.models.hooks.carried_patches import refuse_carried, uncompiled
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form, PatchRecord
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import known_fingerprint, look_at
from controllability.models.reading.positions import Positions
from controllability.models.sweep.report import Report

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts before the model's own names
MADE_FOR = "controllability.fingerprint"  # our note in the file: the fingerprint of the weights

# fields that say which modules are meant (the tensors' names say it again), who wrote the file, or what training did
_HARMLESS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "target_parameters",
    "modules_to_save", "exclude_modules", "fan_in_fan_out", "lora_dropout", "layers_to_transform", "layers_pattern",
    "runtime_config", "eva_config", "loftq_config", "qalora_group_size", "megatron_core", "ensure_weight_tying",
}  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base weights as they load


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """(config, tensors, notes in the tensor file).  Raises ``PatchError`` for what a patch cannot be made of."""
    config = _read_config(directory / CONFIG)
    path = directory / TENSORS
    if not path.exists():
        pickled = ": pickled weights are not loaded" if (directory / "adapter_model.bin").is_file() else ""
        raise PatchError(f"{directory} has no {TENSORS}{pickled}")
    tensors, notes, _ = read_tensors(path)
    for key, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise PatchError(f"{path}: {key} holds what is no finite number")
    return config, tensors, notes


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, f"{path.parent} is not a PEFT adapter: it has no {CONFIG}")
    if not isinstance(config, dict):
        raise PatchError(f"{path} is not the config of an adapter")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise PatchError(f"the adapter in {path.parent} is a {kind}: only LoRA adapters are sums W + ΔW of low rank")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise PatchError(f"the adapter was started with {start}, which changes the base weights as it is loaded")
    if config.get("bias") not in (None, "none"):
        raise PatchError(f"the adapter trains biases (bias={config['bias']!r}), which are not read as a patch")
    for field, value in config.items():
        if value and field not in _HARMLESS | {"init_lora_weights", "bias"}:
            raise PatchError(f"the adapter uses {field}={value!r}, which a patch W + ΔW does not have")
    for field, fits in _SHAPES.items():
        if config.get(field) is not None and not fits(config[field]):
            raise PatchError(f"{path}: {field} is {config[field]!r}, which peft would not have written")
    return config


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    """{regular expression: number}."""
    try:
        return all(_is_number(n) and re.compile(p) for p, n in value.items())
    except (AttributeError, re.error):
        return False


_SHAPES = {
    "lora_alpha": _is_number, "alpha_pattern": _is_pattern, "target_parameters": _is_names, "modules_to_save": _is_names,
}  # fmt: skip


_LORA = re.compile(r"(.+)\.lora_(A|B)\.weight")


@dataclass(frozen=True)
class Slot:
    """Where a parameter can be patched: the layer, the parameter or its slice, and the leaf that computes with it."""

    layer: int
    param: Param
    leaf: Component

    def delta(self, rows: Tensor, columns: Tensor) -> Delta:
        """What factors of the stored matrix are as a delta of this leaf."""
        experts = (getattr(self.leaf, "stacked", None) or len(rows)) if self.leaf.per_expert else None
        return low_rank(self.param, rows, columns, getattr(self.leaf, "layout", "out_in") == "in_out", experts)


def patch_of_adapter(directory: str | Path, model: nn.Module) -> PatchRecord:
    """A PEFT adapter as a patch.  See ``controllability.import_peft``."""
    model = uncompiled(model)
    config, tensors, notes = read_adapter(Path(directory))
    refuse_carried(model, "importing")
    if notes.get(MADE_FOR) not in (None, known_fingerprint(model)):
        raise PatchError("this adapter was exported for other weights (the fingerprints differ)")
    entries: list[Entry] = []
    loras, copies = _sorted(tensors, config)
    place, slots = _place(model, {_module(model, path)[0] for path in (*loras, *copies)})
    for path, pair in loras.items():
        name, form, alpha = _target(model, path, config)
        for slot in _found(slots, name):
            entries += _entry(slot, *_factors(pair, form, alpha, config, name, model))
    for path, held in copies.items():
        entries += _from_copy(model, path, held, slots)
    if not entries:
        raise PatchError(f"the adapter in {directory} changes nothing")
    entries.sort(key=lambda entry: entry.layer)
    numbers, dense = (sum(getattr(e.delta, n) for e in entries) for n in ("numbers", "dense_numbers"))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    report = Report("last", "imported", "none", dtype, 1, numbers, dense, 0.0, [], place=place)
    one = torch.zeros(1, dtype=torch.long)
    inputs: dict[str, Any] = {"target": {}, "source": {}, "positions": None}
    rows = Positions(one, one, (1, 1))
    known: dict[str, Any] = {"_model": weakref.ref(model), "_seen": look_at(model)}
    return PatchRecord(tuple(entries), "last", rows, report, inputs, **known)


def _place(model: nn.Module, modules: set[str]) -> tuple[str, dict[str, list[Slot]]]:
    """The place at which all of ``modules`` can be patched, and the slots there; where there is none, the model's default."""
    first, *others = architecture_of(model).places
    slots = _slots(model, first)
    for place in others if not _holds(slots, modules) else ():
        with suppress(ReadingError):
            if _holds(there := _slots(model, place), modules):
                return place, there
    return first, slots


def _holds(slots: Mapping[str, list[Slot]], modules: set[str]) -> bool:
    return modules <= {name.rpartition(".")[0] for name in slots}


def _slots(model: nn.Module, place: str) -> dict[str, list[Slot]]:
    """Parameter name -> where it can be patched."""
    slots: dict[str, list[Slot]] = {}
    for layer in checked_reading(model, place=place).reading.layers:
        for path in (path for tap in layer.taps for path in tap.paths):
            leaf = node(layer.block, path)
            for update in updates_of(leaf, "output"):
                slots.setdefault(update.param.name, []).append(Slot(layer.index, update.param, leaf))
    return slots


def _found(slots: Mapping[str, list[Slot]], name: str) -> list[Slot]:
    if name not in slots:
        raise PatchError(
            f"the adapter changes {name}, and a patch moves parameters of the feed-forward halves only, or only of the maps "
            "behind what mixes positions: this adapter is no patch; load it with peft"
        )
    return slots[name]


def _sorted(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """{path: {"A": …, "B": …}} of the LoRA pairs and {path: {name: tensor}} of whole modules."""
    loras: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[str, Tensor]] = {}
    wanted = tuple(config.get("modules_to_save") or ())
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        path, _, attribute = name.rpartition(".")
        if match := _LORA.fullmatch(name):
            loras.setdefault(match[1], {})[match[2]] = value
        elif wanted and path.endswith(wanted):
            copies.setdefault(path, {})[attribute] = value
        else:
            raise PatchError(
                f"the adapter holds {key}, which is neither lora_A, lora_B nor a module of modules_to_save"
            )
    for path, pair in loras.items():
        if len(pair) != 2:
            raise PatchError(f"the adapter holds only lora_{next(iter(pair))} of {path}")
    return loras, copies


def _module(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    bare = path.replace(".base_layer", "")
    try:
        return bare, model.get_submodule(bare)
    except AttributeError:
        raise PatchError(f"the adapter changes module {bare}, which the model does not have") from None


def _target(model: nn.Module, path: str, config: Mapping[str, Any]) -> tuple[str, Form, float]:
    """(parameter, how PEFT holds it, lora_alpha) of a name in the file; see ``peft_forms`` for wrappers that nest."""
    bare, module = _module(model, path)
    asked = tuple(config.get("target_parameters") or ())
    aimed = [a for a in module._parameters if any(f".{bare}.{a}".endswith(f".{target}") for target in asked)]
    outside = re.sub(r"(\.base_layer)+$", "", path)
    depth = path[len(outside) :].count(".base_layer")
    if aimed and depth >= len(aimed):
        raise PatchError(f"the adapter names {path}, and its config targets {len(aimed)} parameters of {bare} only")
    attribute = aimed[-1 - depth] if aimed else "weight"
    stored = module._parameters.get(attribute)
    plain = plain_linear(module)
    if stored is None or not (aimed or plain or isinstance(module, nn.Linear)) or stored.ndim not in (2, 3):
        raise PatchError(f"the adapter changes module {bare}, a {type(module).__name__}: a patch has no matrix there")
    name = f"{bare}.{attribute}"
    swapped = stored.ndim == 3 and bool(getattr(module, "is_transposed", False)) if aimed else plain == "in_out"
    key = name if aimed else bare
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", key)), config.get("lora_alpha", 8))
    return name, Form("parameter" if aimed else "module", tuple(stored.shape), swapped, path), float(alpha)


def _factors(
    pair: Mapping[str, Tensor], form: Form, alpha: float, config: Mapping[str, Any], name: str, model: nn.Module
) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the stored parameter, the scaling in the rows, in float32 or better."""
    try:
        rows, columns = lora_factors(pair["A"], pair["B"], form)
    except PatchError as error:
        raise PatchError(f"the adapter does not fit {name}: {error}") from None
    rank = rank_of(pair["A"], form)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    dtype = _lifted(pair["A"], model.get_parameter(name))
    # the others fill it up to a rank
    used = ((rows != 0).any(-1) & (columns != 0).any(-1)).reshape(-1, rows.shape[-2]).any(0)
    used[0] |= not bool(used.any())
    return rows[..., used, :].to(dtype) * scaling, columns[..., used, :].to(dtype)


def _entry(slot: Slot, rows: Tensor, columns: Tensor) -> list[Entry]:
    delta = slot.delta(rows, columns)
    return [Entry(slot.param, delta, slot.layer)] if delta.numbers else []


def _lifted(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


@torch.no_grad()
def _from_copy(model: nn.Module, path: str, held: Mapping[str, Tensor], slots: Mapping[str, list[Slot]]) -> list[Entry]:
    """What a whole module changes: vectors as they are, matrices split into factors."""
    bare, module = _module(model, path)
    entries: list[Entry] = []
    # not its state_dict, for which bitsandbytes would unpack four-bit weights in place
    own = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
    for attribute, value in held.items():
        name, stored = f"{bare}.{attribute}", own.get(attribute)
        if stored is None or stored.shape != value.shape:
            raise PatchError(f"the adapter holds {name} of shape {tuple(value.shape)}, which the model does not have")
        if torch.equal(value.to(stored), stored):
            continue
        dtype = _lifted(value, stored)
        change = value.to(stored.device, dtype) - stored.to(dtype)
        for slot in _found(slots, name):
            if change.ndim == 1:
                part = change[slot.param.index] if slot.param.index else change
                entries.append(Entry(slot.param, Shift(part[None].clone()), slot.layer))
            else:
                entries += _entry(slot, *split_dense(change, float(stored.abs().max())))
    return entries
