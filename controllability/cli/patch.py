"""The commands that work on a model directory: patch and verify."""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from controllability.cli.output import LAYER_COLUMNS, Output, layer_rows, number
from controllability.errors import BadInput, NotVerified
from controllability.models import ModelPatch, exact_mode, load_patch, patch_model
from controllability.models.files.folders import refuse_occupied
from controllability.models.loading import DTYPES, encode, load_model
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.positions import pair_positions
from controllability.models.reading.tolerances import VERIFIED


@dataclass(frozen=True)
class Comparison:
    """Logits of the patched and the unpatched source run against the target's, at the paired positions."""

    max_logit_error: float
    max_logit_error_unpatched: float
    relative_error: float
    kl: float
    top1_target: list[int]
    top1_patched: list[int]
    top1_unpatched: list[int]

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        numbers = (self.max_logit_error, self.max_logit_error_unpatched, self.relative_error, self.kl)
        return all(n == n and abs(n) != float("inf") for n in numbers)


def compare(target: torch.Tensor, patched: torch.Tensor, unpatched: torch.Tensor) -> Comparison:
    """All three (N, vocabulary)."""
    target, patched, unpatched = target.double(), patched.double(), unpatched.double()
    error, largest = (patched - target).abs().max(), target.abs().max()
    log_p, log_q = target.log_softmax(-1), patched.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).max().clamp_min(0)
    return Comparison(
        float(error), float((unpatched - target).abs().max()), float(error / largest) if largest > 0 else float(error), float(kl),
        target.argmax(-1).tolist(), patched.argmax(-1).tolist(), unpatched.argmax(-1).tolist(),
    )  # fmt: skip


@torch.no_grad()
def measure(model: Any, mp: ModelPatch) -> Comparison:
    """Fresh target, patched and unpatched runs of a patch's own inputs."""
    source_rows, target_rows = pair_positions(
        mp.inputs["target"], mp.inputs["source"], mp.scope, mp.inputs["positions"]
    )
    target = target_rows.of(model(**without_cache(model, mp.inputs["target"])).logits)
    unpatched = source_rows.of(model(**without_cache(model, mp.inputs["source"])).logits)
    with mp.applied(model):
        patched = source_rows.of(model(**without_cache(model, mp.inputs["source"])).logits)
    return compare(target, patched, unpatched)


def patch(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability patch --help``."""
    started = time.perf_counter()
    if args.out == "":
        raise BadInput("--out is empty: give a directory")
    out = Path(args.out) if args.out else None
    if out is not None:
        refuse_unusable(out)
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code)
    target, source = encode(tokenizer, args.context, args.query, args.positions)
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        mp = patch_model(model, target, source, args.scope, args.via, args.route, progress=progress)
        found = measure(model, mp)
    if out is not None and _verified(found, args.dtype):
        with output.busy("fingerprinting the weights and saving"):
            mp.save(out, model)
    return _report(
        args, output, mp, found, tokenizer, started, {"out": str(out) if out and _verified(found, args.dtype) else None}
    )


def verify(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability verify --help``."""
    started = time.perf_counter()
    mp = load_patch(args.patch)
    dtype = mp.report.dtype
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, dtype, args.trust_remote_code)
    with exact_mode() if dtype == "float64" else contextlib.nullcontext():
        found = measure(model, mp)
    args.dtype = dtype  # the one it was made in: other rounding would be other weights
    return _report(args, output, mp, found, tokenizer, started, {"out": str(args.patch)}, with_valid=True)


def _report(
    args: argparse.Namespace, output: Output, mp: ModelPatch, found: Comparison, tokenizer: Any, started: float,
    extra: dict[str, Any], with_valid: bool = False,
) -> int:  # fmt: skip
    valid = _verified(found, args.dtype)
    words = {k: _word(tokenizer, getattr(found, f"top1_{k}")[-1]) for k in ("target", "patched", "unpatched")}
    if not found.finite:
        raise NotVerified("verification failed: the logits are not finite; nothing was saved")
    data = {
        "max_logit_error": found.max_logit_error, "max_logit_error_unpatched": found.max_logit_error_unpatched,
        "relative_error": found.relative_error, "kl": found.kl, "top1_target": words["target"],
        "top1_patched": words["patched"], "top1_unpatched": words["unpatched"], "layers": mp.report.to_dict()["layers"],
        "numbers": mp.numbers, "dense_numbers": mp.dense_numbers, "seconds": time.perf_counter() - started,
    } | extra  # fmt: skip
    output.result(data | ({"valid": valid} if with_valid else {}))
    output.table("layers", LAYER_COLUMNS, layer_rows(mp.report.layers))
    output.text(
        f"next word   with context: {words['target']}   patched: {words['patched']}   without: {words['unpatched']}\n"
        f"largest logit error   patched: {number(found.max_logit_error)}   unpatched: {number(found.max_logit_error_unpatched)}\n"
        f"relative error: {number(found.relative_error)}   KL: {number(found.kl)}   (checked numerically in {args.dtype}, scope {mp.scope})\n"
        f"the patch holds {mp.numbers:,} numbers; the dense ΔW would hold {mp.dense_numbers:,}\n"
        + (f"saved to {extra['out']}\n" if extra["out"] and valid and not with_valid else "")
        + ("verified" if valid else f"NOT verified: the relative error is above {VERIFIED[DTYPES[args.dtype]]:g}")
    )
    return 0 if valid else 1


def _verified(found: Comparison, dtype: str) -> bool:
    """Whether every number is finite and the relative error within what the dtype's rounding explains."""
    return found.finite and found.relative_error <= VERIFIED[DTYPES[dtype]]


def _word(tokenizer: Any, token: int) -> str:
    """A token as text; its number where the vocabulary of the model is larger than the tokenizer's."""
    return tokenizer.convert_ids_to_tokens(token) or f"token {token}"


def refuse_unusable(out: Path) -> None:
    """Fail before the work, not after it."""
    refuse_occupied(out)
    existing = next((p for p in (out, *out.parents) if p.exists()), None)
    if existing is None or not existing.is_dir():
        raise BadInput(f"cannot write to {out}: {existing} is not a directory")
    import os

    if not os.access(existing, os.W_OK):
        raise BadInput(f"cannot write to {out}: no permission in {existing}")
