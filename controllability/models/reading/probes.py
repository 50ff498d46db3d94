"""Facts of a model that are tried on random input: whether its output's size counts, whether it is causal.  (new)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.models.hooks.installation import HookStack
from controllability.models.reading.checked_reading import Checked
from controllability.models.reading.logits import result_of
from controllability.models.reading.random_inputs import random_inputs
from controllability.models.reading.tolerances import CAUSAL, VERIFIED

FACTORS = (0.5, 2.0)


def sizes_are_free(model: nn.Module, checked: Checked, example: Mapping[str, Any]) -> bool:
    """Whether the model's output stays when the last layer's is half or twice as large: tried on random input."""
    last = checked.reading.layers[-1].output
    if last.when == "before":
        return False
    module = model.get_submodule(last.module)
    inputs = random_inputs(model, example)
    with torch.no_grad():
        plain = result_of(model(**inputs))
        for factor in FACTORS:
            installation = HookStack()
            installation.after(module, lambda x, output, factor=factor: _times(output, factor))
            try:
                found = result_of(model(**inputs))
            finally:
                installation.undo()
            if relative_error(found, plain) > VERIFIED[plain.dtype]:
                return False
    return True


def _times(output: Any, factor: float) -> Any:
    """A layer's output with its states larger by a factor."""
    if isinstance(output, Tensor):
        return output * factor
    return type(output)((output[0] * factor, *output[1:]))


LENGTH, FIRST = 8, 4


def is_causal(model: nn.Module, checked: Checked) -> bool:
    """Whether earlier positions give the same when others follow: tried once, on random token ids."""
    if "causal" not in checked.tried:
        drawn = random_inputs(model, {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}, length=LENGTH)
        with torch.no_grad():
            whole = result_of(model(**drawn))
            begun = result_of(model(**drawn | {"input_ids": drawn["input_ids"][:, :FIRST]}))
        per_position = whole.ndim == 3 and whole.shape[1] == LENGTH
        checked.tried["causal"] = per_position and relative_error(begun, whole[:, :FIRST]) <= CAUSAL[whole.dtype]
    return checked.tried["causal"]
