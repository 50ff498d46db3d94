"""Section 4 of Goldwaser et al. on any local model: ``python tests/benchmarks/protocol.py MODEL_DIR``.

Five prompts, 20 tokens each, taken greedily.  The contextual model sees the prompt and the history; the patched model sees
the current token alone, at its absolute position, with the patches of every layer made anew for it.  Where they choose
different tokens, both go on with the contextual model's.  Every route in every dtype is a row of the table; a route that
does not exist on these numbers is a row that says so.

Without MODEL_DIR: the package's own trained model, and a Gemma 3 with random weights.  ``--prompts`` is a text file with one
prompt a line; ``--chat`` puts each into the tokenizer's chat template.  The columns:

tokens         how many were compared
agree          share on which both chose the same; ``without``: the same for the token alone, unpatched
differ         how many did not; ``rounding``: on how many of them the contextual model's two largest logits were
               closer than twice the measured logit error
relative       largest error of the logits over the largest logit; ``KL``: the largest, in nats
logit error    largest; ``unpatched``: of the token alone
max |Δm|       largest change of a norm scale, on every fifth token: what "exact" costs in conditioning
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import markdown, random_ids, random_model

import controllability as ct
from controllability.cli.generate import encoded, padded
from controllability.deltas import Shift
from controllability.embedded.world import draw_worlds
from controllability.models.loading import DTYPES, load_model

# own texts: those of the paper are not public word for word
INSTRUCTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse keeper who is afraid of the dark.",
    "Name three differences between a frog and a toad.",
    "Describe a day on Mars to a child of eight years.",
    "Give me a recipe for bread without yeast, step by step.",
)
WORLDS = tuple(f"{world.context} {world.questions[0].text}" for world in draw_worlds(seed=4, count=5))
RANDOM = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
COLUMNS = {
    "model": "model", "dtype": "dtype", "route": "route", "tokens": "tokens", "agreement": "agree",
    "agreement_unpatched": "without", "mismatches": "differ", "explained": "rounding", "relative_error": "relative",
    "kl_max": "KL", "max_logit_error": "logit error", "max_logit_error_unpatched": "unpatched", "scale_change": "max |Δm|",
}  # fmt: skip


def cell(model: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: int, route: str, every: int) -> dict[str, Any]:
    """One row: a route on a model of one dtype.  A refusal is a result."""
    try:
        done = ct.generate(model, ids, mask, tokens, route=route)
        change = scale_change(model, done, route, every)
    except ct.ControllabilityError as refused:
        return {"refused": " ".join(str(refused).split())}
    active = torch.stack([step.active for step in done.steps])
    same = torch.stack([step.target == step.unpatched for step in done.steps])[active]
    return {
        "tokens": int(active.sum()), "agreement": done.agreement, "agreement_unpatched": float(same.double().mean()),
        "mismatches": len(done.mismatches),
        "explained": sum(bool(done.steps[t].explained[b]) for t, b in done.mismatches),
        "relative_error": done.relative_error, "kl_max": done.kl_max, "max_logit_error": done.max_logit_error,
        "max_logit_error_unpatched": done.max_logit_error_unpatched, "scale_change": change,
        "seconds_per_token": done.seconds_per_token,
    }  # fmt: skip


def scale_change(model: Any, done: Any, route: str, every: int) -> float | None:
    """The largest |Δm| of a norm scale over every ``every``-th token; None where no scale moves."""
    largest = None
    for t, step in enumerate(done.steps):
        if t % every:
            continue
        for b in step.active.nonzero()[:, 0].tolist():
            position = int(step.position[b])
            end = done.sequences.shape[1] - len(done.steps) + t
            history = done.sequences[b : b + 1, end - position - 1 : end]
            source = {"input_ids": history[:, -1:], "position_ids": torch.tensor([[position]])}
            mp = ct.patch_model(model, {"input_ids": history}, source, route=route)
            for entry in mp.entries:
                if isinstance(entry.delta, Shift) and "norm" in entry.param.name:
                    largest = max(largest or 0.0, float(entry.delta.value.abs().max()))
    return largest


def models(args: argparse.Namespace) -> Iterator[tuple[str, str, Any, torch.Tensor, torch.Tensor]]:
    """(name, dtype, model, ids, mask), one model at a time."""
    for name in [args.model] if args.model else ["embedded", "random Gemma 3"]:
        for dtype in args.dtypes:
            if name == "random Gemma 3":
                lengths = (64, 57, 48, 33, 20)
                ids, mask = padded([random_ids(1, n, seed=n)[0].tolist() for n in lengths])
                yield name, dtype, random_model("small", DTYPES[dtype], **RANDOM), ids, mask
                continue
            model, tokenizer = load_model(name, dtype, args.trust_remote_code)
            texts = WORLDS if name == "embedded" else INSTRUCTIONS
            if args.prompts:
                texts = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
            if args.chat:
                chats = [[{"role": "user", "content": text}] for text in texts]
                prompts = [
                    tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats
                ]
            else:
                prompts = [encoded(tokenizer, text, i, len(texts)) for i, text in enumerate(texts)]
            yield Path(name).name, dtype, model, *padded(prompts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", nargs="?", help="written by save_pretrained, or a Hub id")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    parser.add_argument("--chat", action="store_true", help="put the prompts into the tokenizer's chat template")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16", "float16"])
    parser.add_argument("--routes", nargs="+", default=["auto", "scale", "secular", "uniform", "ball"])
    parser.add_argument(
        "--every", type=int, default=5, metavar="N", help="measure |Δm| on every N-th token (default 5)"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name, dtype, model, ids, mask in models(args):
        for route in args.routes:
            head = {"model": name, "dtype": dtype, "route": route}
            with ct.exact_mode() if dtype == "float64" else contextlib.nullcontext():
                rows.append(head | cell(model, ids, mask, args.tokens, route, args.every))
            print(f"{name}, {dtype}, {route}: done", file=sys.stderr)
    if args.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    print(markdown([*COLUMNS.values()], [[_shown(row, name) for name in COLUMNS] for row in rows]))
    for row in rows:
        if "refused" in row:
            print(f"\n{row['model']}, {row['dtype']}, {row['route']}: {row['refused']}")


def _shown(row: dict[str, Any], name: str) -> Any:
    if "refused" in row and name == "tokens":
        return "refused"
    value = row.get(name)
    return "–" if value is None else f"{value:.0%}" if name.startswith("agreement") else value


if __name__ == "__main__":
    main()
