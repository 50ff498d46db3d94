"""Whether an adapter does what its patch does: loaded by the real PEFT onto the model, beside the patch and beside nothing."""

import contextlib
import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures import quantised
from controllability.arrays import relative_error
from controllability.errors import NotVerified, in_a_line
from controllability.models.exact_mode import exact_mode
from controllability.models.files.peft_import import patch_of_adapter
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.diff import diff
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import result_of
from controllability.models.reading.model_facts import input_embedding
from controllability.models.reading.random_inputs import random_inputs
from controllability.models.reading.tolerances import VERIFIED


@dataclass(frozen=True)
class Check:
    """``error``: adapter against patch, max |difference| / max |patched|; ``unpatched``: the plain model's beside it.

    ``verified`` is None, with the reason in ``note``, where nothing could be compared.  An imported patch holds no
    input: it is compared on random tokens, and ``note`` says so.
    """

    verified: bool | None
    note: str = ""
    error: float | None = None
    unpatched: float | None = None


def check_adapter(patch: PatchRecord, directory: Path, model: nn.Module | None) -> Check:
    """Load the adapter with PEFT onto a twin of ``model`` that shares its weights, and compare outputs.

    Raises ``NotVerified`` when PEFT does not load it, or when the outputs differ by more than rounding explains.
    """
    if model is None:
        return Check(None, "not verified: no model was given")
    try:
        import peft  # noqa: F401
    except ImportError:
        return Check(None, "not verified: peft is not installed (pip install 'controllability[peft]')")
    inputs, note = without_cache(model, patch.inputs["source"]), ""
    if not patch.inputs["source"]:  # an imported adapter
        if input_embedding(model) is None:
            return Check(None, "not verified: this patch holds no input to compare on")
        inputs, note = random_inputs(model, None), "compared on random tokens"
    dtypes = {parameter.dtype for parameter in model.parameters()}
    with own_modes(model), exact_mode() if torch.float64 in dtypes else contextlib.nullcontext():
        unpatched = result_of(model(**inputs))
        with applied(patch, model):
            patched = result_of(model(**inputs))
        loaded = _with_adapter(model, directory)
        silent = _silent(loaded, {entry.module for entry in patch.entries})
        adapted = result_of(_run(loaded, inputs))
    error, control = (relative_error(found.double(), patched.double()) for found in (adapted, unpatched))
    tolerance = VERIFIED.of(dtypes)
    if not error <= tolerance or error > control:
        raise NotVerified(
            f"PEFT loads the adapter, and its output misses the patched model's by {error:.2g} (relative; rounding "
            f"explains {tolerance:g}, the unpatched model misses it by {control:.2g}): {_reason(patch, directory, model, silent, tolerance)}; "
            "nothing was written"
        )
    return Check(True, note, error, control)


def _silent(adapted: nn.Module, names: set[str]) -> set[str]:
    """Those of these modules that have not run yet, once PEFT has wrapped them."""
    silent: set[str] = set()
    for path, module in adapted.named_modules():  # a wrapper comes before what it wraps
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if name in names - silent:
            silent.add(name)
            module.register_forward_hook(lambda *_, name=name: silent.discard(name))
    return silent


def _reason(patch: PatchRecord, directory: Path, model: nn.Module, silent: set[str], tolerance: float) -> str:
    """Why an adapter does not do what its patch does: looked for in what ran, then in the file."""
    if silent:
        return (
            f"{min(silent)} never ran, so its weights are read past the module that PEFT wraps; merge the patch instead"
        )
    held = diff(patch, patch_of_adapter(directory, model)).largest
    if held is not None and held.relative > tolerance:
        return (
            f"the file holds another change of {held.parameter} than the patch, off by {held.relative:.2g} of its size"
        )
    rounds = f"what is left is how PEFT rounds and adds it in {patch.report.dtype}; export from a model in float32, or merge the patch"
    return f"the file holds the patch, and every module of it ran: {rounds}"


def _with_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """What PEFT makes of a twin of ``model``.  Whatever it complains of means that the adapter does not fit."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            adapted = on_twin(model, directory)
        except Exception as error:  # whatever PEFT raises about names and shapes
            text = in_a_line(error)
            raise NotVerified(
                f"PEFT cannot load the adapter ({type(error).__name__}: {text}); nothing was written"
            ) from None
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        raise NotVerified(f"PEFT does not find all of the adapter: {missing[0][:300]}; nothing was written")
    return adapted.eval()


def on_twin(model: nn.Module, directory: Path) -> nn.Module:
    """An adapter, loaded by PEFT onto a twin of ``model``."""
    import peft

    other = twin(model)
    with quantised.kept(other):  # PEFT asks for its state_dict
        return peft.PeftModel.from_pretrained(other, str(directory))  # type: ignore[arg-type]


def _run(adapted: nn.Module, inputs: dict[str, Any]) -> Any:
    try:
        return adapted(**inputs)
    except Exception as error:  # the model reads something that PEFT's wrappers hide
        text = in_a_line(error)
        raise NotVerified(
            f"with the adapter the model does not run ({type(error).__name__}: {text}): it reads weights past the "
            "module that PEFT wraps; nothing was written; merge the patch instead"
        ) from None


def twin(model: nn.Module) -> nn.Module:
    """The same modules anew around the same weights (no copy): what wraps or freezes the twin leaves ``model`` alone.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2)
    >>> other = twin(model)
    >>> other.weight is model.weight, other.weight.data_ptr() == model.weight.data_ptr()
    (False, True)
    """
    # .data, not detach(): what PEFT does in place and undoes must not count as a change of the model
    shared: dict[int, Any] = {id(b): b.data for b in model.buffers()}
    for p in model.parameters():
        packed = type(p) is not nn.Parameter and issubclass(type(p), nn.Parameter)  # 4 bits: more than a tensor, frozen
        if quantised.kind(p) == "bitsandbytes 4":
            shared[id(p)] = quantised.beside(p)
        else:
            shared[id(p)] = p if packed else nn.Parameter(p.data, requires_grad=p.requires_grad)
    return copy.deepcopy(model, shared)
