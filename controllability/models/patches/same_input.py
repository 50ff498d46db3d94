"""Whether a run has the input that a patch of scope each was made for: then alone every position meets its own patch.  (new)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import PatchError
from controllability.models.reading.inputs import uses_cache
from controllability.models.reading.positions import TOKENS, main_input

# what changes no state, or is looked at by itself
ASIDE = {
    "return_dict", "logits_to_keep", "num_logits_to_keep", "labels", "return_loss", "cache_position", "past_key_values",
    "use_cache", "encoder_outputs", "synced_gpus",
}  # fmt: skip


def refuse_other_input(model: nn.Module, given: Mapping[str, Any], made_for: Mapping[str, Any]) -> None:
    """Raise ``PatchError`` where ``given``, the arguments of a run by name, is not the input that the patch was made for.

    What means the same passes: a mask of ones and none, positions that are counted and none, outputs that are asked for.
    Another number of positions is refused where the layers see it.
    """
    main = main_input(made_for)
    wanted, found = made_for.get(main or ""), given.get(main or "")
    if isinstance(wanted, Tensor) and isinstance(found, Tensor) and found.shape != wanted.shape:
        return
    if main is None or found is not None:
        _refuse_past(given)
    for name in dict.fromkeys((*made_for, *given)):
        if (
            name in ASIDE
            or name.startswith("output_")
            or (name in TOKENS and "encoder_outputs" in given and name != main)
        ):
            continue
        sides = [_meant(name, inputs, wanted) for inputs in (made_for, given)]
        if not _same(*sides):
            raise PatchError(_difference(name, *sides))
    if "use_cache" in made_for and uses_cache(model, given) != made_for["use_cache"]:
        raise PatchError(
            f"this patch of scope 'each' is valid with use_cache={made_for['use_cache']}: a cache changes what this model computes here"
        )


def _refuse_past(given: Mapping[str, Any]) -> None:
    length = getattr(given.get("past_key_values"), "get_seq_length", lambda: 0)()
    if int(length):
        raise PatchError(
            f"this patch of scope 'each' is valid for a run without a past, and the cache holds {int(length)} positions; "
            "use scope 'last', which is one patch for any input"
        )


def _meant(name: str, inputs: Mapping[str, Any], main: Any) -> Any:
    """An argument in the form in which equal ones mean the same."""
    value = inputs.get(name)
    grid = main.shape[:2] if isinstance(main, Tensor) else None
    if name == "position_ids" and grid is not None and len(grid) == 2:
        if value is None and _meant("attention_mask", inputs, main) is None:
            value = torch.arange(grid[1])[None]
        if isinstance(value, Tensor) and value.ndim == 2:
            return value.expand(*grid) if value.shape[1] == grid[1] else value
    if isinstance(value, Tensor) and name.endswith("attention_mask") and value.ndim == 2:
        return None if bool(value.bool().all()) else value.bool()
    if isinstance(value, Tensor) and name == "token_type_ids":
        return value if bool(value.any()) else None
    return value or None if isinstance(value, bool) else value


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; of what is neither a tensor nor plain nothing can be said."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a.detach().cpu() == b.detach().cpu()).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    plain = (Tensor, bool, int, float, str, Mapping, list, tuple, type(None))
    return not (isinstance(a, plain) and isinstance(b, plain)) or (type(a) is type(b) and bool(a == b))


def _difference(name: str, wanted: Any, found: Any) -> str:
    """Both sides at the first place where they differ."""
    where, sides = "", [_words(wanted), _words(found)]
    if isinstance(wanted, Tensor) and isinstance(found, Tensor) and wanted.shape == found.shape and wanted.ndim > 1:
        sample, position, *_ = place = (wanted.cpu() != found.cpu()).nonzero()[0].tolist()
        where = f" at sample {sample}, position {position}"
        sides = [str(side[tuple(place)].item()) for side in (wanted, found)]
    what = "the tokens" if name in TOKENS and name.endswith("ids") else "the input"
    word = "token" if what == "the tokens" and where else name
    return (
        f"this patch of scope 'each' is valid for {what} it was made for:{where} it is {word} {sides[0]}, the model got {sides[1]}; "
        "make a patch for this input, or use scope 'last', which is one patch for any input"
    )  # fmt: skip


def _words(value: Any) -> str:
    return (
        f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "of none" if value is None else repr(value)
    )
