"""How exact each dtype and route is: ``python tests/benchmarks/precision.py``.

The embedded trained model and a random Gemma 3 (4 layers, d 256), five pairs of runs each.  Every position of the source
is compared while the patch is applied; the last one after merging, once as it is and once corrected from layer to layer.
float64 runs in the exact mode.  Prints JSON, with ``--table`` the table of docs/precision.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from common import markdown
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import controllability as ct
from controllability.embedded.world import draw_worlds
from controllability.models import patch_model
from controllability.models.loading import DTYPES, encode, load_model

PAIRS = 5


def embedded(dtype: str) -> tuple[Any, list[Any]]:
    """The package's own model, and questions about five worlds."""
    model, tokenizer = load_model("embedded", dtype)
    worlds = draw_worlds(seed=30_000, count=PAIRS)
    return model, [encode(tokenizer, world.context, world.questions[0].text) for world in worlds]


def random_gemma(dtype: str) -> tuple[Any, list[Any]]:
    """Random weights, norm scales included; contexts of 64 tokens, queries of 8."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=32, max_position_embeddings=128, initializer_range=0.1,
        query_pre_attn_scalar=64,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    pairs = []
    for seed in range(PAIRS):
        ids = torch.randint(3, 512, (1, 72), generator=torch.Generator().manual_seed(seed))
        source = {"input_ids": ids[:, 64:], "position_ids": torch.arange(64, 72)[None]}
        pairs.append(({"input_ids": ids}, source))
    return model.to(DTYPES[dtype]), pairs


MODELS = {"embedded": embedded, "random Gemma 3": random_gemma}


@torch.no_grad()
def measure(model: Any, pairs: list[Any], route: str) -> dict[str, Any]:
    """One row: the worst of the pairs; agreement over all positions."""
    row: dict[str, Any] = {
        "logit_error": 0.0, "unpatched": 0.0, "amplification": 0.0, "merged": 0.0, "merged_corrected": 0.0, "same": 0,
        "positions": 0,
    }  # fmt: skip
    for target, source in pairs:
        mp = patch_model(model, target, source, route=route)
        wanted = mp.target_logits
        unpatched = model(**source).logits
        with mp.applied(model):
            patched = model(**source).logits
        last = patch_model(model, target, source, scope="last", route=route)
        merged = {}
        for name, corrected in (("merged", False), ("merged_corrected", True)):
            last.merge(model, corrected=corrected)
            merged[name] = last.merged_error(model).max_logit_error
            last.unmerge(model)
        found = merged | {
            "logit_error": float((patched - wanted).abs().max()),
            "unpatched": float((unpatched - wanted).abs().max()),
            "amplification": max(layer.amplification or 0.0 for layer in mp.report.layers),
        }
        row |= {name: max(row[name], value) for name, value in found.items()}
        row["same"] += int((patched.argmax(-1) == wanted.argmax(-1)).sum())
        row["positions"] += wanted.shape[0] * wanted.shape[1]
    return row


def rows(dtypes: list[str], routes: list[str]) -> Iterator[dict[str, Any]]:
    """Every model, dtype and route; a refusal takes the place of the numbers."""
    for name, make in MODELS.items():
        for dtype in dtypes:
            model, pairs = make(dtype)
            for route in routes:
                with ct.exact_mode() if dtype == "float64" else contextlib.nullcontext():
                    try:
                        found = measure(model, pairs, route)
                    except ct.ControllabilityError as refused:
                        found = {"refused": str(refused).splitlines()[0]}
                yield {"model": name, "dtype": dtype, "route": route} | found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--routes", nargs="+", default=["auto", "uniform", "secular", "scale"])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    found = list(rows(args.dtypes, args.routes))
    if not args.table:
        print(json.dumps(found, indent=1))
        return
    numbers = ("unpatched", "logit_error", "merged", "merged_corrected", "amplification")
    shown = []
    for row in found:
        agreed = f"{row['same']}/{row['positions']}" if "same" in row else "refused"
        shown.append([row["model"], row["dtype"], row["route"], *(_short(row.get(n)) for n in numbers), agreed])
    print(markdown(["model", "dtype", "route", *numbers, "same first choice"], shown))


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


if __name__ == "__main__":
    main()
