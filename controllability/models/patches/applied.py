"""A patch on a live model for a while: hooks on its own modules, undone to the last bit; refused where another input than its own comes."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from controllability.errors import ControllabilityWarning, PatchError
from controllability.models.hooks.carried_patches import carry, put_down, state_of_model, uncompiled
from controllability.models.hooks.guards import INSTEAD, Calls, refuse_readers
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHook
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applier import Applier
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import known_reading
from controllability.models.reading.fingerprints import changes, look_at
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


@contextmanager
def applied(patch: PatchRecord, model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model's own modules compute with the patched weights.  See ``ModelPatch.applied``."""
    given, model = model, uncompiled(model)
    with state_of_model(model).lock:  # another thread waits: two patches at once would see each other's weights
        patch.refuse_misuse(model)
        same_model = patch._model is not None and patch._model() is model
        installation = HookStack()
        try:
            carry(model, patch.id, installation, patch.parameters)
            with own_modes(model):
                _install(patch, model, installation)
            yield given
        finally:
            in_order = put_down(model, patch.id)
        if same_model and (changed := changes(patch._seen, look_at(model))):
            said = f"{changed[0]} changed while the patch was applied: what ran after that is not what the patch was made for"
            warnings.warn(said, ControllabilityWarning, stacklevel=3)
        if not in_order:
            raise PatchError("patches were left out of order: this one and those applied after it were all undone")


def _install(patch: PatchRecord, model: nn.Module, installation: HookStack) -> None:
    reading = known_reading(model, patch.report.place)
    rows = patch.rows if patch.scope == "each" else None
    source = patch.inputs["source"]
    installation.called(model, lambda given: refuse_other_input(model, given, source, rows is not None))
    patched = [layer for layer in reading.layers if layer.index in {e.layer for e in patch.entries}]
    for layer in patched:
        entries = [e for e in patch.entries if e.layer == layer.index]
        applier = Applier(layer, entries, rows, len(patch.rows.sample) if patch.scope == "last" else 1)
        LayerHook(
            model, layer, applier, installation, applier.taps, states=False,
            sequence_first=reading.architecture.sequence_first,
        )  # fmt: skip
        installation.after(model.get_submodule(layer.end), lambda _, __, applier=applier: applier.ended())
    names = [layer.name for layer in patched]
    Calls(installation, model, names)
    refuse_readers(installation, model, [*names, *(entry.module for entry in patch.entries)])
    if torch.nn.modules.module._global_forward_hooks:
        said = f"global forward hooks see every module's output before its patch: {INSTEAD}"
        warnings.warn(said, ControllabilityWarning, stacklevel=4)
