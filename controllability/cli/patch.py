"""The commands that make, verify and export a patch."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controllability.cli.files import new_path
from controllability.cli.output import Output, number
from controllability.cli.servable import export_servable
from controllability.errors import BadInput, ControllabilityError, NotVerified, PatchError, in_a_line
from controllability.models import ModelPatch, exact_mode, load_patch, patch_model
from controllability.models.files.server_rules import refuse_rank
from controllability.models.hooks.own_modes import own_modes
from controllability.models.loading import DTYPES, encode, load_model, on_device
from controllability.models.patches.measured import measure_sensitivity, sensitivity_of
from controllability.models.reading.heads import Runs, compare_results, without_logits
from controllability.models.reading.logits import LogitComparison
from controllability.models.reading.positions import pair_positions
from controllability.models.reading.token_text import word
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.report import EXPLAINED, Sensitivity
from controllability.models.tokens import how_joined, joined_text
from controllability.rendering.text import printable


@dataclass(frozen=True, eq=False)
class Measured:
    """The patched and the unpatched source run against the target's, at the paired positions.

    ``top1`` holds the likeliest token of the last pair in each run.
    """

    patched: LogitComparison
    unpatched: LogitComparison
    top1: dict[str, int]

    def verified(self, dtype: str) -> bool:
        """Whether every number is finite and the relative error within what the dtype's rounding explains."""
        return self.finite and self.patched.relative_error <= VERIFIED[DTYPES[dtype]]

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        return self.patched.finite and self.unpatched.finite


def measure(model: Any, mp: ModelPatch) -> Measured:
    """Fresh target, patched and unpatched runs of a patch's own inputs."""
    inputs = mp.inputs
    source_rows, target_rows = pair_positions(inputs["target"], inputs["source"], mp.scope, inputs["positions"])
    with own_modes(model), Runs(model, without_logits(model, [inputs["target"], inputs["source"]])) as run:
        target, unpatched = run(inputs["target"]).at(target_rows), run(inputs["source"]).at(source_rows)
        with mp.applied(model):
            patched = run(inputs["source"]).at(source_rows)
    found, without = compare_results(target, patched, unpatched)
    best = {"target": found.best_wanted, "patched": found.best, "unpatched": without.best}
    return Measured(found, without, {name: int(tokens[-1]) for name, tokens in best.items()})


def patch(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability patch --help``."""
    started = time.perf_counter()
    out = new_path(args.out)
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    inputs = encode(tokenizer, args.context, args.query, args.positions)
    target, source = (on_device(one, args.device) for one in inputs)
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        mp = patch_model(model, target, source, args.scope, args.via, args.route, progress=progress, place=args.place)
        found = measure(model, mp)
        sensitivity = None if args.skip_sensitivity else sensitivity_of(mp, model)
    saved = out if found.verified(args.dtype) else None
    if saved is not None:
        with output.busy("fingerprinting the weights and saving"):
            mp.save(saved, model)
    joined = how_joined(tokenizer, args.context, args.query, target["input_ids"][0].tolist())
    extra = {"out": str(saved) if saved else None, "joined": joined}
    return _report(args, output, mp, found, tokenizer, started, extra, sensitivity)


def verify(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability verify --help``."""
    started = time.perf_counter()
    mp = load_patch(args.patch)
    dtype = mp.report.dtype
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, dtype, args.trust_remote_code, args.device)
    mp.refuse_misuse(model)  # its tokens may be none of another model's
    mp.inputs |= {role: on_device(mp.inputs[role], args.device) for role in ("target", "source")}
    with _as_written(args.patch), exact_mode() if dtype == "float64" else contextlib.nullcontext():
        found = measure(model, mp)
        sensitivity = None if args.skip_sensitivity else measure_sensitivity(mp, model)
    args.dtype = dtype  # the one it was made in: other rounding would be other weights
    return _report(args, output, mp, found, tokenizer, started, {"out": str(args.patch)}, sensitivity, with_valid=True)


