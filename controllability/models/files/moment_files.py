"""Second moments on disk: one safetensors file, tied to the weights that they are of."""

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


def save_moments(moments: Moments, path: str | Path, model: nn.Module) -> Path:
    """Write the second moments of ``model`` into the new file ``path``.  Raises ``PatchError`` where it cannot be written."""
    path, model = Path(path), uncompiled(model)
    refuse_unusable(path, file=True)
    refuse_carried(model, "saving its moments")
    notes = {"format": FORMAT, "tokens": str(moments.tokens), "fingerprint": known_fingerprint(model)}
    with written(path, path.name) as folder:
        tensors = {name: metric.second.cpu().contiguous() for name, metric in moments.metrics.items()}
        save_file(tensors, folder / path.name, notes)
    return path


def load_moments(path: str | Path, model: nn.Module) -> Moments:
    """The second moments that ``save_moments`` wrote, float32.

    Raises ``PatchError`` for a file that is missing, damaged, of something else, or of another model than ``model``.
    """
    path, model = Path(path), uncompiled(model)
    tensors, notes, _ = read_tensors(path)
    tokens = notes.get("tokens", "")
    square = all(t.ndim == 2 and t.shape[0] == t.shape[1] and t.dtype == torch.float32 for t in tensors.values())
    if notes.get("format") != FORMAT or not (tokens.isascii() and tokens.isdecimal()) or not square:
        raise PatchError(f"{path} holds no second moments: save_moments(moments, path, model) writes them")
    refuse_carried(model, "reading its moments")
    if notes.get("fingerprint") != known_fingerprint(model):
        raise PatchError(f"the moments in {path} are of other weights (the fingerprints differ): make them anew")
    return Moments({name: Metric(second) for name, second in tensors.items()}, int(tokens))
