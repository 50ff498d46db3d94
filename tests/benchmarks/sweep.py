"""Target run + one solving sweep, against the plain target and source passes: ``python tests/benchmarks/sweep.py``.

Shapes: Gemma 3 1B (d 1152, hidden 6912, 26 layers, vocabulary 262,144), Llama, Mixtral (8 experts, 2 active) and GPT-J
at d ≥ 1024, each with random weights in float32; a context of 64 tokens and a query of 1.  Prints JSON, with ``--table``
a table; each ratio is the median of the rounds, each round measuring both sides one after the other.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import SHAPES, markdown, median, random_ids, random_model, timed, warm

import controllability as ct
from controllability.models.loading import load_model

FULL = ("1b", "llama", "mixtral", "gptj")


@torch.no_grad()
def measure(shape: str, context: int, query: int, rounds: int) -> dict[str, Any]:
    """One row: ratios of one shape or trained model, its errors beside those without a patch, and every round."""
    model = random_model(shape) if shape in SHAPES else load_model(shape)[0]
    ids = random_ids(1, context + query)
    target = {"input_ids": ids, "logits_to_keep": query, "use_cache": False}
    source = target | {"input_ids": ids[:, context:], "position_ids": torch.arange(context, context + query)[None]}
    mp = ct.patch_model(model, target, source)  # warm: reads and checks the model once
    ct.patch_model(model, target, source, place="mixer")
    wanted, unpatched = model(**target).logits, model(**source).logits
    seconds: list[dict[str, float]] = []
    for _ in range(rounds):
        row = {"plain_target": timed(lambda: model(**target)), "plain_source": timed(lambda: model(**source))}
        row["patch_model"] = timed(lambda: ct.patch_model(model, target, source))
        row["at_mixer"] = timed(lambda: ct.patch_model(model, target, source, place="mixer"))
        row["warm_source"] = warm(lambda: model(**source))
        with mp.applied(model):
            row["ready"] = warm(lambda: model(**source))
        seconds.append(row)
    return {
        "shape": shape, "parameters": sum(p.numel() for p in model.parameters()), "context": context, "query": query,
        "sweep_ratio": median(r["patch_model"] / (r["plain_target"] + r["plain_source"]) for r in seconds),
        "mixer_over_feed_forward": median(r["at_mixer"] / r["patch_model"] for r in seconds),
        "ready_patch_ratio": median(r["ready"] / r["warm_source"] for r in seconds),
        "relative_error": float((mp.logits - wanted).abs().max() / wanted.abs().max()),
        "relative_error_unpatched": float((unpatched - wanted).abs().max() / wanted.abs().max()),
        "patch_numbers": mp.numbers, "dense_numbers": mp.dense_numbers, "rounds": seconds,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape",
        nargs="+",
        default=["1b"],
        help=f"one of {' '.join(SHAPES)}, or a model directory; all: {' '.join(FULL)}",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--query", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    rows = [measure(shape, args.context, args.query, args.rounds) for shape in args.shape]
    if args.table:
        shown = (
            "shape",
            "sweep_ratio",
            "mixer_over_feed_forward",
            "ready_patch_ratio",
            "relative_error",
            "relative_error_unpatched",
        )
        print(markdown(shown, [[row[name] for name in shown] for row in rows]))
    else:
        print(json.dumps({"threads": torch.get_num_threads(), "shapes": rows}, indent=1))


if __name__ == "__main__":
    main()
