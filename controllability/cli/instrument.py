"""The commands that look at what a context did: ``attribute``, ``dynamics``, ``inspect``."""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from controllability.cli.files import new_path
from controllability.cli.output import Output
from controllability.instrument import attribute as attributed, dynamics as followed
from controllability.models import exact_mode, load_patch
from controllability.models.files.folders import written
from controllability.models.loading import load_model
from controllability.models.patches.parts import Parts
from controllability.rendering.study import Study


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


def _on_model(args: argparse.Namespace, output: Output, study_of: Callable[..., Any]) -> int:
    started, out = time.perf_counter(), new_path(args.out)
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    options = {name: getattr(args, name) for name in ("chunks", "order", "answer", "via", "route", "place")}
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        study = study_of(model, tokenizer, args.context, args.query, progress=progress, **options)
    return _shown(study, study.to_dict() | {"seconds": time.perf_counter() - started}, out, output)


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
