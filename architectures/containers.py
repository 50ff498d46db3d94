"""Families whose layers are put together otherwise: lists beside each other, time first, several states a position, two halves."""

from architectures.feed_forward import Gated, Norm, Plain, layer_norm
from architectures.mixers import Mixer
from architectures.registry import StatePoint
from architectures.shapes import Shape, family, post_ln, sequential
from architectures.view import View
from controllability.components import Activation, Select, Sum, residual
from controllability.interfaces import Component

GATED = Gated()
AFTER_ATTENTION = Norm("post_attention_layernorm")

family(
    "xlnet", "XLNetLayer",
    post_ln(Plain("ff.layer_1", "ff.layer_2", ("ff_activation",)), layer_norm("ff.layer_norm"), after="ff"),
    sequence_first=True,  # its attention ends in a tensor of three axes that no module of its own applies: no mixer
)  # fmt: skip
family(
    "prophetnet", "ProphetNetDecoderLayer",
    post_ln(Plain("feed_forward.intermediate", "feed_forward.output"), layer_norm("feed_forward_layer_norm")),
    streams=lambda config: 1 + config.ngram,  # the map behind its attention runs once for each kind of stream: no mixer
)  # fmt: skip
family(
    "cpmant", "CpmAntTransformerBlock",
    sequential(Norm("ffn.layernorm_before_ffn"), Gated("ffn.ffn", "w_in.w_0", "w_in.w_1", "w_out", default="gelu")), mixer="self_att.self_attention.attention_out",
)  # fmt: skip
family("blt", "BltTransformerLayer", sequential(AFTER_ATTENTION, GATED), under="local_decoder")


def xlm(view: View) -> Component:
    """There is no layer module: a list of feed-forward modules, and lists of norms beside it."""
    index = view.prefix.rstrip(".").rpartition(".")[2]
    norm = f"layer_norm2.{index}" if view.live else "layer_norm2"
    around = View(view.prefix.rpartition("ffns.")[0], view.sizes, view.settings, view.parent, view.config, view.index)
    view.sites["output"] = StatePoint(f"../../{norm}", "after")
    default = "gelu" if view.setting("gelu_activation", default=True) else "relu"
    half = view.linear("lin1", "h", "d") >> Activation(default) >> view.linear("lin2", "d", "h")
    return residual(half) >> around.layer_norm(norm)


def xlm_mixer(view: View) -> Component | None:
    """Attention modules are in a list of their own too."""
    index = view.prefix.rstrip(".").rpartition(".")[2]
    return Mixer("out_lin", output=StatePoint(f"../../layer_norm1.{index}"))(view)


family(
    "xlm", "TransformerFFN", Shape(xlm, "post-norm after the sum", "plain"), mixer=xlm_mixer,
    mixer_class=("MultiHeadAttention",),
)  # fmt: skip


def longcat(view: View) -> Component:
    """The second of two halves; what the shortcut mixture gave joins at the end, as a second input."""
    x, m = Select(0, "hidden state", view.size("d")), Select(1, "shortcut mixture", view.size("d"))
    return Sum((x, m, x >> Norm("post_attention_layernorm.1")(view) >> Gated("mlps.1")(view)))


family(
    "longcat_flash", "LongcatFlashDecoderLayer", Shape(longcat, "parallel", "gated"),
    inputs=(StatePoint("post_attention_layernorm.1"), StatePoint("mlp", "after")), ignored=("mlps.0",),
    mixer=(
        Mixer("self_attn.0.o_proj", output=StatePoint("post_attention_layernorm.0")),
        Mixer("self_attn.1.o_proj", entry=StatePoint("input_layernorm.1"), output=StatePoint("post_attention_layernorm.1")),
    ),
)  # fmt: skip
