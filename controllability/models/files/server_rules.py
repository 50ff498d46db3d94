"""What vLLM and SGLang take as a LoRA adapter: the two files, read by the rules of each.  Where a server has words, they are quoted.

Sources: vLLM's docs/features/lora.md, config/lora.py, lora/peft_helper.py, lora_model.py, lora_weights.py; SGLang's
docs/advanced_features/lora, srt/lora/lora_manager.py, mem_pool.py, utils.py; both as of 2026.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controllability.errors import BadInput
from controllability.models.files.peft_forms import plain_linear
from controllability.models.files.peft_import import CONFIG, PREFIX, TENSORS
from controllability.models.files.tensor_files import read_json, read_tensors
from controllability.models.transformers_parts import as_in_checkpoint

SERVERS = ("vllm", "sglang", "peft")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank; 16 unless told otherwise
SGLANG_MAPS = re.compile(r"([qkvo]|qkv|out|gate|up|gate_up|down)_proj|w[123]")  # it has layers for
_PAIR, _EXPERT = re.compile(r"(.+)\.lora_([AB])\.weight"), re.compile(r"(.+\.experts)\.\d+\.\w+")


def refuse_rank(server: str, rank: int | None) -> None:
    """Raise ``BadInput`` for a server that is not known, or a largest rank that it does not have."""
    if server not in SERVERS:
        raise BadInput(f"unknown server {server!r}: choose {', '.join(SERVERS)}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise BadInput(f"the largest rank must be a whole number from 1 on, got {rank!r:.80}")
    if server == "vllm" and rank not in (None, *VLLM_RANKS):
        raise BadInput(f"vLLM's max_lora_rank is one of {', '.join(map(str, VLLM_RANKS))}; got {rank}")


def verdict(directory: Path, server: str, model: nn.Module, max_rank: int | None = None) -> dict[str, Any]:
    """What "vllm" or "sglang" says of an adapter for ``model``: whether it is "accepted", else "reasons"; and the "flags" to start it with.

    ``max_rank`` None is the smallest that it has for this adapter.  Raises ``PatchError`` for files that cannot be read.
    """
    config = read_json(directory / CONFIG, f"{directory} has no {CONFIG}")
    rank, maps = config["r"], {name.rpartition(".")[2] for name in config["target_modules"]}
    ranks = VLLM_RANKS if server == "vllm" else (rank,)
    max_rank = max_rank or min((known for known in ranks if known >= rank), default=ranks[-1])
    unknown = sorted(name for name in maps if not SGLANG_MAPS.fullmatch(name))
    rules: dict[str, dict[str, Any]] = {
        "vllm": {
            "vLLM only supports modules_to_save being None.": config.get("modules_to_save"),
            "vLLM does not yet support DoRA.": config.get("use_dora"),
            "Adapter bias is not supported.": config.get("bias", "none") != "none",
            f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.": rank > max_rank,
        },
        "sglang": {
            "LoRA serving currently doesn't support DoRA adapters": config.get("use_dora"),
            f"rank {rank} is incompatible with the current LoRA memory pool (--max-lora-rank {max_rank})": rank > max_rank,
            f"get_hidden_dim not implemented for {', '.join(unknown)}": unknown,
        },
    }  # fmt: skip
    foreign = "{} is unsupported LoRA weight" if server == "vllm" else "Cannot find target module name for {}"
    found = [words for words, broken in rules[server].items() if broken] + _misplaced(directory, rank, foreign, model)
    return {"accepted": not found, "reasons": found, "flags": f"--enable-lora --max-lora-rank {max_rank}"}


def _misplaced(directory: Path, rank: int, foreign: str, model: nn.Module) -> list[str]:
    """The keys and shapes that a server cannot place, one of each kind; what is no LoRA is ``foreign``."""
    pairs, found, shapes = dict[str, dict[str, tuple[int, ...]]](), dict[str, str](), _shapes(model)
    for key, value in read_tensors(directory / TENSORS)[0].items():
        if match := _PAIR.fullmatch(key.removeprefix(PREFIX)):
            pairs.setdefault(match[1], {})[match[2]] = tuple(value.shape)
        else:
            found["key"] = foreign.format(key)
    for path, pair in pairs.items():
        if path not in shapes:
            found["module"] = f"expected target modules of the base model but received {path}"
        elif pair != {"A": (rank, shapes[path][1]), "B": (shapes[path][0], rank)}:
            found["shape"] = f"{path} of the base model is {shapes[path]}, the adapter's {pair} at rank {rank}"
    layers = {match[1] for path in pairs if (match := _EXPERT.fullmatch(path))}
    for path in shapes:
        if path not in pairs and (match := _EXPERT.fullmatch(path)) and match[1] in layers:
            found["expert"] = f"every expert of a layer needs LoRA on all its maps, and {path} has none"
    return list(found.values())


def _shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """(out, in) of every map that a server puts a LoRA on, by its name in the model and in its checkpoints."""
    held = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters() if p.ndim == 3}
    for path, module in model.named_modules():
        if kind := plain_linear(module):
            m: Any = module
            size = m.weight.shape[::-1] if kind == "in_out" else (m.out_features, m.in_features)
            held[f"{path}.weight"] = torch.empty(size, device="meta")
    named = held | dict(as_in_checkpoint(model, held))
    return {name.removesuffix(".weight"): tuple(value.shape) for name, value in named.items() if value.ndim == 2}
