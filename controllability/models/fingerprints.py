"""Telling models apart: the fingerprint of all weights, and a cheap look that notices changes."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import architectures
from controllability.errors import ControllabilityError

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if b is not None)


def sampled(value: Tensor) -> float:
    """The sum of 64 entries spread over a tensor: cheap, and different after almost any change."""
    if value.numel() == 0 or value.is_meta:
        return 0.0
    flat = value.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // 64)]
    if picked.is_complex():  # rotary angles
        picked = torch.view_as_real(picked)
    return float(picked.sum(dtype=torch.float64))


State = dict[str, tuple[int, int, float]]  # name -> storage, version, sample

# versions of parameters at which their bits are those of an earlier version: after a merge was undone
_SAME_AGAIN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, int], int]] = weakref.WeakKeyDictionary()


def state_of(model: nn.Module) -> State:
    """A cheap state of every parameter and buffer: torch counts in-place changes, so any of them shows.

    Changes behind torch's back (``p.data[...] = …``) show only if one of the 64 sampled entries changes.
    Vectors exchanged by an applied patch are left out: which patches are on the model is tracked by id.
    """
    aliases = _SAME_AGAIN.get(model, {})
    exchanged = {name for name, value in model.named_parameters() if not isinstance(value, nn.Parameter)}
    state: State = {}
    for name, value in _stored(model):
        if name in exchanged:
            continue
        version = 0 if value.is_inference() else value._version
        state[name] = (value.data_ptr(), aliases.get((name, version), version), sampled(value))
    return state


def same_again(model: nn.Module, names: Iterable[str], before: State) -> None:
    """Note that these parameters hold the bits they held in the state ``before``."""
    aliases = _SAME_AGAIN.setdefault(model, {})
    for name, value in model.named_parameters():
        if name in names and not value.is_inference():
            aliases[name, value._version] = before[name][1]


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
    items = list(_stored(model))
    for done, (name, value) in enumerate(items):
        value = (originals or {}).get(name, value).detach()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.contiguous().reshape(-1).view(torch.uint8).cpu()
        for start in range(0, flat.numel(), 1 << 26):
            digest.update(flat[start : start + (1 << 26)].numpy().data)
        if progress:
            progress(done + 1, len(items))
    return digest.hexdigest()


def known_fingerprint(model: nn.Module) -> str:
    """The model's fingerprint, remembered as long as its parameters look the same."""
    glimpse = state_of(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != glimpse:
        known = (glimpse, fingerprint(model))
        _KNOWN[model] = known
    return known[1]
