"""A compiled context on disk: a patch, a PEFT adapter or a plain checkpoint, loaded again and measured before it counts."""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from architectures import quantised
from controllability.compiling import fresh_process
from controllability.compiling.exact_or_ridge import patch_of, rank_of, tolerance
from controllability.compiling.metric_sweep import fitted
from controllability.compiling.result import Compiled
from controllability.compiling.token_sets import padded, repeated
from controllability.compiling.yardstick import Agreement, Yardstick, agreement, logits_of
from controllability.errors import BadInput, NotControllable, NotVerified, SideConditionFailed
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.peft_export import on_twin
from controllability.models.hooks.own_modes import own_modes
from controllability.models.model_patch import load_patch
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.target_run import Progress, silent
from controllability.rendering.figure import drawn, legend_below, two_plots

MOST = 6  # ranks that are tried


@dataclass(frozen=True)
class RankRow:
    """One rank and the agreement of a patch of that rank on each set."""

    rank: int
    exact: bool
    results: dict[str, Agreement]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"rank": self.rank, "exact": self.exact} | {k: v.to_dict() for k, v in self.results.items()}


def ranks_below(full: int, most: int = MOST) -> list[int]:
    """A handful of ranks from 1 up, each about the same multiple of the one before, all below ``full``.

    >>> ranks_below(64), ranks_below(3), ranks_below(1)
    ([1, 2, 4, 8, 16, 32], [1, 2], [])
    """
    steps = [round(full ** (i / most)) for i in range(most)]
    return sorted({rank for rank in steps if 1 <= rank < full})


def measure_by_rank(compiled: Compiled, model: Any, progress: Progress) -> list[RankRow]:
    """Least-squares patches of smaller ranks with the same λ, each measured on every set; the compiled one is the last row.

    A rank for which there is no patch is left out.
    """
    full = rank_of(compiled.patch)
    rows, ranks = [], ranks_below(full)
    solution, samples = compiled.solution, compiled.sets["queries"].samples
    wish = replace(solution.wish, ridge=solution.ridge, keep_rms=False)
    for i, rank in enumerate(ranks):
        try:
            if solution.plan is not None:
                patch = fitted(model, compiled.sets["queries"], solution.plan, rank, compiled.patch.moments, silent)
            else:
                patch = patch_of(model, repeated(samples), replace(wish, rank=rank), silent)
        except (SideConditionFailed, NotControllable, NotVerified):
            continue
        finally:
            progress("ranks", i + 1, len(ranks))
        with own_modes(model), patch.applied(model):
            rows.append(RankRow(rank, False, {k: yardstick.measure(model) for k, yardstick in compiled.sets.items()}))
    return [*rows, RankRow(full, compiled.exact, compiled.results)]


def rank_picture(compiled: Compiled, rows: list[RankRow], path: Path) -> Path:
    """Draw the rows to ``path`` (PNG, written atomically)."""
    ranks = [row.rank for row in rows]
    figure, (left, right) = two_plots()
    for name, label, colour in (("queries", "queries", "#2a6fbb"), ("heldout", "held-out queries", "#bb5a2a")):
        if name in compiled.sets:
            left.plot(ranks, [row.results[name].top1_agreement for row in rows], "o-", label=label, color=colour)
            without = compiled.sets[name].unpatched.top1_agreement
            left.axhline(without, linestyle=":", color=colour, label=f"{label}, unpatched")
    left.set(xlabel="rank", ylabel="same likeliest token as with the context", ylim=(-0.06, 1.06), title="agreement")
    right.plot(ranks, [row.results["unrelated"].kl for row in rows], "s-", color="#666666")
    right.set(xlabel="rank", ylabel="mean KL from the base model (nats)", title="drift on unrelated text")
    right.margins(y=0.15)
    right.set_ylim(bottom=-0.05 * right.get_ylim()[1])
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
    legend_below(left)
    return drawn(figure, path)


REPORT, PICTURE = "compile.json", "compile.png"
MINUTES = 30  # for a checkpoint to load and run in a process of its own


@dataclass(frozen=True)
class Written:
    """Where it is, what was written, and what it did when it had been loaded again (``verified``)."""

    directory: str
    kind: str
    files: list[str]
    verified: dict[str, Any]
    report: dict[str, Any]


