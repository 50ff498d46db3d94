"""What a solved patch does to the output of a tap: the model's own output plus the effect of each delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from architectures.reading import Layer, Tap
from controllability.arrays import arithmetic
from controllability.deltas import Delta, ExpertLowRank, Shift, added
from controllability.interfaces import OutputControllable, Param, Steering
from controllability.trace import node

Move = tuple[Steering, Delta]  # how a leaf is steered, and what is added to its parameter


def patched(
    layer: Layer, tap: Tap, x: Tensor, y: Tensor, moves: Sequence[Move], chosen: Tensor | None = None
) -> Tensor:
    """``y`` (B, T, …) with the deltas of this tap's parameters at all positions: one patch, or one a sample.

    ``chosen`` (B, T, k) are the experts.
    """
    moves = [(steering, per_sample(delta)) for steering, delta in moves]
    return effect_on(layer, tap, x, y, moves, chosen).to(y.dtype)


def effect_on(
    layer: Layer, tap: Tap, x: Tensor, y: Tensor, moves: Sequence[Move], chosen: Tensor | None = None
) -> Tensor:
    """``y`` (…, n) with the deltas' effects, in float32 or better: whoever stores it rounds once.

    Leading axes of the deltas are those of ``x``: row i of a delta belongs to row i of (N, …) states.
    """
    xp = arithmetic(y)
    x, y = xp.lift(x), xp.lift(y)
    if len(tap.paths) == 1:
        for steering, delta in moves:
            y = y + (_routed(x, delta, chosen) if isinstance(delta, ExpertLowRank) else steering.effect(x, delta))
        return y
    # a norm: its own formula with the patched vectors
    leaves = [node(layer.block, path) for path in tap.paths]
    params: dict[str, Any] = {str(p): p.value(layer.params) for leaf in leaves for p in leaf.own_parameters()}
    params |= {str(s.param): added(xp.lift(s.param.value(layer.params)), delta) for s, delta in moves}
    for leaf in leaves:
        x = leaf(params, x)
    return x


def _routed(x: Tensor, delta: ExpertLowRank, chosen: Tensor | None) -> Tensor:
    assert chosen is not None
    if x.shape[-2] == 1:
        x = x.expand(*x.shape[:-2], chosen.shape[-1], x.shape[-1])
    return delta.routed(x, chosen)


def steering_of(layer: Layer, tap: Tap, param: Param) -> Steering:
    """How the leaf that holds ``param`` at a tap is steered by it."""
    for path in tap.paths:
        leaf = node(layer.block, path)
        if param in leaf.own_parameters():
            assert isinstance(leaf, OutputControllable)
            return next(s for s in leaf.output_steerings() if s.param == param)
    raise AssertionError(f"no leaf of {tap.module} holds {param}")


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
