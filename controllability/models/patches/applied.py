"""A patch on a live model for a while: hooks on its own modules, undone to the last bit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from controllability.errors import ControllabilityWarning, PatchError
from controllability.models.hooks.carried_patches import carry, put_down, state_of_model, uncompiled
from controllability.models.hooks.guards import INSTEAD, Calls, refuse_readers
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHook
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applier import Applier
from controllability.models.patches.record import PatchRecord
from controllability.models.patches.same_input import refuse_other_input
from controllability.models.reading.checked_reading import known_reading
from controllability.models.reading.fingerprints import changes, look_at


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
