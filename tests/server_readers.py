"""Second readers of adapters, by the words of vLLM's and SGLang's documentation and sources; they share no code with the package.

Each gives {weight of a checkpoint: ΔW} or raises ``ValueError`` as the server does.  ``served`` adds that to a checkpoint that
``save_pretrained`` wrote, as a server that merges would, and loads it with plain transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def checkpoint(model, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of this model, by the names that servers know."""
    if not (folder / "model.safetensors").exists():
        model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _read(directory: Path):
    return json.loads((directory / "adapter_config.json").read_text()), load_file(
        directory / "adapter_model.safetensors"
    )


def as_vllm(directory: Path, base: dict[str, torch.Tensor], max_lora_rank: int = 16) -> dict[str, torch.Tensor]:
    if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        raise ValueError(f"Input should be 1, 8, 16, 32, 64, 128, 256, 320 or 512, got {max_lora_rank}")
    config, tensors = _read(directory)
    errors = []
    if config.get("modules_to_save"):
        errors.append("vLLM only supports modules_to_save being None.")
    if config.get("use_dora"):
        errors.append("vLLM does not yet support DoRA.")
    if config["r"] > max_lora_rank:
        errors.append(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}.")
    if config.get("bias", "none") != "none":
        errors.append("Adapter bias is not supported.")
    if errors:
        raise ValueError(" ".join(errors))
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        parts = key.removeprefix("base_model.model.").split(".")
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{key} is unsupported LoRA weight")
        halves.setdefault(".".join(parts[:-2]), {})[parts[-2]] = value
    for module in halves:
        if f"{module}.weight" not in base:
            raise ValueError(f"expected target modules in the model but received {module}")
    experts = {m[1] for name in halves if (m := re.fullmatch(r"(.+\.experts)\.\d+\..+", name))}
    for name in base:  # pack_moe: assert w1_lora is not None, and so on
        owner = re.fullmatch(r"(.+\.experts)\.\d+\.\w+\.weight", name)
        if owner and owner[1] in experts and name.removesuffix(".weight") not in halves:
            raise ValueError(f"{name} has no LoRA, other experts have")
    scaling = config["lora_alpha"] / config["r"]
    return {f"{name}.weight": scaling * (pair["lora_B"] @ pair["lora_A"]) for name, pair in halves.items()}


NORMAL = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj",
}  # fmt: skip
POOL = {"qkv_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj"}


def as_sglang(directory: Path, base: dict[str, torch.Tensor], max_lora_rank: int) -> dict[str, torch.Tensor]:
    config, tensors = _read(directory)
    if config.get("use_dora"):
        raise ValueError("LoRA serving currently doesn't support DoRA adapters")
    if config["r"] > max_lora_rank:
        raise ValueError(f"rank {config['r']} is incompatible with the current LoRA memory pool configuration")
    targets = {NORMAL.get(name.split(".")[-1], name.split(".")[-1]) for name in config["target_modules"]}
    if targets - POOL:
        raise ValueError(f"get_hidden_dim not implemented for {targets - POOL}")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.")
        leaf = name.split(".")[-3] if ".lora_" in name else name.split(".")[-2]
        a_map = name.endswith(("lora_A.weight", "lora_B.weight")) and re.search(r"layers\.(\d+)\.", name)
        if NORMAL.get(leaf, leaf) not in targets or not a_map:
            raise ValueError(f"Cannot find target module name for {key} in {targets}")
        path, _, half = name.removesuffix(".weight").rpartition(".")
        halves.setdefault(path, {})[half] = value
    scaling = config["lora_alpha"] / config["r"]
    found = {}
    for name, pair in halves.items():
        change = scaling * (pair["lora_B"] @ pair["lora_A"])
        if base[f"{name}.weight"].shape != change.shape:  # copy_ into the buffers of the base model
            raise ValueError(f"{name}: {tuple(change.shape)}")
        found[f"{name}.weight"] = change
    return found


def served(model, changes: dict[str, torch.Tensor], base: dict[str, torch.Tensor], folder: Path, dtype=torch.float32):
    """The model as a server would have it, loaded by plain transformers."""
    assert {*changes} <= {*base}
    moved = {name: value + changes[name].to(value) if name in changes else value for name, value in base.items()}
    folder.mkdir()
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype).eval()
