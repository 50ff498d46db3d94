"""Tools of the tests.  Each of them is itself tested to be able to fail (test_helpers.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from controllability.models import exact_mode


def tiny_gemma(
    layers: int = 2,
    d: int = 32,
    h: int = 64,
    vocab: int = 60,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> Gemma3ForCausalLM:
    """A random Gemma 3 whose norm scales are random as well; sliding and full attention mixed."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": d, "intermediate_size": h, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": d // 4, "max_position_embeddings": 128,
        "sliding_window": 8, "initializer_range": 0.1, "query_pre_attn_scalar": d // 4,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
    }  # fmt: skip
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(options | more))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def runs(
    context: int, query: int, batch: int = 1, vocab: int = 60, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(target, source) inputs: random tokens, the query at the positions it has in the target."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, context + query), generator=generator)
    positions = torch.arange(context, context + query)[None].expand(batch, -1)
    return {"input_ids": ids}, {"input_ids": ids[:, context:], "position_ids": positions}


def error(found: Any, wanted: Any) -> float:
    """max |difference| / max |target|, computed with NumPy alone: an oracle that shares no code with the package."""
    found = found.detach().double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    wanted = wanted.detach().double().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    assert found.shape == wanted.shape, f"shapes {found.shape} and {wanted.shape}"
    value = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
    assert np.isfinite(value), "the comparison is not a number"
    return value


def exactly(dtype: torch.dtype) -> Any:
    """The exact mode for float64, nothing for the others."""
    return exact_mode() if dtype == torch.float64 else contextlib.nullcontext()


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    """Whether every bit of the model is what it was, and the entries are in the same order."""
    now = model.state_dict()
    return list(now) == list(before) and all(
        torch.equal(now[n], v) and now[n].dtype == v.dtype for n, v in before.items()
    )


def hook_count(model: torch.nn.Module) -> int:
    """How many forward hooks are left on a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gemma_by_hand(params: Mapping[str, np.ndarray], v: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """A Gemma 3 feed-forward half in plain NumPy: the independent oracle for the expression."""

    def rms(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * (1 + w)

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    z = rms(v, params["pre_feedforward_layernorm.weight"])
    inner = gelu(z @ params["mlp.gate_proj.weight"].T) * (z @ params["mlp.up_proj.weight"].T)
    return v + rms(inner @ params["mlp.down_proj.weight"].T, params["post_feedforward_layernorm.weight"])
