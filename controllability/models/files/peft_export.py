"""Writing a patch as a PEFT adapter (``adapter_model.safetensors``, ``adapter_config.json``), held against the patch by the real PEFT."""

import contextlib
import copy
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from architectures import quantised
from controllability.arrays import relative_error
from controllability.errors import NotVerified, PatchError, in_a_line
from controllability.models.exact_mode import exact_mode
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.peft_forms import forms_of, lora_tensors, rank_of
from controllability.models.files.peft_import import CONFIG, MADE_FOR, PREFIX, TENSORS, patch_of_adapter
from controllability.models.hooks.carried_patches import TO_STAY, refuse_carried, uncompiled
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.applier import Entry
from controllability.models.patches.diff import diff
from controllability.models.patches.merging import write
from controllability.models.patches.record import Form, PatchRecord
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
        return Check(None, "not verified: peft is not installed (in a checkout: pip install '.[peft]')")
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


@dataclass(frozen=True)
class Exported:
    """What was written where: ``low_rank`` matrices of rank up to ``rank``, and the ``dense`` modules of which PEFT keeps a copy."""

    directory: str
    files: list[str]
    dense: list[str]
    low_rank: int
    rank: int
    check: Check

    @property
    def verified(self) -> bool | None:
        """Whether the adapter gave the patched model's output when PEFT had loaded it; None if that was not tried."""
        return self.check.verified

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = asdict(self)
        return data | data.pop("check")


def export_peft(patch: PatchRecord, directory: Path, model: nn.Module | None = None) -> Exported:
    """Write ``patch`` as an adapter that ``peft.PeftModel.from_pretrained(model, directory)`` loads (peft 0.21).

    ``directory`` must be new or empty; nothing is left behind on failure.  ``model`` may be left out while the one
    that the patch was made on is alive.  Without either, a patch of matrices alone can still be written, unverified.
    Raises ``PatchError`` for a patch that is not one set of weights, a parameter that PEFT cannot reach, other
    weights or an occupied directory, and ``NotVerified`` when the adapter does not give what the patch gives.
    Source: the layout of peft 0.21 (``tuners/lora/layer.py``); see ``peft_forms``.
    """
    model = None if model is None else uncompiled(model)
    if patch.split(model):
        raise PatchError(
            "this patch is of a model that is split over several devices: save it, and export it in one process that loads the "
            "patch and holds the whole model; nothing was written"
        )
    refuse_unusable(directory)
    patch.refuse_several("held by one adapter")
    if patch.made_under:
        raise PatchError(
            "this patch was made while other patches were on the model: an adapter would lack those; "
            f"if they are merged and to stay: {TO_STAY}; then make this patch again"
        )
    model = model if model is not None or patch.fingerprint is not None else patch.model()
    if model is not None:
        refuse_carried(model, "exporting")
        patch.refuse_other_model(model)
    forms = forms_of(model, patch.entries) if model is not None else patch.forms
    _refuse_formless(patch, forms, model)
    tensors, names, rank = _low_rank_tensors(patch.entries, forms)
    dense = sorted({entry.module for entry in patch.entries if forms[entry.param.name].kind == "dense"})
    if dense:
        assert model is not None
        for path in dense:
            tensors |= _dense_tensors(model, path, patch.entries, forms)
    config = _config(forms, names, rank, dense, model)
    made_for = {MADE_FOR: patch.mark()}
    with written(directory) as folder:
        stored = {PREFIX + name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(stored, folder / TENSORS, metadata={"format": "pt"} | made_for)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        check = check_adapter(patch, folder, model)
    return Exported(str(directory), [CONFIG, TENSORS], dense, len(names), rank, check)


def _refuse_formless(patch: PatchRecord, forms: dict[str, Form], model: nn.Module | None) -> None:
    for name in dict.fromkeys(entry.param.name for entry in patch.entries):
        if name not in forms:
            raise PatchError(f"this patch does not say how the model holds {name}: give the model that it was made for")
        if forms[name].kind == "none":
            raise PatchError(f"parameter {name} cannot be in an adapter: {forms[name].why}; merge the patch instead")
        if forms[name].kind == "dense" and model is None:
            raise PatchError(
                f"parameter {name} has no LoRA form: PEFT keeps a copy of its module, which needs the model's own "
                "values; give the model"
            )


def _low_rank_tensors(entries: tuple[Entry, ...], forms: dict[str, Form]) -> tuple[dict[str, Tensor], set[str], int]:
    """The tensors, the parameters that have some, and their rank: one for all of them, as loaders without rank_pattern take it."""
    names = [name for name, form in forms.items() if form.kind in ("module", "parameter")]
    own = {name: held for name in names if (held := [e for e in entries if e.param.name == name])}
    rank = max((rank_of(lora_tensors(held, forms[name])[0], forms[name]) for name, held in own.items()), default=0)
    tensors = {}
    for name, held in own.items():
        a, b = lora_tensors(held, forms[name], rank)
        tensors |= {f"{forms[name].key}.lora_A.weight": a, f"{forms[name].key}.lora_B.weight": b}
    return tensors, set(own), rank


@torch.no_grad()
def _dense_tensors(
    model: nn.Module, path: str, entries: tuple[Entry, ...], forms: dict[str, Form]
) -> dict[str, Tensor]:
    """Everything that a module holds, its patched parameters with their patches added (and rounded, as merging does)."""
    module = model.get_submodule(path)
    with quantised.kept(module):
        held = {name: value.detach().clone() for name, value in module.state_dict().items()}
    key = ""
    for entry in entries:
        if entry.module == path:
            write(held[entry.param.name.removeprefix(f"{path}.")], entry.param, entry.delta)
            key = forms[entry.param.name].key
    return {f"{key}.{name}": value for name, value in held.items()}


def _config(
    forms: dict[str, Form], names: set[str], rank: int, dense: list[str], model: nn.Module | None
) -> dict[str, Any]:
    """The fields of a LoraConfig; scaling lora_alpha / r is 1."""
    modules = {name.rpartition(".")[0] for name in names if forms[name].kind == "module"}
    parameters = {name for name in names if forms[name].kind == "parameter"}
    causal = type(model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": rank or 1, "lora_alpha": rank or 1, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
        "target_modules": sorted(modules), "target_parameters": sorted(parameters) or None,
        "modules_to_save": dense or None, "fan_in_fan_out": any(forms[n].swapped for n in names if forms[n].kind == "module"),
        "bias": "none", "lora_dropout": 0.0, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
