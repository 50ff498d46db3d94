"""``controllability generate``: the contextual model's tokens, and the same ones from patched weights without the context."""

import argparse
import contextlib
import math
import time
from typing import Any

import torch

from controllability.cli.output import Output, number
from controllability.cli.side_by_side import Transcript, live_view, numbers, plain_console, shown, side_by_side
from controllability.errors import BadInput, ControllabilityError, NotVerified
from controllability.models import exact_mode, generate as generate_tokens
from controllability.models.generation.steps import GeneratedToken, Generation
from controllability.models.loading import DTYPES, load_model
from controllability.models.protocol.run import sensitivity_of_token
from controllability.models.reading.token_text import word_after
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.report import Sensitivity
from controllability.models.tokens import with_special

INTERRUPTED = 130
LISTED = 10  # differences that are written out one by one
RUNS = ("target", "patched", "unpatched")


def generate(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability generate --help``."""
    started = time.perf_counter()
    options = _options(args)
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    prompts = [encoded(tokenizer, text, i, len(args.prompt)) for i, text in enumerate(args.prompt)]
    ids, mask = (x.to(args.device) for x in padded(prompts))
    transcript = Transcript(args.prompt, args.tokens, [[] for _ in prompts])
    reader = Reader(tokenizer, prompts, transcript, args.follow)
    stopped: BaseException | None = None
    with live_view(transcript) as show, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():

        def each(step: GeneratedToken) -> None:
            reader.read(step)
            show()

        try:
            generate_tokens(model, ids, attention_mask=mask, max_new_tokens=args.tokens, on_step=each, **options)
        except (ControllabilityError, KeyboardInterrupt) as error:
            if not transcript.steps:
                raise
            stopped = error  # what was done by then is shown
    if isinstance(stopped, ControllabilityError):
        _show(output, transcript, args.sample, stopped=True)
        raise stopped
    skipped = args.skip_sensitivity or stopped is not None
    with exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        # of the patch of one token, the last of the first prompt
        history = torch.tensor(reader.histories[:1], device=args.device)
        how = {"via": args.via, "route": args.route, "place": args.place}
        sensitivity = None if skipped else sensitivity_of_token(model, history, **how)
    return _report(args, output, transcript, stopped is not None, time.perf_counter() - started, sensitivity)


class Reader:
    """Turns the tensors of each step into rows of a transcript: text, ids and numbers of every prompt's token."""

    def __init__(self, tokenizer: Any, prompts: list[list[int]], transcript: Transcript, follow: str) -> None:
        self.tokenizer, self.transcript, self.follow = tokenizer, transcript, follow
        self.histories = [list(ids) for ids in prompts]

    def read(self, step: GeneratedToken) -> None:
        """Add one token to every prompt that has not ended."""
        rows = [self._row(step, b) if bool(step.active[b]) else None for b in range(len(self.histories))]
        for history, row in zip(self.histories, rows, strict=True):
            if row is not None:
                history.append(row[f"{self.follow}_id"])
        self.transcript.add(step, rows)

    def _row(self, step: GeneratedToken, sample: int) -> dict[str, Any]:
        found = step.of(sample)
        ids = {f"{name}_id": found.pop(name) for name in RUNS}
        found.pop("active")
        texts = {name: word_after(self.tokenizer, self.histories[sample], ids[f"{name}_id"]) for name in RUNS}
        return texts | ids | found


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, L): prompts of different lengths, padded on the left; what stands there is never read."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def encoded(tokenizer: Any, text: str, index: int, count: int) -> list[int]:
    """Ids of prompt ``index`` of ``count``, special tokens included.  Raises ``BadInput`` for one without tokens."""
    which = f"prompt {index + 1} of {count}" if count > 1 else "the prompt"
    if not text.strip():
        raise BadInput(f"{which} is empty")
    ids, _ = with_special(tokenizer, text)
    if not ids:
        raise BadInput(f"{which} has no tokens in this vocabulary")
    return ids


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of ``ct.generate``.  Raises ``BadInput`` before anything is loaded."""
    if args.tokens < 1:
        raise BadInput(f"--tokens must be at least 1, got {args.tokens}")
    drawing = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    given = {name: value for name, value in drawing.items() if value is not None}
    if given and not args.sample:
        raise BadInput(f"--{next(iter(given)).replace('_', '-')} says how tokens are drawn: add --sample")
    if args.temperature is not None and not (0 < args.temperature < math.inf):
        raise BadInput(f"--temperature must be above 0, got {args.temperature:g}")
    if args.top_k is not None and args.top_k < 1:
        raise BadInput(f"--top-k must be at least 1, got {args.top_k}")
    if args.top_p is not None and not (0 < args.top_p <= 1):
        raise BadInput(f"--top-p must be above 0 and at most 1, got {args.top_p:g}")
    if args.seed is not None and not (0 <= args.seed < 2**63):
        raise BadInput(f"--seed must lie in 0 … 2^63 − 1, got {args.seed}")
    how = {"via": args.via, "route": args.route, "follow": args.follow, "place": args.place}
    return how | ({"do_sample": True, "seed": 0} | given if args.sample else {})


def _report(
    args: argparse.Namespace, output: Output, transcript: Transcript, interrupted: bool, seconds: float,
    sensitivity: Sensitivity | None,
) -> int:  # fmt: skip
    found = transcript.summary
    measured = [v for sample in transcript.samples for row in sample for v in row.values() if isinstance(v, float)]
    if not all(map(math.isfinite, measured)):
        raise NotVerified(f"verification failed: logits are not finite; {args.dtype} may be too narrow for this model")
    valid = found.relative_error <= VERIFIED[DTYPES[args.dtype]]
    samples = [
        {"prompt": prompt, "tokens": tokens, "ended_early": len(tokens) < transcript.asked and not interrupted}
        for prompt, tokens in zip(transcript.prompts, transcript.samples, strict=True)
    ]
    different = [
        {"sample": b, "token": t, "rounding": None if args.sample else bool(transcript.steps[t].explained[b])}
        for t, b in found.mismatches
    ]
    output.result({
        "tokens": transcript.samples[0], "samples": samples, "agreement": found.agreement, "kl_max": found.kl_max, "tv_max": found.tv_max,
        "relative_error": found.relative_error, "max_logit_error": found.max_logit_error,
        "max_logit_error_unpatched": found.max_logit_error_unpatched, "different": different,
        "seconds_per_token": found.seconds_per_token, "dtype": args.dtype, "via": args.via, "route": args.route,
        "follow": args.follow, "sampled": args.sample, "verified": valid, "interrupted": interrupted, "seconds": seconds,
        "sensitivity": None if sensitivity is None else sensitivity.to_dict(),
    })  # fmt: skip
    _show(output, transcript, args.sample, interrupted)
    if sensitivity is not None:
        output.text(str(sensitivity))
    output.text(_verdict(args, found, valid))
    if interrupted:
        return INTERRUPTED
    return 0 if valid else 1


def _show(output: Output, transcript: Transcript, sampled: bool, stopped: bool) -> None:
    """The columns, the numbers, which tokens differ and why, and which prompts ended by themselves."""
    if output.as_json:
        return
    console = plain_console()
    console.print(side_by_side(transcript, console))
    output.text(numbers(transcript))
    mismatches = transcript.summary.mismatches
    for t, b in mismatches[:LISTED]:
        row = transcript.samples[b][t]
        texts = " and ".join(repr(shown(row[name], console)) for name in ("target", "patched"))
        output.text(
            f"prompt {b + 1}, token {t + 1} differs, {texts}: the two largest logits are {number(row['top1_gap'])} apart, "
            f"the logit error is {number(row['max_logit_error'])}"
        )
    if len(mismatches) > LISTED:
        output.text(f"and {len(mismatches) - LISTED} more")
    if mismatches and not sampled and transcript.summary.explained:
        output.text("rounding: they differ only where the two largest logits are closer than twice the logit error")
    if stopped:
        output.text(f"stopped after {len(transcript.steps)} of {transcript.asked} tokens; the model was not changed")
        return
    for b, sample in enumerate(transcript.samples):
        if len(sample) < transcript.asked:
            output.text(f"prompt {b + 1} ended by itself after {len(sample)} tokens")


def _verdict(args: argparse.Namespace, found: Generation, valid: bool) -> str:
    worst, tolerance = number(found.relative_error), VERIFIED[DTYPES[args.dtype]]
    if valid:
        return f"verified: the relative error is {worst} at most (checked numerically in {args.dtype})"
    hint = "" if args.dtype == "float64" else "; --dtype float64 tells rounding from a mistake"
    return f"NOT verified: the relative error is {worst}, above {tolerance:g}{hint}"
