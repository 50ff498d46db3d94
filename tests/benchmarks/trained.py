"""How exact and how usable patches of a trained model are: ``python tests/benchmarks/trained.py MODEL --dtype float32``.

Contexts of 20, 100 and 1,000 tokens, five queries each, both scopes, both theorems: relative error of the logits applied and merged (by
default), the sensitivity ratio, whether the merged model chooses the contextual model's token.  ``--rescale`` divides a Gemma 3's
embeddings and post norms by 32, which changes no logit and keeps float16 in range.  ``--ways`` measures in its place how far the
merged model's other ways to run (a cache, a batch, eager attention, compiled) are from its own run, beside the same of the plain model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from common import markdown

import controllability as ct
from controllability.embedded.world import draw_worlds
from controllability.models.loading import load_model

FACTS = "The harbour master of Eldmoor is called Anselm Pryce. He keeps three grey dogs and a brass telescope."
QUERIES = (
    " The harbour master is called", " The current director of the station is", " My favourite thing to do in winter is to",
    " In the end she decided", " Question: What is the name of the dog?\nAnswer:",
)  # fmt: skip
LENGTHS = (20, 100, 1000)


def runs(tokenizer: Any) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """(target, source), three contexts with five queries each."""
    long = " ".join(
        [FACTS, *(f"{world.context} {q.text}" for world in draw_worlds(1, 60) for q in world.questions[:2])]
    )
    ids = tokenizer(long)["input_ids"]
    for length in LENGTHS:
        for query in QUERIES:
            asked = tokenizer(query, add_special_tokens=False)["input_ids"]
            place = torch.arange(length, length + len(asked))[None]
            yield (
                {"input_ids": torch.tensor([ids[:length] + asked])},
                {"input_ids": torch.tensor([asked]), "position_ids": place},
            )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |difference| / max |target|."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def measure(model: Any, target: Any, source: Any, scope: str, via: Any) -> dict[str, float]:
    """One patch."""
    count = source["input_ids"].shape[1]
    wanted, plain = model(**target, logits_to_keep=count).logits.float(), model(**source).logits.float()
    mp = ct.patch_model(model, target, source, scope=scope, via=via)
    at = slice(-1, None) if scope == "last" else slice(None)
    with mp.applied(model):
        found = {"applied": relative(model(**source).logits.float()[:, at], wanted[:, at])}
    found |= {"unpatched": relative(plain[:, at], wanted[:, at]), "ratio": mp.sensitivity.ratio}
    if scope == "last":
        mp.merge(model)
        merged = model(**source).logits.float()
        mp.unmerge(model)
        first, second = wanted[0, -1].topk(2).values.tolist()
        error = float((merged[0, -1] - wanted[0, -1]).abs().max())
        same = bool(merged[0, -1].argmax() == wanted[0, -1].argmax())
        found |= {
            "merged": relative(merged[:, -1], wanted[:, -1]),
            "wrong": float(not same and first - second > 2 * error),
        }
    return found


def ways(model: Any, source: Any) -> dict[str, torch.Tensor]:
    """The last logits, by every way to run."""
    ids, place = source["input_ids"], source["position_ids"]
    found = {"alone": model(**source, use_cache=False).logits[0, -1]}
    past = model(input_ids=ids[:, :-1], position_ids=place[:, :-1], use_cache=True).past_key_values
    found["cache"] = model(input_ids=ids[:, -1:], position_ids=place[:, -1:], past_key_values=past).logits[0, -1]
    batch = {name: value.expand(4, -1) for name, value in source.items()}
    found["batch of 4"] = model(**batch, use_cache=False).logits[0, -1]
    model.set_attn_implementation("eager")
    found["eager attention"] = model(**source, use_cache=False).logits[0, -1]
    model.set_attn_implementation("sdpa")
    torch.compiler.reset()
    found["compiled"] = torch.compile(model)(**source, use_cache=False).logits[0, -1]
    return {way: logits.float() for way, logits in found.items()}


@torch.no_grad()
def other_ways(model: Any, target: Any, source: Any) -> dict[str, tuple[float, float]]:
    """(merged, plain) for each way: how far it is from the run by itself."""
    plain = ways(model, source)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.merge(model)
    merged = ways(model, source)
    mp.unmerge(model)
    return {
        way: (relative(merged[way], merged["alone"]), relative(plain[way], plain["alone"]))
        for way in plain if way != "alone"
    }  # fmt: skip


@torch.no_grad()
def rescale(model: Any, by: float = 32) -> None:
    """Divide a Gemma 3's residual stream: its norms do not see it."""
    model.model.embed_tokens.embed_scale.div_(by)
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.copy_((1 + norm.weight) / by - 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rescale", action="store_true")
    parser.add_argument("--ways", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    if args.rescale:
        rescale(model)
    model.to(getattr(torch, args.dtype))
    if args.ways:
        found = [other_ways(model, *pair) for pair in list(runs(tokenizer))[::4]]
        rows = [
            [args.dtype, way, *(max(row[way][i] for row in found) for i in (0, 1)), max(row[way][0] / max(row[way][1], 1e-9) for row in found)]
            for way in found[0]
        ]  # fmt: skip
        print(markdown(["dtype", "way to run", "merged", "plain", "largest quotient"], rows))
        return
    rows = []
    for scope in ("each", "last"):
        for via, theorem in (("input-output", "1"), ("output", "1b")):
            found = [measure(model, *pair, scope, via) for pair in runs(tokenizer)]
            most = lambda name: max((row[name] for row in found if name in row), default="–")  # noqa: B023, E731
            middle = median(row["ratio"] for row in found)
            wrong = f"{sum(row['wrong'] for row in found):.0f} of {len(found)}" if "wrong" in found[0] else "–"
            unpatched = min(row["unpatched"] for row in found)
            rows.append(
                [args.dtype, scope, theorem, unpatched, most("applied"), most("merged"), most("ratio"), middle, wrong]
            )
    columns = [
        "dtype",
        "scope",
        "theorem",
        "unpatched, least",
        "applied",
        "merged",
        "ratio, largest",
        "median",
        "another token",
    ]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
