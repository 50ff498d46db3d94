"""Target run + one solving sweep, against the plain target and source passes: ``python tests/benchmarks/sweep.py``.

Gemma 3 1B shape (d 1152, hidden 6912, 26 layers, vocabulary 262,144) with random weights in float32,
a context of 64 tokens and a query of 1.  Prints JSON; the ratio is the median of the rounds, each
round measuring both sides one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import controllability as ct

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "small": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "sliding_window": 64,
    },
}  # fmt: skip


def random_model(shape: str) -> Gemma3ForCausalLM:
    """Random weights, norm scales included."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(max_position_embeddings=4096, **SHAPES[shape])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def timed(action: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--query", type=int, default=1)
    args = parser.parse_args()
    model = random_model(args.shape)
    ids = torch.randint(0, 8000, (1, args.context + args.query), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(args.context, args.context + args.query)[None]
    target = {"input_ids": ids, "logits_to_keep": args.query, "use_cache": False}
    source = {
        "input_ids": ids[:, args.context :],
        "position_ids": positions,
        "logits_to_keep": args.query,
        "use_cache": False,
    }
    mp = ct.patch_model(model, target, source)  # warm: reads and checks the model once
    wanted, unpatched = model(**target).logits, model(**source).logits
    rounds = []
    for _ in range(args.rounds):
        plain_target, plain_source = timed(lambda: model(**target)), timed(lambda: model(**source))
        solved = timed(lambda: ct.patch_model(model, target, source))
        with mp.applied(model):
            ready = timed(lambda: model(**source))
        rounds.append(
            {"plain_target": plain_target, "plain_source": plain_source, "patch_model": solved, "ready": ready}
        )

    def median(ratio: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(ratio(r) for r in rounds)

    print(json.dumps({
        "shape": args.shape, "context": args.context, "query": args.query, "threads": torch.get_num_threads(),
        "sweep_ratio": median(lambda r: r["patch_model"] / (r["plain_target"] + r["plain_source"])),
        "ready_patch_ratio": median(lambda r: r["ready"] / r["plain_source"]),
        "relative_error": float((mp.logits - wanted).abs().max() / wanted.abs().max()),
        "relative_error_unpatched": float((unpatched - wanted).abs().max() / wanted.abs().max()),
        "patch_numbers": mp.numbers, "dense_numbers": mp.dense_numbers, "rounds": rounds,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
