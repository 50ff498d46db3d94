"""What a model is run on: inputs that it can take, and facts about it that are tried on random ones."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.errors import BadInput
from controllability.models.hooks.carried_patches import carried
from controllability.models.hooks.installation import HookStack
from controllability.models.reading.checked_reading import Checked
from controllability.models.reading.logits import result_of
from controllability.models.reading.model_facts import input_embedding, takes_cache, text_config
from controllability.models.reading.positions import input_shape
from controllability.models.reading.random_inputs import random_inputs, refuse_ids
from controllability.models.reading.tolerances import CAUSAL, VERIFIED
from controllability.models.transformers_parts import CACHE, cache_of

CACHES = *CACHE, "cache_params", "state"  # what families call what they hand on from token to token


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a run without a cache, for a model that knows of one and inputs that do not ask for it."""
    return ({"use_cache": False} if takes_cache(model) else {}) | dict(inputs)


def leaves_gaps(inputs: Mapping[str, Any]) -> bool:
    """Whether the positions are not one after the other, and no mask is given.

    Without a cache transformers takes such a row for several sequences, packed one behind the other.
    """
    positions = inputs.get("position_ids")
    apart = isinstance(positions, torch.Tensor) and bool((positions.diff(dim=-1) != 1).any())
    return apart and inputs.get("attention_mask") is None


def uses_cache(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model's own run on these inputs has a cache."""
    given = inputs.get("use_cache")
    default = cache_of(inputs) is not None or getattr(text_config(model), "use_cache", True)
    return bool(default if given is None else given)


def refuse_malformed(inputs: Mapping[str, Any], role: str) -> None:
    """Raise ``BadInput`` for inputs that are no tensors and plain values, or that ask for something else than a plain run."""
    for name, value in inputs.items() if isinstance(inputs, Mapping) else ():
        if not isinstance(name, str):
            raise BadInput(f"{role}: give the model's keyword arguments by name, got {name!r}")
        if isinstance(value, torch.Tensor) and (value.is_meta or value.layout is not torch.strided):
            raise BadInput(f"{role}: {name} must be a dense tensor with numbers, got {value.layout} on {value.device}")
    input_shape(inputs, role)
    for name, value in inputs.items():
        cache = name in CACHES and value is not None
        if cache or not _is_plain(value):
            why = "both runs begin with an empty cache" if cache else "it could not be saved or repeated"
            raise BadInput(f"{role}: {name} is a {type(value).__name__}; give tensors and plain values only ({why})")
        if isinstance(value, torch.Tensor) and bool(torch.isnan(value).any()):
            raise BadInput(f"{role}: {name} has NaN in it")
    if inputs.get("return_dict") is False:
        raise BadInput(f"{role}: return_dict=False is not supported")


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, a plain value, or a dict, list or tuple of such."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor | bool | int | float | str | None)


def refuse_bad_inputs(model: nn.Module, checked: Checked, inputs: Mapping[str, Any], role: str) -> None:
    """Raise ``BadInput`` for ids, positions or embeddings that the model cannot take."""
    batch, length = input_shape(inputs, role, checked.length)
    embedding = input_embedding(model)
    if embedding is None and isinstance(checked.embedding, nn.Embedding):
        embedding = checked.embedding.weight
    limit = checked.position_limit
    positions = inputs.get("position_ids")
    if positions is not None and (
        not isinstance(positions, torch.Tensor) or positions.shape not in ((batch, length), (1, length))
    ):
        raise BadInput(f"{role}: position_ids must be a tensor of shape {(batch, length)}")
    if positions is not None and (positions.dtype not in (torch.int64, torch.int32) or int(positions.min()) < 0):
        raise BadInput(
            f"{role}: position_ids must be integers from 0 on, got {positions.dtype} from {positions.min().item()}"
        )
    reach = length if positions is None else int(positions.max()) + 1
    if limit is not None and reach > limit:
        raise BadInput(f"{role}: position {reach - 1} lies beyond the model's limit of {limit} positions")
    if embedding is None:
        return
    embeds = inputs.get("inputs_embeds")
    own = checked.reading.architecture.embeds
    width = own(model.config) if own else int(embedding.shape[1])
    if embeds is not None and (embeds.shape[-1] != width or embeds.dtype != embedding.dtype):
        wanted = f"{embedding.dtype} of width {width}"
        raise BadInput(f"{role}: inputs_embeds must be {wanted}, got {embeds.dtype} of shape {tuple(embeds.shape)}")
    if "input_ids" in inputs:
        refuse_ids(inputs["input_ids"], int(embedding.shape[0]), role)


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
