"""Whether a run has the input that a patch of scope each was made for: then alone every position meets its own patch.  (new)"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from controllability.errors import PatchError
from controllability.models.reading.inputs import leaves_gaps, uses_cache
from controllability.models.reading.positions import TOKENS, main_input
from controllability.models.transformers_parts import CACHE

ASIDE = {  # what changes no state
    "return_dict", "logits_to_keep", "num_logits_to_keep", "labels", "return_loss", "cache_position", "encoder_outputs", "synced_gpus",
}  # fmt: skip


def refuse_other_input(model: nn.Module, given: Mapping[str, Any], made_for: Mapping[str, Any], each: bool) -> None:
    """Raise ``PatchError`` where ``given``, the arguments of a run by name, is not the input that the patch was made for.

    What means the same passes: a mask of ones and none, positions that are counted and none, outputs that are asked for.
    Another number of positions is refused where the layers see it.  A patch that is not of scope ``each`` may meet any input; what
    it was made for must not be run with a cache in place of without, or without one, where that computes something else.
    """
    if not each and "use_cache" not in made_for:
        return
    main = main_input(made_for) or "pixel_values"
    shapes = [getattr(inputs.get(main), "shape", None) for inputs in (made_for, given)]
    if shapes[0] != shapes[1] and not (each and None in shapes):
        return
    differ: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys((*made_for, *given)):
        encoded = "encoder_outputs" in given and name in TOKENS and name != main
        if name in ASIDE or name.startswith("output_") or encoded or (name == "use_cache" and name not in made_for):
            continue
        wanted, found = (_meant(name, inputs, shapes[0]) for inputs in (made_for, given))
        if name == "use_cache":
            masked = leaves_gaps(made_for) and given.get("attention_mask") is not None  # one sequence all the same
            found = masked or uses_cache(model, given)
        if not _same(wanted, found):
            differ.append((name, wanted, found))
    if differ and (each or [name for name, *_ in differ] == ["use_cache"]):
        raise PatchError(_difference(*differ[0]))


def _meant(name: str, inputs: Mapping[str, Any], shape: Any) -> Any:
    """An argument in the form in which equal ones mean the same."""
    value = inputs.get(name)
    if name in CACHE:
        return int(getattr(value, "get_seq_length", lambda: 0)()) or None
    if name == "position_ids" and value is None and _meant("attention_mask", inputs, shape) is None:
        value = torch.arange(shape[1])[None]
    if isinstance(value, Tensor) and value.ndim == 2:
        if name == "position_ids" and len(value) == 1:
            return value.expand(shape[0], -1)
        if name.endswith("attention_mask"):
            return None if bool(value.bool().all()) else value.bool()
        if name == "token_type_ids" and not bool(value.any()):
            return None
    return value or None if isinstance(value, bool) and name != "use_cache" else value


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; of what is neither a tensor nor plain nothing can be said."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=False)
    return len(tree_leaves(a)) == len(tree_leaves(b)) and all(_equal(x, y) for x, y in pairs)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a.detach().cpu() == b.detach().cpu()).all())
    plain = (Tensor, bool, int, float, str, type(None))
    return not (isinstance(a, plain) and isinstance(b, plain)) or (type(a) is type(b) and bool(a == b))


def _difference(name: str, wanted: Any, found: Any) -> str:
    """Both sides at the first place where they differ."""
    if name == "use_cache":
        why = "which computes something else on this input (gaps in its positions and no mask, or layers with one place in the cache)"
        return f"this patch is valid for its own run: it is use_cache {wanted}, the model got {found}, {why}"
    where, sides = "", [tuple(v.shape) if isinstance(v, Tensor) else v for v in (wanted, found)]
    if isinstance(wanted, Tensor) and isinstance(found, Tensor) and wanted.shape == found.shape and wanted.ndim > 1:
        place = (wanted.cpu() != found.cpu()).nonzero()[0].tolist()
        where = f" at sample {place[0]}, position {place[1]}"
        sides = [side[tuple(place)].item() for side in (wanted, found)]
    word = "token" if where and name in TOKENS and name.endswith("ids") else name
    return (
        f"this patch of scope 'each' is valid for the input it was made for:{where} it is {word} {sides[0]}, the model got {sides[1]}; "
        "make a patch for this input, or use scope 'last', which is one patch for any input"
    )
