"""Writing a patch as a PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from architectures import quantised
from controllability.errors import PatchError
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.lora_factors import lora_tensors, rank_of
from controllability.models.files.peft_check import Check, check_adapter
from controllability.models.files.peft_forms import forms_of
from controllability.models.files.peft_reader import CONFIG, MADE_FOR, PREFIX, TENSORS
from controllability.models.hooks.carried_patches import TO_STAY, refuse_carried, uncompiled
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form, PatchRecord
from controllability.models.patches.rounding import write


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
    Source: the layout of peft 0.21 (``tuners/lora/layer.py``); see ``adapters.forms``.
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
