"""``controllability export --servable``: an adapter for a server, and what each server would say of it."""

import argparse
from pathlib import Path
from typing import Any

from controllability.cli.output import Output, number
from controllability.compiling.servable import export_servable as export
from controllability.errors import BadInput
from controllability.models import ModelPatch, load_moments


def export_servable(args: argparse.Namespace, output: Output, mp: ModelPatch, directory: Path, model: Any) -> int:
    """See ``controllability export --help``."""
    if model is None:
        raise BadInput("--servable compares with the model: name it, --model MODEL")
    moments = None if args.moments is None else load_moments(args.moments, model)
    with output.busy("writing the adapter and comparing"):
        done = export(mp, directory, args.servable, args.max_rank, model, moments)
    output.result(done)
    kl, needed = done["kl"], done["needed"]
    output.text(f"{directory}: a LoRA of rank {done['rank']} for {done['base'] or 'a model without a name'}")
    if done["refitted"]:
        output.text(
            "The patch moves norms, which servers refuse: fitted anew with every scale left alone, so not exact."
        )
    if needed > done["rank"]:
        now = f"{number(kl['adapter']['mean'])} nats on the queries, the patch {number(kl['patch']['mean'])}"
        output.text(f"It needs rank {needed} and was cut to {done['rank']}: {now}.")
    rows = [[name, *map(number, found.values())] for name, found in kl.items()]
    output.table("the queries, against the contextual model", ["model", "mean KL", "worst query"], rows)
    for server, found in done["verdicts"].items():
        said = f"no: {'; '.join(found['reasons'])}" if found["reasons"] else f"yes {found['flags']}"
        output.text(f"{server}: {said}".rstrip())
    return 0
