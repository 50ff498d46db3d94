"""What the benchmarks share: models of real shapes with random weights, and seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers

# (class, config): Gemma 3 1B as it is; the others with fewer layers than the released models, to fit into 6 GB
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1b": ("Gemma3", {
        "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "max_position_embeddings": 4096,
    }),
    "small": ("Gemma3", {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "sliding_window": 64,
        "max_position_embeddings": 4096,
    }),
    "llama": ("Llama", {
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    }),
    "mixtral": ("Mixtral", {
        "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
    }),
    "gptj": ("GPTJ", {
        "vocab_size": 50_400, "n_embd": 2048, "n_inner": 8192, "n_layer": 8, "n_head": 16, "rotary_dim": 64,
        "n_positions": 2048,
    }),
}  # fmt: skip
VOCABULARY = 8000  # token ids that every shape knows


def random_model(shape: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation mode with random weights, norms and biases included; the same for a seed and a shape."""
    kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = config_class(**(sizes | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None} | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (B, L)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def timed(action: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def warm(action: Callable[[], Any], times: int = 3) -> float:
    """Seconds of one run, the mean of ``times`` after one that is not counted."""
    action()
    return timed(lambda: [action() for _ in range(times)]) / times


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers with three significant digits."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
