"""``controllability moments``: the metric of ordinary text, made once for a model, in a file from which an interrupted run goes on."""

import argparse
import contextlib
import time
from pathlib import Path

from controllability.cli.files import new_path
from controllability.cli.output import Output
from controllability.cli.streams import say
from controllability.compiling.corpus import ordinary_moments
from controllability.errors import BadInput
from controllability.models import exact_mode, second_moments
from controllability.models.loading import load_model
from controllability.models.reading.model_facts import position_limit, text_config
from controllability.texts import read_text


def moments(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability moments --help``."""
    started = time.perf_counter()
    if not (args.out.strip() and Path(args.out).exists()):
        new_path(args.out, file=True)
    lines = None if args.texts is None else read_text(args.texts, "the texts").splitlines()
    texts, without = [line for line in lines or [] if line.strip()], args.context or ""
    if lines is not None and not texts:
        raise BadInput(f"the texts {args.texts} are empty: write one text a line")
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        try:
            if texts:
                found = second_moments(model, texts, tokenizer, progress, args.out, without, args.place)
            else:
                limit = position_limit(text_config(model))
                found = ordinary_moments(
                    model, tokenizer, limit, progress, save=args.out, without=without, place=args.place
                )
        except KeyboardInterrupt:
            if Path(args.out).exists():
                say(f"controllability: {args.out} holds what was read so far: the same command goes on from there")
            raise
    with output.busy("measuring conditions"):
        conditions = found.condition.values()
    data = {"tokens": found.tokens, "matrices": len(conditions), "condition": [min(conditions), max(conditions)]}
    output.result(data | {"out": args.out, "model": args.model, "seconds": time.perf_counter() - started})
    low, high = data["condition"]
    output.text(
        f"{args.out}: second moments of {len(conditions)} matrices over {found.tokens:,} tokens, condition numbers {low:.0f} to "
        f"{high:.0f}\nuse them: controllability compile {args.model} … --moments {args.out}"
    )
    return 0