def write(
    compiled: Compiled, model: Any, tokenizer: Any, directory: str | Path, kind: str = "patch",
    by_rank: list[RankRow] | None = None,
) -> Written:  # fmt: skip
    """Write a "patch", a "peft" adapter or "merged" weights into a new or empty directory, with the report and (``by_rank``) the picture.

    It is made beside its destination and takes its place when what was loaded from it has met the compiled model's logits on
    the queries.  Raises ``PatchError`` for what cannot be written, ``NotVerified``.
    """
    directory = Path(directory)
    refuse_unusable(directory)
    if kind not in _KINDS:
        raise BadInput(f"unknown kind {kind!r}: choose {', '.join(_KINDS)}")
    with written(directory) as folder:
        verified = _KINDS[kind](compiled, model, tokenizer, folder) | {"drifts": compiled.drifts}
        report = compiled.to_dict() | {"out": str(directory), "kind": kind, "verified": verified}
        if by_rank:
            rank_picture(compiled, by_rank, folder / PICTURE)
            report |= {"by_rank": [row.to_dict() for row in by_rank], "picture": str(directory / PICTURE)}
        report["files"] = sorted([*(path.name for path in folder.iterdir()), REPORT])
        (folder / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    return Written(str(directory), kind, report["files"], verified, report)


def _patch(compiled: Compiled, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    compiled.patch.save(folder, model)
    yardstick = compiled.sets["queries"]
    with load_patch(folder).applied(model):
        found = yardstick.found(model, alone=True)
    return _verified(compiled, model, found, "the patch, read from its files")


def _peft(compiled: Compiled, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    done = compiled.patch.export_peft(folder, model)
    if not done.verified:
        return {"passed": None, "how": done.check.note}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export_peft has heard them
        adapted = on_twin(model, folder).eval()
    found = logits_of(adapted, compiled.sets["queries"].samples, alone=True)
    return _verified(compiled, model, found, "the adapter, loaded by peft")


def _merged(compiled: Compiled, model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    compiled.patch.merge(model)
    try:
        with quantised.kept(model):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        compiled.patch.unmerge(model)
    found = in_fresh_process(folder, compiled.sets["queries"])
    return _verified(compiled, model, found, "the checkpoint, loaded by plain transformers in a process of its own")


_KINDS: dict[str, Callable[[Compiled, Any, Any, Path], dict[str, Any]]] = {
    "patch": _patch, "peft": _peft, "merged": _merged,
}  # fmt: skip


def in_fresh_process(folder: Path, yardstick: Yardstick) -> list[Tensor]:
    """The logits at the queries of a checkpoint that another process loads, without this package."""
    inputs = {str(i): padded([sample], "source")["input_ids"] for i, sample in enumerate(yardstick.samples)}
    with tempfile.TemporaryDirectory(prefix="controllability-") as scratch:
        files = [f"{scratch}/inputs.safetensors", f"{scratch}/logits.safetensors"]
        save_file(inputs, files[0])
        command = [sys.executable, "-P", fresh_process.__file__, str(folder), *files]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            raise NotVerified(
                f"the checkpoint did not load and run within {MINUTES} minutes; nothing was written"
            ) from None
        if run.returncode:
            why = (run.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise NotVerified(f"plain transformers cannot load and run the checkpoint: {why}; nothing was written")
        logits = load_file(files[1])
    return [logits[str(i)][0, sample.rows("source")] for i, sample in enumerate(yardstick.samples)]


def _verified(compiled: Compiled, model: Any, found: list[Tensor], how: str) -> dict[str, Any]:
    """The loaded one against the contextual model, and against the compiled model that it was made from."""
    yardstick = compiled.sets["queries"]
    result, same = agreement(found, yardstick.wanted), agreement(found, compiled.logits["queries"])
    allowed = tolerance(model)
    if compiled.solution.rounded:  # what rounding costs it anyway
        allowed = max(allowed, 2 * compiled.results["queries"].relative_error)
    if how.startswith("the checkpoint"):  # without the exact mode, transformers computes norms in float32
        allowed = max(allowed, VERIFIED[torch.float32])
    control = agreement(yardstick.without, compiled.logits["queries"]).relative_error
    misses = [same.relative_error, *([result.relative_error] if compiled.exact else [])]
    if max(misses) > allowed or (same.relative_error >= control > 0):
        raise NotVerified(
            f"verification failed: {how}, misses the compiled model's logits by {same.relative_error:.2g} and the contextual model's by "
            f"{result.relative_error:.2g} (relative; {allowed:g} counts as verified); nothing was written"
        )
    return {
        "passed": True, "how": how, **result.to_dict(), "from_compiled": same.relative_error, "tolerance": allowed,
    }  # fmt: skip
