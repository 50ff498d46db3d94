"""Tiny GGUF files, written by the package gguf as converters write them: no download, a second at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz.?"]
WORDS = [*TOKENS, "▁a", "▁b", "an", "▁an", "ab"]
D, H, LAYERS, HEADS, KV, HEAD = 32, 64, 2, 4, 2, 8


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, by the names that GGUF has for them."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(WORDS), D), "output_norm.weight": (D,)}
    if kind == "llama":
        found["output.weight"] = (len(WORDS), D)
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        found |= {
            f"{b}attn_q.weight": (HEADS * HEAD, D), f"{b}attn_k.weight": (KV * HEAD, D), f"{b}attn_v.weight": (KV * HEAD, D),
            f"{b}attn_output.weight": (D, HEADS * HEAD), f"{b}attn_norm.weight": (D,), f"{b}ffn_norm.weight": (D,),
            f"{b}ffn_gate.weight": (H, D), f"{b}ffn_up.weight": (H, D), f"{b}ffn_down.weight": (D, H),
        }  # fmt: skip
        if kind == "gemma3":
            found |= {f"{b}{norm}.weight": (D,) for norm in ("post_attention_norm", "post_ffw_norm")}
            found |= {f"{b}{norm}.weight": (HEAD,) for norm in ("attn_q_norm", "attn_k_norm")}
    return found


def numbers(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (0.3 * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes(kind).items()
    }


def write(
    path: Path, kind: str = "llama", packed: Any = None, tokenizer: bool = True, tensors: Any = None,
    facts: dict[str, int] | None = None,
) -> Path:  # fmt: skip
    """A model of two layers; ``packed`` is the type of its matrices, ``facts`` are numbers that overrule the true ones."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    of_model = {
        "context_length": 128, "embedding_length": D, "block_count": LAYERS, "feed_forward_length": H,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.sliding_window": 8, "vocab_size": len(WORDS), "rope.dimension_count": HEAD,
    }  # fmt: skip
    true = {f"{kind}.{key}": value for key, value in of_model.items()}
    true |= {f"tokenizer.ggml.{mark}_token_id": i for i, mark in enumerate(("padding", "eos", "bos", "unknown"))}
    for key, value in (true | (facts or {})).items():
        if tokenizer or not key.startswith("tokenizer"):
            writer.add_uint32(key, value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-6)
    if tokenizer:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(WORDS)
        writer.add_token_scores([float(-i) for i in range(len(WORDS))])
        writer.add_token_types([3 if i < 5 else 1 for i in range(len(WORDS))])
    for name, value in (numbers(kind) if tensors is None else tensors).items():
        if packed is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quantize(value, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
