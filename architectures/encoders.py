"""Beyond causal language models: a vision transformer, encoder-decoders' decoders."""

from __future__ import annotations

from architectures.feed_forward import Gated, Norm, Plain, layer_norm
from architectures.mixers import Mixer
from architectures.registry import StatePoint
from architectures.shapes import Shape, family, sequential
from architectures.view import View
from controllability.components import residual
from controllability.interfaces import Component

family(
    "vit",
    "ViTLayer",
    sequential(layer_norm("layernorm_after"), Plain("mlp.fc1", "mlp.fc2")),
    mixer="attention.output.dense",
)


def t5(view: View) -> Component:
    """The decoder's feed-forward sublayer: plain, or gated in T5 1.1."""
    at = "DenseReluDense"
    if view.has(f"{at}.wi_0"):
        half = Gated(at, "wi_0", "wi_1", "wo", default="gelu_tanh")(view)
    else:
        half = Plain(f"{at}.wi", f"{at}.wo", default="relu")(view)
    return residual(Norm("layer_norm")(view) >> half)


family(
    "t5",
    "T5LayerFF",
    Shape(t5, "sequential, pre-norm", "plain or gated"),
    under="decoder",
    mixer=Mixer("SelfAttention.o EncDecAttention.o", output=StatePoint("", "after")),
    mixer_class=("T5LayerSelfAttention", "T5LayerCrossAttention"),
)
