"""The commands that look at what a context did: ``attribute``, ``dynamics``, ``inspect``, ``survey``."""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controllability.cli.files import new_path
from controllability.cli.output import Output
from controllability.cli.streams import say
from controllability.instrument import attribute as attributed, dynamics as followed, survey as surveyed
from controllability.instrument.surveys import process
from controllability.models import exact_mode, load_patch
from controllability.models.files.folders import written
from controllability.models.loading import load_model
from controllability.models.patches.parts import Parts
from controllability.rendering.study import Study

SHOWN = 20  # pairs without a patch


def attribute(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability attribute --help``."""
    own = {name: getattr(args, name) for name in ("permutations", "seed", "ablations")}
    return _on_model(args, output, lambda *given, **more: attributed(*given, **own, **more))


def dynamics(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability dynamics --help``."""
    return _on_model(args, output, lambda *given, **more: followed(*given, gradients=not args.skip_gradients, **more))


def inspect(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability inspect --help``."""
    out, mp = new_path(args.out), load_patch(args.patch)
    study = Parts(mp)
    made = {name: getattr(mp.report, name) for name in ("scope", "via", "route", "dtype")}
    return _shown(study, made | {"rows": study.records()}, out, output)


def survey(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability survey --help``.  Of several processes the first shows what it does, and the others what fails."""
    started, (rank, world) = time.perf_counter(), process()
    output.quiet = rank > 0
    if args.device == "cuda" and world > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    names = ("batch", "scope", "positions", "via", "route", "place")
    try:
        found = _run(args, output, surveyed, args.data, args.out, **{name: getattr(args, name) for name in names})
    except KeyboardInterrupt:
        say(f"controllability: {args.out} holds what was written so far: the same command goes on from there")
        raise
    if rank:
        return 0
    told = {
        "out": args.out,
        "pairs": found.pairs,
        "done": found.done,
        "rows": found.table.num_rows,
        "errors": found.errors,
    }
    output.result(told | {"processes": world, "seconds": time.perf_counter() - started})
    bad = [[str(one["line"]), one["id"] or "", one["error"]] for one in found.errors]
    if bad:
        output.table(
            f"{len(bad)} pairs without a patch",
            ["line", "id", "why"],
            bad[:SHOWN] + [["…", "", ""]] * (len(bad) > SHOWN),
        )
    output.text(f"{args.out}: {found.table.num_rows:,} rows of {found.done - len(bad):,} of {found.pairs:,} pairs")
    return int(not found.table.num_rows)


def _on_model(args: argparse.Namespace, output: Output, study_of: Callable[..., Any]) -> int:
    started, out = time.perf_counter(), new_path(args.out)
    names = ("chunks", "order", "answer", "via", "route", "place")
    study = _run(args, output, study_of, args.context, args.query, **{name: getattr(args, name) for name in names})
    return _shown(study, study.to_dict() | {"seconds": time.perf_counter() - started}, out, output)


def _run(args: argparse.Namespace, output: Output, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """``function`` of the model that is asked for, of what is given, with a bar."""
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        return function(model, tokenizer, *given, progress=progress, **options)


def _shown(study: Study, data: dict[str, Any], out: Path | None, output: Output) -> int:
    """Print what was found, and write picture and page."""
    if out is not None:
        with written(out) as folder:
            study.plot(folder / "study.png")
            study.to_html(folder / "study.html")
    output.result(data | {"out": None if out is None else str(out)})
    heading, *rows = study.table()
    output.table(study.title, heading, rows)
    output.text("\n".join(filter(None, [study.below(), f"saved to {out}: study.html, study.png" if out else ""])))
    return 0
