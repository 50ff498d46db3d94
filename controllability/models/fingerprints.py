"""Telling models apart: the fingerprint of all weights, and a cheap look that notices changes."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if b is not None)


def sampled(value: Tensor) -> float:
    """The sum of 64 entries spread over a tensor: cheap, and different after almost any change."""
    flat = value.detach().reshape(-1)
    return float(flat[:: max(1, flat.numel() // 64)].double().sum())


def _glimpse(model: nn.Module) -> tuple[Any, ...]:
    """Identity, version and 64 entries of every parameter: enough to notice that a fingerprint is stale."""
    found = []
    for name, value in model.named_parameters():
        version = 0 if value.is_inference() else value._version
        found.append((name, id(value), version, value.data_ptr(), sampled(value)))
    return tuple(found)


def fingerprint(
    model: nn.Module, originals: dict[str, Tensor] | None = None, progress: Callable[[int, int], None] | None = None
) -> str:
    """SHA-256 over the name, dtype, shape and bytes of every parameter and buffer.

    ``originals`` stand in for parameters into which a patch is merged.
    """
    digest = hashlib.sha256()
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
    glimpse = _glimpse(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != glimpse:
        known = (glimpse, fingerprint(model))
        _KNOWN[model] = known
    return known[1]
