"""Measuring the sensitivity of a patched model, and of the plain one beside it, on the patch's own source.  (new)"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import errors_and_sizes, quotient
from controllability.errors import ControllabilityError, ControllabilityWarning, PatchError
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.merged_error import at_pairs
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import known_reading
from controllability.models.reading.heads import Result, Runs, by_blocks, without_logits
from controllability.models.sweep.sensitivity import Sensitivity

SEED = 0
FLOAT32 = torch.finfo(torch.float32).eps  # the norms of a float64 model run in float32


def sensitivity_of(patch: PatchRecord, model: nn.Module | None = None) -> Sensitivity:
    """What was measured of a patch; measured now if it has not been, on ``model`` or the one that it was made on."""
    known = patch.measured
    if known is not None and (known.patched is not None or (model is None and patch._model is None)):
        return known
    try:
        found = measure_sensitivity(patch, model if model is not None else patch.model())
    except PatchError as error:
        return Sensitivity(None, None, str(error))
    if found.patched is not None:  # else perhaps it can be measured later
        patch.measured = found
    return found


def measure_sensitivity(patch: PatchRecord, model: nn.Module) -> Sensitivity:
    """Disturb the states of a source run with the patch and of one without: two short passes each.

    The disturbance is ε^⅔ for a dtype of machine epsilon ε: far above its rounding and still small.  Where it cannot be measured
    the ``note`` of the result says why.
    """
    model = uncompiled(model)
    with own_modes(model):
        try:
            plain = _magnified(patch, model)
            with applied(patch, model):
                patched = _magnified(patch, model)
        except (ControllabilityError, RuntimeError, TypeError, ValueError) as error:
            return Sensitivity(None, None, str(error).splitlines()[0] if str(error) else type(error).__name__)
    finite = all(number < float("inf") for number in (plain, patched))
    return Sensitivity(patched, plain) if finite and plain else Sensitivity(None, None, "a disturbed run is not finite")


def _magnified(patch: PatchRecord, model: nn.Module) -> float:
    """The relative change of the logits over that of the states."""
    source = patch.inputs["source"]
    with Runs(model, without_logits(model, [source])) as run:

        def at_source() -> Result:
            found = run(source)
            return replace(found, held=at_pairs(found.held, patch))

        clean = at_source()
        size = max(torch.finfo(clean.dtype).eps, FLOAT32) ** (2 / 3)
        disturbed = _Disturbed(size)
        with HookStack() as installation:
            for name in dict.fromkeys(layer.name for layer in known_reading(model, patch.report.place).layers):
                installation.disturb(model.get_submodule(name), disturbed)
            noisy = at_source()
    if not disturbed.times:
        raise ControllabilityError("no layer of this model takes its state where it could be disturbed")
    blocks = by_blocks(lambda _, x, y: torch.stack([v.max() for v in errors_and_sizes(x, y)]), noisy, clean)
    return quotient(*torch.stack(blocks).amax(0).tolist()) / size


class _Disturbed:
    """A state with every entry off by a random part of its size; the same draws for every run."""

    def __init__(self, size: float) -> None:
        self.size, self.times = size, 0
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, state: Any) -> Any:
        if not isinstance(state, Tensor) or not state.is_floating_point() or state.ndim < 3:
            return state
        self.times += 1
        noise = torch.randn(state.shape, generator=self.generator).to(state.device)
        return (state * (1 + self.size * noise)).to(state.dtype)


def warn_if_fragile(patch: PatchRecord, done: str, model: nn.Module | None = None) -> None:
    """Say of a fragile patch what to expect of it where it is not the very run that it was made in."""
    found, dtype = sensitivity_of(patch, model), getattr(torch, patch.report.dtype)
    if found.fragile:
        warnings.warn(
            f"{done} a patch that is exact here and fragile elsewhere: a small disturbance grows {found.ratio:.2g} times as much as "
            f"without it, so expect a relative error of about {found.expected(dtype):.1g} in {str(dtype).removeprefix('torch.')} "
            "(route 'balanced', the default, is far calmer)",
            ControllabilityWarning, stacklevel=4,
        )  # fmt: skip
