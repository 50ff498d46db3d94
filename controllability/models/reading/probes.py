"""Facts of a model that are tried on random input: whether its output's size counts, whether it is causal, whether a cache matters.  (new)"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.models.hooks.carried_patches import carried
from controllability.models.hooks.installation import HookStack
from controllability.models.reading.checked_reading import Checked
from controllability.models.reading.inputs import leaves_gaps, uses_cache
from controllability.models.reading.logits import result_of
from controllability.models.reading.model_facts import takes_cache
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
            with HookStack() as installation:
                installation.after(module, lambda x, output, factor=factor: _times(output, factor))
                found = result_of(model(**inputs))
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


def cache_settled(model: nn.Module, checked: Checked, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with ``use_cache`` as the caller's run has it where that changes what is computed; elsewhere without.

    It does where positions leave gaps, and where a layer finds another one's entries in its place of the cache.
    """
    if not takes_cache(model):
        return dict(inputs)
    rest = {name: value for name, value in inputs.items() if name != "use_cache"}
    matters = leaves_gaps(inputs) or _cache_matters(model, checked, rest)
    return rest | ({"use_cache": uses_cache(model, inputs)} if matters else {})


def _cache_matters(model: nn.Module, checked: Checked, example: Mapping[str, Any]) -> bool:
    """Whether a first run with a cache gives something else than one without: tried once, on random input."""
    if "cache" in checked.tried:
        return checked.tried["cache"]
    drawn = random_inputs(model, example)
    if leaves_gaps(drawn):
        del drawn["position_ids"]  # padding was there, whose mask is left out
    found = False
    with suppress(Exception), torch.no_grad():  # whatever the model's own code may raise, or a patch that is on it
        with_it, without = (result_of(model(**drawn | {"use_cache": each})) for each in (True, False))
        found = not relative_error(with_it, without) <= VERIFIED[without.dtype]
    if not carried(model):
        checked.tried["cache"] = found
    return found
