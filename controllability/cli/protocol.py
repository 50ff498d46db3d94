"""``controllability protocol``: section 4 of the papers on one model, a row for each dtype and route."""

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

from controllability.cli.files import new_path
from controllability.cli.generate import INTERRUPTED, encoded, padded
from controllability.cli.output import Output, number
from controllability.cli.streams import say
from controllability.compiling.queries import read_queries
from controllability.embedded.world import draw_worlds
from controllability.errors import BadInput
from controllability.models import exact_mode
from controllability.models.loading import load_model
from controllability.models.protocol.rescale import rescaled
from controllability.models.protocol.run import Row, run_protocol
from controllability.rendering.protocol_figure import protocol_picture
from controllability.rendering.tables import aligned
from controllability.rendering.text import terminal_width, wrapped

# our own: those of the paper are not public word for word
INSTRUCTIONS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse keeper who is afraid of the dark.",
    "Name three differences between a frog and a toad.",
    "Describe a day on Mars to a child of eight years.",
    "Give me a recipe for bread without yeast, step by step.",
)
COLUMNS = ("route", "same", "95 %", "alone", "ties", "KL", "TV", "error", "sensitivity")


def protocol(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability protocol --help``."""
    started, rows, divided, interrupted = time.perf_counter(), list[Row](), 1, False
    prompts, routes = _checked(args), [*dict.fromkeys(args.routes)]
    try:
        for dtype in dict.fromkeys(args.dtypes):
            narrow = args.rescale and dtype == "float16"
            with output.busy(f"loading {args.model}"):
                first = "float32" if narrow else dtype
                model, tokenizer = load_model(args.model, first, args.trust_remote_code, args.device)
                ids, mask = (x.to(args.device) for x in padded(_ids(args, tokenizer, prompts)))
                try:
                    model, divided = rescaled(model, {"input_ids": ids}) if narrow else (model, divided)
                except BadInput as refused:
                    rows += [Row(dtype, route, refused=str(refused)) for route in routes]
                    continue
            with output.progress() as progress, exact_mode() if dtype == "float64" else contextlib.nullcontext():
                for row in run_protocol(model, ids, mask, args.tokens, routes, progress, args.place):
                    rows.append(row)
            del model
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True  # what was done by then is shown
    data = [row.to_dict() for row in rows]
    picture = str(protocol_picture(data, Path(args.picture))) if args.picture else None
    output.result({
        "rows": data, "model": args.model, "prompts": prompts, "rescaled": divided if args.rescale else None,
        "picture": picture, "interrupted": interrupted, "seconds": time.perf_counter() - started,
    })  # fmt: skip
    _show(output, data, f"{len(prompts)} prompts, {args.tokens} tokens", divided)
    tokens, differ, ties = (sum(row[name] or 0 for row in data) for name in ("tokens", "mismatches", "explained"))
    output.text(f"{tokens} tokens, {differ} differ, {differ - ties} of them by more than rounding explains")
    output.text(f"picture: {picture}" if picture else f"{time.perf_counter() - started:.1f} s")
    return INTERRUPTED if interrupted else int(not tokens or differ > ties)


def _checked(args: argparse.Namespace) -> list[str]:
    """The prompts.  Raises ``BadInput`` before anything is loaded."""
    if args.tokens < 1:
        raise BadInput(f"--tokens must be at least 1, got {args.tokens}")
    out = new_path(args.picture, file=True)
    if out is not None and out.suffix not in (".svg", ".png"):
        raise BadInput(f"--out must be a file name in .svg or .png, got {args.picture!r}")
    if out is not None and not out.parent.is_dir():
        raise BadInput(f"cannot use {out.parent}: No such file or directory")
    if args.prompts is None:
        worlds = [f"{world.context} {world.questions[0].text}" for world in draw_worlds(seed=4, count=5)]
        return worlds if args.model == "embedded" else [*INSTRUCTIONS]
    found, notes = read_queries(args.prompts, "prompts")
    for note in notes:
        say(f"controllability: {note}")
    return [query.text for query in found]


def _ids(args: argparse.Namespace, tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    if not args.chat:
        return [encoded(tokenizer, text, i, len(prompts)) for i, text in enumerate(prompts)]
    if not tokenizer.chat_template:
        raise BadInput(f"--chat: the tokenizer of {args.model} has no chat template")
    chats = [[{"role": "user", "content": text}] for text in prompts]
    return [[*tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)] for c in chats]


def _show(output: Output, rows: list[dict[str, Any]], what: str, divided: int) -> None:
    """A table for each dtype, at most 80 columns wide, and the reasons of what was refused."""
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of = [row for row in rows if row["dtype"] == dtype]
        output.text(f"{dtype}, {what}" + f", states ÷ {divided}" * (divided > 1 and dtype == "float16"))
        output.text(aligned([COLUMNS, *map(_cells, of)]))
        for reason in dict.fromkeys(row["refused"] for row in of if row["refused"]):
            routes = ", ".join(row["route"] for row in of if row["refused"] == reason)
            output.text("\n".join(wrapped(f"{routes}: {reason}", min(80, terminal_width()), "", "    ")))
        output.text("")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["refused"] is not None:
        return row["route"], "refused", *[""] * (len(COLUMNS) - 2)
    same, (low, high) = row["tokens"] - row["mismatches"], (f"{100 * end:.0f}" for end in row["agreement_interval"])
    numbers = (number(row[name]) for name in ("kl_max", "tv_max", "max_logit_error", "sensitivity"))
    alone, ties = f"{row['agreement_unpatched']:.0%}", f"{row['explained']}/{row['mismatches']}"
    return row["route"], f"{same}/{row['tokens']}", f"{low}–{high}", alone, ties, *numbers
