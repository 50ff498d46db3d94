"""The two files of an adapter, and which fields of its config a patch can honour."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from controllability.errors import PatchError
from controllability.models.files.tensor_files import read_json, read_tensors

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
