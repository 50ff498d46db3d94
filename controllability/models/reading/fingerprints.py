"""Telling models apart: the fingerprint of all weights, and a cheap look that notices changes of tensors and settings."""

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import architectures
from architectures import quantised
from controllability.arrays.sharded import gathered, here
from controllability.errors import ControllabilityError
from controllability.models.hooks.carried_patches import state_of_model
from controllability.models.reading.modules import modules_of
from controllability.models.reading.settings import Settings, other_settings, settings_of

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def stored(model: nn.Module, exchanged: bool = True, parameters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, once; a quantised one as the plain tensors that it consists of when it runs.

    ``exchanged`` says whether what an applied patch holds in place of a parameter counts too; without ``parameters``
    buffers alone are listed.
    """
    seen: set[int] = set()
    for prefix, module in modules_of(model):
        for held in (module._parameters, module._buffers) if parameters else (module._buffers,):
            for attribute, value in held.items():
                if value is None or id(value) in seen or _rewritten(module, attribute):
                    continue
                if not exchanged and held is module._parameters and not isinstance(value, nn.Parameter):
                    continue
                seen.add(id(value))
                name = f"{prefix}.{attribute}" if prefix else attribute
                if quantised.kind(value):
                    yield from quantised.pieces(name, module, quantised.as_run(module, value))
                else:
                    yield name, value


def _rewritten(module: nn.Module, attribute: str) -> bool:
    """Whether the module's own forward writes this buffer anew: rotary frequencies that depend on the length."""
    if not attribute.endswith("inv_freq"):
        return False
    kinds = getattr(module, "rope_type", "")
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes


@torch.no_grad()
def sampled(values: list[Tensor]) -> list[int]:
    """For each tensor the sum of some 64 entries spread over it, their bits read as integers: cheap, and different after
    almost any change.  Bits, because NaN is no value that equals itself, and is nevertheless unchanged.

    One copy a device and dtype, however many tensors there are.
    """
    sums = [0] * len(values)
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for index, value in enumerate(values):
        if value.numel() and not value.is_meta:
            groups.setdefault((value.device, value.dtype), []).append((index, _spread(here(value))))
    for group in groups.values():
        joint = torch.cat([picked for _, picked in group])
        bits = joint.view(_BITS[joint.element_size()]).cpu().numpy().astype(np.int64)
        starts = np.cumsum([0, *(len(picked) for _, picked in group[:-1])])
        for (index, _), total in zip(group, np.add.reduceat(bits, starts).tolist(), strict=True):
            sums[index] = total
    return sums


def _spread(value: Tensor) -> Tensor:
    """At least 64 entries of a tensor (all, if it has fewer), as a view where that is possible."""
    value = torch.view_as_real(value) if value.is_complex() else value  # rotary angles
    step = max(1, value.numel() // 64)
    if value.is_contiguous():
        return value.as_strided((value.numel() // step,), (step,), value.storage_offset())
    return value.reshape(-1)[::step]


looking = torch._C.DisableTorchFunction  # a context for many looks at tensors: modes like ``exact_mode`` would see each


class Look(NamedTuple):
    """What one look at a model saw: tensors by name (storage, or None: not yet where it will be; version; sample), and settings."""

    tensors: dict[str, tuple[int | None, int, int]] = {}
    settings: Settings = {}


def look_at(model: nn.Module, parameters: bool = True) -> Look:
    """A cheap look at every parameter, buffer and setting: torch counts in-place changes, so any of them shows.

    Changes behind torch's back (``p.data[...] = …``) show only if one of the 64 sampled entries changes.
    Vectors exchanged by an applied patch are left out: which patches are on the model is tracked by id.  Without
    ``parameters`` it is the buffers alone.
    """
    aliases = state_of_model(model).same_again
    held = dict(stored(model, False, parameters))
    tensors = {}
    with looking():
        for (name, value), sample in zip(held.items(), sampled(list(held.values())), strict=True):
            where, version = place(value)
            tensors[name] = (where, aliases.get((id(value), version), version), sample)
    return Look(tensors, settings_of(modules_of(model)) if parameters else {})


def place(value: Tensor) -> tuple[int | None, int]:
    """A tensor's storage and version; no storage, where the first forward has yet to pack a weight."""
    to_come = getattr(value, "to_come", None)
    if to_come is not None:
        return None, to_come
    value = here(value)
    return value.data_ptr(), 0 if value.is_inference() else value._version


def changes(seen: Look, now: Look) -> list[str]:
    """The names in ``seen`` of what is another now; that a weight was packed in its first forward since is no change.

    >>> packed = Look({"w": (4096, 0, 15)})
    >>> changes(Look({"w": (None, 0, 15)}), packed), changes(Look({"w": (512, 0, 15)}), packed)
    ([], ['w'])
    """
    found = []
    for name, before in seen.tensors.items():
        after = now.tensors.get(name)
        if after is None or after[1:] != before[1:] or before[0] not in (None, after[0]):
            found.append(name)
    return found + other_settings(seen.settings, now.settings)


def same_again(model: nn.Module, names: Iterable[str], before: Look) -> None:
    """Note that these parameters hold the bits they held when ``before`` was seen."""
    aliases = state_of_model(model).same_again
    for name, value in model.named_parameters():
        if name in names and not value.is_inference():
            aliases[id(value), here(value)._version] = before.tensors[name][1]


def _declared(model: nn.Module) -> str:
    """The blocks as they are read: with them activations, ε, routing, and whatever else the config decides there."""
    try:
        return "\n".join(repr(layer.block) for layer in architectures.read(model).layers)
    except ControllabilityError:
        return ""


def fingerprint(
    model: nn.Module, originals: dict[str, Tensor] | None = None, progress: Callable[[int, int], None] | None = None
) -> str:
    """SHA-256 over the blocks as they are read, and the name, dtype, shape and bytes of every parameter and buffer.

    ``originals`` stand in for parameters into which a patch is merged.
    """
    digest = hashlib.sha256(_declared(model).encode())
    digest.update("".join(f"{n} {s}\n" for n, p in model.named_parameters() if (s := quantised.settings(p))).encode())
    items = list(stored(model))
    for done, (name, value) in enumerate(items):
        value = gathered((originals or {}).get(name, value).detach())
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.contiguous().reshape(-1).view(torch.uint8).cpu()
        for start in range(0, flat.numel(), 1 << 26):
            digest.update(flat[start : start + (1 << 26)].numpy().data)
        if progress:
            progress(done + 1, len(items))
    return digest.hexdigest()


def known_fingerprint(model: nn.Module) -> str:
    """The model's fingerprint, remembered as long as its parameters look the same."""
    glimpse = look_at(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != glimpse:
        known = (glimpse, fingerprint(model))
        _KNOWN[model] = known
    return known[1]
