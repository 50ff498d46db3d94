"""A compiled context on disk: a patch, a PEFT adapter or a plain checkpoint, loaded again and measured before it counts."""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from architectures import quantised
from controllability.compiling import fresh_process
from controllability.compiling.exact_or_ridge import tolerance
from controllability.compiling.rank_figure import RankRow, rank_picture
from controllability.compiling.result import Compiled
from controllability.compiling.token_sets import padded
from controllability.compiling.yardstick import Yardstick, agreement, logits_of
from controllability.errors import BadInput, NotVerified
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.peft_check import on_twin
from controllability.models.model_patch import load_patch
from controllability.models.reading.tolerances import VERIFIED

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
