"""Gemma 3: gated feed-forward half between two RMSNorms that store m − 1.  [G, Theorem 1]"""

from __future__ import annotations

from architectures.registry import View, register
from controllability.components import Activation, gated, residual
from controllability.interfaces import Component

# transformers' names of activations -> ours
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu",
    "swish": "silu", "relu": "relu", "relu2": "relu2", "linear": "identity", "tanh": "tanh",
}  # fmt: skip


@register(
    "gemma3",
    model_types=("gemma3_text", "gemma3"),
    layer_class="Gemma3DecoderLayer",
    topology="sequential, pre- and post-norm",
    feed_forward="gated",
    settings=lambda config: {"eps": config.rms_norm_eps, "activation": ACTIVATIONS[config.hidden_activation]},
    defaults={"eps": 1e-6, "activation": "gelu_tanh"},
)
def gemma3(view: View) -> Component:
    """x + post_norm(down(act(gate z) ∘ up z)) with z = pre_norm(x)."""
    act = view.settings["activation"]
    activation = act if isinstance(act, Activation) else Activation(act)
    half = gated(view.linear("mlp.gate_proj", "h", "d"), view.linear("mlp.up_proj", "h", "d"), activation)
    return residual(
        view.rms_norm("pre_feedforward_layernorm", offset=1)
        >> half
        >> view.linear("mlp.down_proj", "d", "h")
        >> view.rms_norm("post_feedforward_layernorm", offset=1)
    )
