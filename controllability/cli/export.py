"""The command that writes a saved patch as a PEFT adapter."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from controllability.cli.output import Output, number
from controllability.cli.patch import refuse_unusable
from controllability.errors import BadInput
from controllability.models import ModelPatch, load_patch
from controllability.models.loading import load_model


def export(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability export --help``."""
    started = time.perf_counter()
    if not args.peft:
        raise BadInput("--peft is empty: give a directory")
    directory = Path(args.peft)
    refuse_unusable(directory)
    mp = load_patch(args.patch)
    mp.refuse_several("held by one adapter")  # before the model is loaded
    name = args.model or _remembered(mp)
    model: Any = None
    if name:
        with output.busy(f"loading {name}"):
            model, _ = load_model(name, mp.report.dtype, args.trust_remote_code)
    with output.busy("writing the adapter and loading it with peft"):
        done = mp.export_peft(directory, model)
    data = done.to_dict()
    output.result(
        data | {"out": data.pop("directory"), "model": name or None, "seconds": time.perf_counter() - started}
    )
    whole = "".join(f"\n  {module}" for module in done.dense)
    output.text(
        f"{directory}: {' and '.join(done.files)}, {done.low_rank} matrices of low rank (up to {done.rank})"
        + (f"\nsaved whole, because PEFT has no LoRA for vectors:{whole}" if whole else "")
        + (f"\nmodel: {name}" if name else "")
    )
    if done.verified:
        output.text(
            f"verified: peft loads it, and its output is the patched model's (relative error {number(done.check.error)}; "
            f"unpatched: {number(done.check.unpatched)})"
        )
    else:
        output.text(done.check.note + ("" if name else "; --model MODEL would check it"))
    return 0


def _remembered(mp: ModelPatch) -> str:
    """The model directory that the patch was made on, if it is still there; nothing is downloaded unasked."""
    return mp.model_name if mp.model_name and Path(mp.model_name).is_dir() else ""
