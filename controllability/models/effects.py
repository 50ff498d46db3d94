"""What a solved patch does to the output of a tap: the model's own output plus the effect of each delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from architectures.reading import Layer, Tap
from controllability.arrays import arithmetic
from controllability.deltas import Delta, ExpertLowRank, Shift, added
from controllability.interfaces import OutputControllable, Param
from controllability.models.pairing import Rows
from controllability.trace import node


def patched(
    layer: Layer,
    tap: Tap,
    x: Tensor,
    y: Tensor,
    deltas: Mapping[Param, Delta],
    rows: Rows | None,
    chosen: Tensor | None = None,
) -> Tensor:
    """``y`` (B, T, …) with the deltas of this tap's parameters; summed in float32 or better, rounded once.

    With ``rows`` row i of a delta belongs to pair i; without, one patch (or one a sample) serves all
    positions.  ``chosen`` (B, T, k) are the experts.
    """
    if rows is not None:
        index = rows.of(chosen) if chosen is not None else None
        return rows.put(y, _changed(layer, tap, rows.of(x), rows.of(y), deltas, index).to(y.dtype))
    deltas = {param: per_sample(delta) for param, delta in deltas.items()}
    return _changed(layer, tap, x, y, deltas, chosen).to(y.dtype)


def _changed(
    layer: Layer, tap: Tap, x: Tensor, y: Tensor, deltas: Mapping[Param, Delta], chosen: Tensor | None
) -> Tensor:
    xp = arithmetic(y)
    x, y = xp.lift(x), xp.lift(y)
    if len(tap.paths) == 1:
        for param, delta in deltas.items():
            y = y + _effect(layer, tap, param, delta, x, chosen)
        return y
    # a norm: its own formula with the patched vectors
    params: dict[str, Any] = dict(layer.params)
    params |= {str(p): added(xp.lift(p.value(layer.params)), delta) for p, delta in deltas.items()}
    for path in tap.paths:
        x = node(layer.block, path)(params, x)
    return x


def _effect(layer: Layer, tap: Tap, param: Param, delta: Delta, x: Tensor, chosen: Tensor | None) -> Tensor:
    if isinstance(delta, ExpertLowRank):
        assert chosen is not None
        if x.shape[-2] == 1:
            x = x.expand(*x.shape[:-2], chosen.shape[-1], x.shape[-1])
        return delta.routed(x, chosen)
    leaf = node(layer.block, tap.outlet)
    assert isinstance(leaf, OutputControllable)
    steering = next(s for s in leaf.output_steerings() if s.param == param)
    return steering.effect(x, delta)


def per_sample(delta: Any) -> Any:
    """A delta with one patch a sample made to broadcast over (B, T, ·) states; one sample serves any batch."""
    if isinstance(delta, Shift):
        extra = delta.value.ndim - 1
        leading = delta.value.shape[0]
    else:
        extra = delta.left.ndim - (3 if isinstance(delta, ExpertLowRank) else 2)
        leading = delta.left.shape[0]
    if not extra:
        return delta
    return delta.row(0) if leading == 1 else delta.row((slice(None), None))
