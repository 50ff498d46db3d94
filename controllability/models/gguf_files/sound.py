"""Whether a GGUF file can be read, and its model built, before either is tried."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controllability.errors import BadInput
from controllability.models.gguf_files.head import Head
from controllability.models.transformers_parts import gguf_architectures

# what transformers reads under another name than its own list has
RENAMED = ("t5", "qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2")


def refuse_unsound(path: Path, head: Head) -> None:
    """Raise ``BadInput`` for tensors outside the file, types that cannot be unpacked, and whatever a model needs and lacks."""
    if not head.tensors:
        raise BadInput(
            f"{path} holds no tensors: it is a vocabulary or a part of a model; give the file with the weights"
        )
    _refuse_misplaced(path, head)
    kind = head.facts.get("general.architecture")
    if not isinstance(kind, str) or not kind:
        raise BadInput(f"{path} does not say its architecture (general.architecture): get the file again")
    if not _is_read(kind):
        raise BadInput(
            f"{path} is of the architecture {kind!r}, which transformers does not read from GGUF; "
            "give the directory of the original model"
        )
    parts = head.facts.get("split.count", 1)
    if parts not in (0, 1):
        raise BadInput(f"{path} is one of {parts} parts of a model; join them first (llama-gguf-split --merge)")
    _refuse_impossible_counts(path, head, kind)
    _refuse_scaled_positions(path, head, kind)
    _refuse_tokenless(path, head)


def _refuse_impossible_counts(path: Path, head: Head, kind: str) -> None:
    """A model is built of as many layers as the file says, before its weights are looked at."""
    counts = {what: head.facts.get(f"{kind}.{what}") for what in ("block_count", "embedding_length")}
    for what, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise BadInput(f"{path} is corrupt: its {kind}.{what} is {value!r}, not a number from 1 on")
    layers, experts = counts["block_count"], head.facts.get(f"{kind}.expert_count", 0)
    if layers is not None and layers > len(head.tensors):
        raise BadInput(f"{path} is corrupt: it announces {layers:,} layers and holds {len(head.tensors):,} tensors")
    longest = max(max(one.sizes) for one in head.tensors)
    if isinstance(experts, int | float) and experts > longest:
        raise BadInput(f"{path} is corrupt: it announces {experts:,} experts, and no tensor is longer than {longest:,}")


def _refuse_scaled_positions(path: Path, head: Head, kind: str) -> None:
    """transformers leaves out without a word how rotary frequencies are scaled, but for gpt-oss."""
    told = [one.name for one in head.tensors if one.name.startswith(("rope_freqs", "rope_factors"))]
    if kind != "gpt-oss":
        usual = {f"{kind}.rope.scaling.type": ("none",), f"{kind}.rope.scaling.factor": (0, 1)}
        said = {key: head.facts[key] for key in usual if key in head.facts}
        told += [f"{key} = {value}" for key, value in said.items() if value not in usual[key]]
    if told:
        raise BadInput(
            f"{path} scales its rotary frequencies ({', '.join(told)}), which transformers leaves out when it reads GGUF: "
            "the model would be another; give the directory of the original model"
        )


def _is_read(kind: str) -> bool:
    return kind in gguf_architectures() or any(part in kind for part in RENAMED)


def _refuse_misplaced(path: Path, head: Head) -> None:
    names: set[str] = set()
    room, taken = head.size - head.data_start, 0
    blocks = {kind: _block(kind) for kind in {one.kind for one in head.tensors}}
    for one in head.tensors:
        if one.name in names:
            raise BadInput(f"{path} is corrupt: the tensor {one.name!r} stands in it twice")
        names.add(one.name)
        block, size, known = blocks[one.kind]
        if not known:
            raise BadInput(
                f"{path}: the tensor {one.name!r} is of the type {_type_name(one.kind)}, which the reader cannot unpack; "
                "convert the file to another type, for example Q8_0"
            )
        if min(one.sizes) < 1 or one.sizes[0] % block:
            raise BadInput(f"{path} is corrupt: the tensor {one.name!r} has the shape {list(one.sizes)}")
        length = prod(one.sizes) // block * size
        if one.offset + length > room:
            raise BadInput(
                f"{path} is truncated or corrupt: the tensor {one.name!r} ends at byte {head.data_start + one.offset + length:,}, "
                f"the file at {head.size:,}; get the file again"
            )
        taken += length
    if taken > room:  # many names for the same bytes: unpacking them all would not end
        raise BadInput(f"{path} is corrupt: its tensors overlap")


def _block(kind: int) -> tuple[int, int, bool]:
    """(entries of a block, its bytes, whether it can be unpacked)."""
    import gguf

    try:
        known = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[known]
        gguf.dequantize(np.zeros((1, size), np.uint8), known)  # there is no table that says so
    except (ValueError, KeyError, NotImplementedError):
        return 1, 1, False
    return block, size, True


def _type_name(kind: int) -> str:
    import gguf

    try:
        return gguf.GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _refuse_tokenless(path: Path, head: Head) -> None:
    count = head.lengths.get("tokenizer.ggml.tokens", 0)
    kind = head.facts.get("tokenizer.ggml.model")
    if not count or not isinstance(kind, str):
        raise BadInput(f"{path} holds no tokenizer (tokenizer.ggml.model and .tokens): give a file that brings its own")
    order = ("merges",) if kind == "gpt2" else ("merges", "scores")
    if not any(head.lengths.get(f"tokenizer.ggml.{name}") for name in order):
        raise BadInput(f"{path} lacks the {' or '.join(order)} of its tokenizer: give a file that has them")
    for mark in ("bos", "eos", "unknown", "padding"):
        number = head.facts.get(f"tokenizer.ggml.{mark}_token_id", 0)
        if not isinstance(number, int) or not 0 <= number < count:
            raise BadInput(f"{path} is corrupt: its {mark} token has the number {number} of {count:,}")


def refuse_oversized(path: Path, head: Head, config: Any) -> None:
    """Raise ``BadInput`` where the described model is much larger than what the file holds: nothing is allocated for it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = sum(one.numel() for one in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(prod(one.sizes) for one in head.tensors)
    if wanted > 2 * held + 1_000_000:  # a little less is reported by name, later
        raise BadInput(f"{path} is corrupt: its model has {wanted:,} numbers, and its tensors hold {held:,}")
