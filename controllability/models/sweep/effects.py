"""What a solved patch does to the output of a tap: the model's own output plus the effect of each delta."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from architectures.reading import Layer, Tap
from controllability.arrays import arithmetic
from controllability.components.scale import Scale
from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift, added
from controllability.interfaces import Component, Param, Params, Update, node, updates_of

Move = tuple[Update, Delta]  # how a leaf is steered, and what is added to its parameter
HALF = (torch.float16, torch.bfloat16)
# (x, y, chosen experts (…, k)) -> y with the deltas' effects
Effect = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def ready(layer: Layer, tap: Tap, moves: Sequence[Move]) -> Effect:
    """The effect of these moves, in float32 or better: whoever stores it rounds once.

    Leading axes of the deltas are those of ``x``: row i of a delta belongs to row i of (N, …) states.  What does not
    depend on the input is computed here, once for any number of passes.
    """
    if len(tap.paths) > 1:
        return _formula(layer, tap, moves)
    adds = [_adding(layer.params, update, delta) for update, delta in moves]

    def effect(x: Tensor, y: Tensor, chosen: Tensor | None) -> Tensor:
        if x.dtype in HALF or y.dtype in HALF:
            xp = arithmetic(y)
            x, y = xp.lift(x), xp.lift(y)
        for add in adds:
            y = add(x, y, chosen)
        return y

    return effect


def _formula(layer: Layer, tap: Tap, moves: Sequence[Move]) -> Effect:
    """A norm by its own formula, with the patched vectors."""
    patched, stored = (
        [_part(node(layer.block, path), params) for path in tap.paths]
        for params in (patched_params(layer, tap, moves), patched_params(layer, tap, ()))
    )

    def effect(x: Tensor, y: Tensor, _: Tensor | None) -> Tensor:
        xp = arithmetic(x)
        found = reduce(lambda value, part: part(value), patched, xp.lift(x))
        if not (torch.is_grad_enabled() and y.requires_grad):
            return found
        # the gradients of the stored vectors are those of the module's own output
        tied = xp.lift(y) + (found - reduce(lambda value, part: part(value), stored, xp.lift(x)))
        return tied + (found - tied).detach()

    return effect


def _part(leaf: Component, params: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """One leaf of a norm at these parameters; its scale is computed once."""
    if isinstance(leaf, Scale):
        scale = leaf.effective(params)
        return lambda x: scale * x
    return lambda x: leaf(params, x)


def _adding(params: Params, update: Update, delta: Delta) -> Effect:
    """Adds the effect of one delta to ``y``; x and y are lifted."""
    if isinstance(delta, ExpertLowRank):
        return lambda x, y, chosen: y + _routed(x, delta, chosen)
    if isinstance(delta, LowRank) and delta.left.shape[-2] == 1:
        left, right = delta.left[..., 0, :], delta.right[..., 0, :]
        return lambda x, y, _: torch.addcmul(y, (x * right).sum(-1, keepdim=True), left)
    return lambda x, y, _: y + update.effect(params, x, delta)


def patched_params(layer: Layer, tap: Tap, moves: Sequence[Move]) -> dict[str, Any]:
    """The parameters of a tap's leaves with the deltas on them, lifted to the precision in which patches are solved."""
    params: dict[str, Any] = {}
    for path in tap.paths:
        params |= {str(p): p.value(layer.params) for p in node(layer.block, path).own_parameters()}
    for update, delta in moves:
        value = update.param.value(layer.params)
        params[str(update.param)] = added(arithmetic(value).lift(value), delta)
    return params


def _routed(x: Tensor, delta: ExpertLowRank, chosen: Tensor | None) -> Tensor:
    assert chosen is not None
    if x.shape[-2] == 1:
        x = x.expand(*x.shape[:-2], chosen.shape[-1], x.shape[-1])
    return delta.routed(x, chosen)


def parameters_at(layer: Layer, tap: Tap) -> tuple[Param, ...]:
    """The parameters of the leaves that a tap computes."""
    return tuple(p for path in tap.paths for p in node(layer.block, path).own_parameters())


def update_of(layer: Layer, tap: Tap, param: Param) -> Update:
    """How the leaf that holds ``param`` at a tap is steered by it."""
    for path in tap.paths:
        leaf = node(layer.block, path)
        if param in leaf.own_parameters():
            return next(way for way in updates_of(leaf, "output") if way.param == param)
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
