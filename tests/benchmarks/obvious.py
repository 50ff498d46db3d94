"""The obvious procedure, written out: what patched generation is measured against.

For each token the whole history is run again without a cache; the patch of each layer is made as a dense ΔW and added to the
weights; the token is run alone; the weights are copied back.  Gemma 3 only; the norm scale by route ``uniform``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ObviousProcedure:
    """Holds one copy of every weight that it overwrites: restoring is a copy, and exact."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, list(model.model.layers)
        self.originals = [(weight, weight.detach().clone()) for layer in self.layers for weight in _weights(layer)]

    def token(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (vocabulary,) of the last token of ``history`` (1, L): with its context, and patched without it."""
        seen: list[dict[str, Tensor]] = [{} for _ in self.layers]
        hooks = [hook for layer, kept in zip(self.layers, seen, strict=True) for hook in _observe(layer, kept)]
        wanted = self.model(history, use_cache=False, logits_to_keep=1).logits[0, -1]
        for hook in hooks:
            hook.remove()
        hooks = [
            layer.pre_feedforward_layernorm.register_forward_pre_hook(
                lambda norm, args, layer=layer, kept=kept: _write(layer, args[0][0, -1], kept)
            )
            for layer, kept in zip(self.layers, seen, strict=True)
        ]
        position = torch.tensor([[history.shape[1] - 1]])
        patched = self.model(history[:, -1:], position_ids=position, use_cache=False).logits[0, -1]
        for hook in hooks:
            hook.remove()
        for weight, original in self.originals:
            weight.copy_(original)
        return wanted, patched


def _weights(layer: Any) -> list[Tensor]:
    return [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight,
            layer.post_feedforward_layernorm.weight]  # fmt: skip


def _observe(layer: Any, kept: dict[str, Tensor]) -> list[Any]:
    """Keep what the feed-forward half reads, normalises, computes inside, and what leaves the layer, at the last token."""

    def reads(norm: Any, args: Any, output: Tensor) -> None:
        kept["v"], kept["z"] = args[0][0, -1], output[0, -1]

    def inside(down: Any, args: Any) -> None:
        kept["inner"] = args[0][0, -1]

    def leaves(norm: Any, args: Any, output: Tensor) -> None:
        kept["out"] = kept["v"] + output[0, -1]

    return [
        layer.pre_feedforward_layernorm.register_forward_hook(reads),
        layer.mlp.down_proj.register_forward_pre_hook(inside),
        layer.post_feedforward_layernorm.register_forward_hook(leaves),
    ]


def _write(layer: Any, v: Tensor, kept: dict[str, Tensor]) -> None:
    """Dense ΔW of the three matrices and Δm of the scale into the weights, so that v leads to ``out``."""
    norm = layer.post_feedforward_layernorm
    z = layer.pre_feedforward_layernorm.forward(v)
    for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
        weight.add_(torch.outer(weight @ (kept["z"] - z), z) / (z @ z))
    wanted, inner, down = kept["out"] - v, kept["inner"], layer.mlp.down_proj.weight
    y, m = down @ inner, 1 + norm.weight
    size, eps = y.square().mean(), norm.eps
    factor = (wanted / m).square().mean().sqrt() * ((size + eps) / size).sqrt()
    norm.weight.add_(factor * m - m)
    down.add_(torch.outer(wanted / (factor * m) * (size + eps).sqrt() - y, inner) / (inner @ inner))
