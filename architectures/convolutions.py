"""Families with a short convolution over time behind the feed-forward half: the convolution's own taps are the outer map.

By Theorem 1b what stands before them may read other positions; so every position is patched by itself, at the window that it reads.
"""

from __future__ import annotations

import math

from architectures.registry import StatePoint
from architectures.shapes import Build, Shape, family
from architectures.view import View
from controllability.components import Select, Sum, Taps, Window
from controllability.interfaces import Component


def convolved(module: str, residual: StatePoint, scaled: bool) -> Shape:
    """r + conv(u), u what the half gives; ``scaled`` divides the convolution with its own skip by √(K + 1)."""

    def build(view: View) -> Component:
        held = view.get(f"{module}.conv1d")
        count = int(held.kernel_size[0]) if view.live else int(view.setting("conv_kernel_size", default=4))
        taps = Taps(
            view.param(f"{module}.conv1d.weight", "d", "1", str(count)), 1, 1 / math.sqrt(count + 1) if scaled else 1
        )
        r, u = Select(0, "hidden state", view.size("d")), Select(1, "feed-forward output", view.size("d"))
        return Sum((r, u >> Window(count) >> taps))

    built: Build = build
    return Shape(built, "sequential, convolution over time", "not moved", (residual, StatePoint(module)), mixer=None)


family("inkling_text", "InklingDecoderLayer", convolved("mlp_sconv", StatePoint("post_attention_layernorm"), False))
family(
    "inkling2_text", "Inkling2FullDecoderLayer Inkling2SlidingDecoderLayer",
    convolved("post_mlp_convolution", StatePoint("mlp_input", argument="partial_block_states"), True),
)  # fmt: skip
