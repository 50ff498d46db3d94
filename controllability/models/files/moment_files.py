"""Second moments on disk: one safetensors file, tied to the weights that they are of; complete, or to be gone on with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from controllability.errors import PatchError
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.tensor_files import read_tensors
from controllability.models.hooks.carried_patches import refuse_carried, uncompiled
from controllability.models.moments import Metric, Moments
from controllability.models.reading.fingerprints import known_fingerprint

FORMAT = "controllability-moments"


@dataclass(frozen=True)
class Begun:
    """Sums over the first ``runs`` runs, whose inputs have the hash ``texts``; ``complete`` if there were no more."""

    moments: Moments
    runs: int = 0
    texts: str = ""
    complete: bool = False


NOTHING = Begun(Moments({}, 0))


def save_moments(moments: Moments, path: str | Path, model: nn.Module) -> Path:
    """Write the second moments of ``model`` into the new file ``path``.  Raises ``PatchError`` where it cannot be written.

    ``second_moments(..., save=path)`` writes them as they are made, and can be interrupted.

    >>> # path = ct.save_moments(moments, "moments.safetensors", model)
    """
    path, model = Path(path), uncompiled(model)
    refuse_unusable(path, file=True)
    refuse_carried(model, "saving its moments")
    write_begun(Begun(moments, complete=True), path, model)
    return path


def load_moments(path: str | Path, model: nn.Module) -> Moments:
    """The second moments that ``save_moments`` or ``second_moments`` wrote, float32.

    Raises ``PatchError`` for a file that is missing, damaged, unfinished, of something else, or of another model than ``model``.

    >>> # moments = ct.load_moments("moments.safetensors", model)
    """
    found = _read(Path(path), uncompiled(model))
    if not found.complete:
        raise PatchError(
            f"the moments in {path} are unfinished ({found.moments.tokens:,} tokens): make them again with the same texts and file, "
            "which goes on from there"
        )
    return found.moments


def begun(path: Path, model: nn.Module) -> Begun:
    """What a file holds to go on from; nothing, where there is none yet.  Raises ``PatchError``, also where it could not be written."""
    refuse_carried(model, "making its moments")
    if not path.exists():
        refuse_unusable(path, file=True)
        return NOTHING
    found = _read(path, model)
    if not found.texts:
        raise PatchError(
            f"{path} holds moments of texts that it does not remember: give a new file, or read it with load_moments"
        )
    return found


def write_begun(found: Begun, path: Path, model: nn.Module) -> None:
    """Write sums in place of those that are there."""
    notes = {
        "format": FORMAT, "tokens": str(found.moments.tokens), "fingerprint": known_fingerprint(model), "runs": str(found.runs),
        "texts": found.texts, "complete": str(found.complete),
    }  # fmt: skip
    with written(path, path.name) as folder:
        tensors = {name: metric.second.cpu().contiguous() for name, metric in found.moments.metrics.items()}
        save_file(tensors, folder / path.name, notes)


def _read(path: Path, model: nn.Module) -> Begun:
    tensors, notes, _ = read_tensors(path)
    tokens, runs = notes.get("tokens", ""), notes.get("runs", "0")  # older files have no runs, and are complete
    square = all(t.ndim == 2 and t.shape[0] == t.shape[1] and t.dtype == torch.float32 for t in tensors.values())
    counted = all(n.isascii() and n.isdecimal() and len(n) < 19 for n in (tokens, runs))
    if notes.get("format") != FORMAT or not counted or not square:
        raise PatchError(f"{path} holds no second moments: save_moments(moments, path, model) writes them")
    refuse_carried(model, "reading its moments")
    if notes.get("fingerprint") != known_fingerprint(model):
        raise PatchError(f"the moments in {path} are of other weights (the fingerprints differ): make them anew")
    moments = Moments({name: Metric(second) for name, second in tensors.items()}, int(tokens))
    return Begun(moments, int(runs), notes.get("texts", ""), notes.get("complete", "True") == "True")
