"""Patched generation in seconds, numbers and bytes: ``python tests/benchmarks/generation.py``.

Gemma 3 1B shape with random weights in float32.  Parts, each a ratio of medians or a median of ratios within this run:

step      time per patched token (the contextual model's cached step, the sweep, the comparison) ÷ one cached decoding step
obvious   the obvious procedure's time per token ÷ ours, same tokens, for each length of prompt
batch     16 prompts of up to 64 tokens as one batch ÷ one after the other
numbers   numbers that one token's patch holds ÷ those of its dense ΔW
memory    peak resident memory of making and applying a patch ÷ that of the plain contextual pass, each in a new process

Prints JSON.  ``--shape small`` is a quick check that everything runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, median, random_ids, random_model, timed
from obvious import ObviousProcedure

import controllability as ct


def patched_steps(model: Any, ids: torch.Tensor, tokens: int) -> tuple[Any, list[float]]:
    """The generation, and the seconds between one token and the next: everything, without reading the prompt."""
    moments: list[float] = []
    done = ct.generate(
        model, ids, max_new_tokens=tokens, eos_token_id=None, control=False,
        on_step=lambda step: moments.append(time.perf_counter()),
    )  # fmt: skip
    return done, [b - a for a, b in itertools.pairwise(moments)]


def cached_steps(model: Any, ids: torch.Tensor, tokens: int) -> list[float]:
    """Seconds of each plain decoding step with a cache."""
    output = model(ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for _ in range(tokens - 1):
        token, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        started = time.perf_counter()
        output = model(token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return seconds


def step(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time per patched token ÷ one cached decoding step."""
    rows = []
    for length in args.prompts:
        ids = random_ids(1, length)
        patched_steps(model, ids, 2)  # warm: reads and checks the model once
        rounds = []
        for _ in range(args.rounds):
            plain = median(cached_steps(model, ids, args.tokens))
            done, seconds = patched_steps(model, ids, args.tokens)
            rounds.append({"plain": plain, "patched": median(seconds)})
        rows.append({
            "prompt": length, "ratio": median(r["patched"] / r["plain"] for r in rounds), "agreement": done.agreement,
            "relative_error": done.relative_error, "rounds": rounds,
        })  # fmt: skip
    return {"prompts": rows}


def obvious(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The obvious procedure ÷ ours, token by token."""
    procedure, rows = ObviousProcedure(model), []
    for length in args.prompts:
        ids = random_ids(1, length)
        done, ours = patched_steps(model, ids, args.rounds + 1)
        pairs, errors = [], []
        for t in range(1, args.rounds + 1):
            history = done.sequences[:, : length + t]
            started = time.perf_counter()
            wanted, patched = procedure.token(history)
            pairs.append({"obvious": time.perf_counter() - started, "ours": ours[t - 1]})
            errors.append(float((patched - wanted).abs().max() / wanted.abs().max()))
        rows.append({
            "prompt": length, "ratio": median(p["obvious"] / p["ours"] for p in pairs),
            "relative_error_obvious": max(errors), "relative_error": done.relative_error, "tokens": pairs,
        })  # fmt: skip
    return {"prompts": rows}


def batch(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """16 prompts of 34 to 64 tokens as one batch ÷ 16 single runs."""
    lengths = [64 - 2 * i for i in range(args.batch)]
    prompts = [random_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(p, (64 - n, 0)) for p, n in zip(prompts, lengths, strict=True)])
    mask = torch.arange(64)[None] >= 64 - torch.tensor(lengths)[:, None]
    options = {"max_new_tokens": args.tokens, "eos_token_id": None, "control": False}
    rounds = [
        {
            "batch": timed(lambda: ct.generate(model, ids, mask, **options)),
            "single": sum(timed(lambda p=p: ct.generate(model, p, **options)) for p in prompts),
        }
        for _ in range(args.rounds)
    ]
    return {"ratio": median(r["batch"] / r["single"] for r in rounds), "rounds": rounds}


def numbers(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What one token's patch holds."""
    target, source = _runs()
    mp = ct.patch_model(model, target, source)
    return {"patch": mp.numbers, "dense": mp.dense_numbers, "ratio": mp.numbers / mp.dense_numbers}


def memory(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident bytes of new processes: the plain contextual pass; the same and a patch made and applied."""
    del model
    found = {}
    for what in ("plain", "applied"):
        command = [sys.executable, __file__, "--shape", args.shape, "--peak-of", what]
        peaks = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(args.rounds)
        ]
        found[what] = {name: median(p[name] for p in peaks) for name in ("built", "peak")}
    return found | {"beyond": found["applied"]["peak"] / found["plain"]["peak"] - 1}


def peak_of(what: str, shape: str) -> dict[str, int]:
    """Resident bytes of this process with the model built, and the peak from then on."""
    model = random_model(shape)
    with contextlib.suppress(OSError):  # Linux: what building needed for a moment does not count
        Path("/proc/self/clear_refs").write_text("5")
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    target, source = _runs()
    for _ in range(3):
        model(**target)
        if what == "applied":
            mp = ct.patch_model(model, target, source)
            with mp.applied(model):
                model(**source)
    return {"built": built, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _runs() -> tuple[dict[str, Any], dict[str, Any]]:
    """The contextual pass over 65 tokens, and its last token alone."""
    target = {"input_ids": random_ids(1, 65), "logits_to_keep": 1, "use_cache": False}
    return target, target | {"input_ids": target["input_ids"][:, -1:], "position_ids": torch.tensor([[64]])}


PARTS = {"step": step, "obvious": obvious, "batch": batch, "numbers": numbers, "memory": memory}


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[s for s, (kind, _) in SHAPES.items() if kind == "Gemma3"], default="1b")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=5, help="also the number of tokens of the obvious procedure")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512], metavar="LENGTH")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peak-of", choices=("plain", "applied"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak_of(args.peak_of, args.shape)))
        return
    found: dict[str, Any] = {"shape": args.shape, "threads": torch.get_num_threads(), "tokens": args.tokens}
    model = random_model(args.shape) if set(args.parts) - {"memory"} else None
    for name in args.parts:
        if name == "memory":
            model = None  # the new processes need the room
        found[name] = PARTS[name](model, args)
        print(f"{name}: done", file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
