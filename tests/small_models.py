"""A tiny Llama and a tiny GPT-2 with random weights, and their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import controllability as ct


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | more))).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def logits_without(mp: ct.ModelPatch, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The last logits of the model as it was before the merge."""
    mp.unmerge(model)
    return logits(model, inputs)[:, -1]