def _report(
    args: argparse.Namespace, output: Output, mp: ModelPatch, found: Measured, tokenizer: Any, started: float,
    extra: dict[str, Any], sensitivity: Sensitivity | None, with_valid: bool = False,
) -> int:  # fmt: skip
    valid, patched, unpatched = found.verified(args.dtype), found.patched, found.unpatched
    words = {run: word(tokenizer, token) for run, token in found.top1.items()}
    shown = {run: printable(text) for run, text in words.items()}
    kl = float(patched.kl.max())
    if not found.finite:
        raise NotVerified("verification failed: the logits are not finite; nothing was saved")
    data = {
        "max_logit_error": patched.max_logit_error, "max_logit_error_unpatched": unpatched.max_logit_error,
        "relative_error": patched.relative_error, "kl": kl, "top1_target": words["target"],
        "top1_patched": words["patched"], "top1_unpatched": words["unpatched"], "layers": [asdict(layer) for layer in mp.report.layers],
        "sensitivity": None if sensitivity is None else sensitivity.to_dict(),
        "numbers": mp.numbers, "dense_numbers": mp.dense_numbers, "seconds": time.perf_counter() - started,
    } | extra  # fmt: skip
    output.result(data | ({"valid": valid} if with_valid else {}))
    heading, *rows = mp.report.rows()
    output.table("layers", heading, rows)
    allowed = f"{VERIFIED[DTYPES[args.dtype]]:g}"
    reached = (
        f"verified: patched as with the context, to {allowed} of the largest logit, at {len(mp.rows.sample)} positions"
    )
    output.text(
        f"{EXPLAINED}\n"
        f"next word   with context: {shown['target']}   patched: {shown['patched']}   without: {shown['unpatched']}\n"
        f"largest logit error   patched: {number(patched.max_logit_error)}   unpatched: {number(unpatched.max_logit_error)}\n"
        f"relative error: {number(patched.relative_error)}   KL: {number(kl)}   (checked numerically in {args.dtype}, scope {mp.scope})\n"
        f"the patch holds {mp.numbers:,} numbers; the dense ΔW would hold {mp.dense_numbers:,}\n"
        + (f"{joined_text(extra['joined'])}\n" if "joined" in extra else "")
        + (f"{sensitivity}\n" if sensitivity is not None else "")
        + (f"saved to {extra['out']}\n" if extra["out"] and valid and not with_valid else "")
        + (reached if valid else f"NOT verified: the relative error is above {allowed}")
    )
    return 0 if valid else 1


@contextlib.contextmanager
def _as_written(patch: str) -> Iterator[None]:
    """What fails in this context, on the weights that the patch was made for, fails because its files were changed."""
    try:
        yield
    except (ControllabilityError, OSError, MemoryError):
        raise
    except Exception as error:
        raise PatchError(f"{patch} is damaged: {type(error).__name__}: {in_a_line(error)}") from error


def export(args: argparse.Namespace, output: Output) -> int:
    """Write a saved patch as a PEFT adapter; see ``controllability export --help``."""
    started = time.perf_counter()
    directory = new_path(args.peft, "--peft") or new_path(args.out)
    assert directory is not None
    if args.servable is None and (args.max_rank is not None or args.moments is not None):
        raise BadInput("--max-rank and --moments belong to --servable")
    refuse_rank(args.servable or "peft", args.max_rank)
    mp = load_patch(args.patch)
    mp.refuse_several("held by one adapter")  # before the model is loaded
    # the directory or file that it was made on, if it is still there: nothing is downloaded unasked
    name = args.model or (mp.model_name if mp.model_name and Path(mp.model_name).exists() else "")
    model: Any = None
    if name:
        with output.busy(f"loading {name}"):
            model, _ = load_model(name, mp.report.dtype, args.trust_remote_code, args.device)
        mp.inputs |= {role: on_device(mp.inputs[role], args.device) for role in ("target", "source")}
    if args.servable is not None:
        with _as_written(args.patch):
            return export_servable(args, output, mp, directory, model)
    with output.busy("writing the adapter and loading it with peft"), _as_written(args.patch):
        done = mp.export_peft(directory, model)
    data = done.to_dict()
    data |= {"out": data.pop("directory"), "model": name or None, "seconds": time.perf_counter() - started}
    output.result(data)
    whole = "".join(f"\n  {module}" for module in done.dense)
    output.text(
        f"{directory}: {' and '.join(done.files)}, {done.low_rank} matrices of low rank (up to {done.rank})"
        + (f"\nsaved whole, because PEFT has no LoRA for vectors:{whole}" if whole else "")
        + (f"\nmodel: {name}" if name else "")
    )
    if done.verified:
        output.text(
            f"verified: peft loads it, and its output is the patched model's{', ' * bool(done.check.note)}{done.check.note} "
            f"(relative error {number(done.check.error)}; unpatched: {number(done.check.unpatched)})"
        )
    else:
        output.text(done.check.note + ("" if name else "; --model MODEL would check it"))
    return 0
