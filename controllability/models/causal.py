"""Whether what a model gives at a position depends on later ones."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from controllability.arrays import relative_error
from controllability.models.random_input import random_inputs
from controllability.models.reading_check import Checked
from controllability.models.running import result_of

LENGTH, FIRST = 8, 4
# relative differences that rounding explains; where more is seen nothing worse happens than more work
SAME = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.03}

_KNOWN: weakref.WeakKeyDictionary[Checked, bool] = weakref.WeakKeyDictionary()


def is_causal(model: nn.Module, checked: Checked) -> bool:
    """Whether earlier positions give the same when others follow: tried once, on random token ids."""
    if checked not in _KNOWN:
        drawn = random_inputs(model, {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}, length=LENGTH)
        with torch.no_grad():
            whole = result_of(model(**drawn))
            begun = result_of(model(**drawn | {"input_ids": drawn["input_ids"][:, :FIRST]}))
        per_position = whole.ndim == 3 and whole.shape[1] == LENGTH
        _KNOWN[checked] = per_position and relative_error(begun, whole[:, :FIRST]) <= SAME.get(whole.dtype, 0.0)
    return _KNOWN[checked]
