"""Families with something of their own: switches, gains, gates, several norms, several inputs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from architectures.experts import DEEPSEEK, multiplier
from architectures.feed_forward import Gated, MoE, Norm, Plain, SigmoidTop, layer_norm, softmax_top, top_k
from architectures.mixers import Mixer, there
from architectures.registry import StatePoint
from architectures.shapes import Shape, after_norm, either, family, fixed_scale, parallel, post_ln, sequential
from architectures.view import View
from controllability.components import (
    Activation,
    Bias,
    Fixed,
    Gate,
    Glu,
    Identity,
    Mixed,
    Mixture,
    Product,
    Routing,
    Scale,
    Select,
    Sequence,
    Sum,
    Times,
    residual,
)
from controllability.errors import NotControllable
from controllability.interfaces import Component

GATED = Gated()
AFTER_ATTENTION = Norm("post_attention_layernorm")

# ------------------------------------------------------------------------ parallel or sequential, by a switch
DENSE_4H = Plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
family(
    "gpt_neox", "GPTNeoXLayer",
    either(
        lambda view: view.setting("use_parallel_residual", default=True),
        parallel(layer_norm("post_attention_layernorm"), DENSE_4H, "attention", "dense"),
        sequential(layer_norm("post_attention_layernorm"), DENSE_4H, mixer=Mixer("attention.dense")),
    ),
    defaults={"bias": True},
)  # fmt: skip
family(
    "stablelm", "StableLmDecoderLayer",
    either(
        lambda view: view.has("post_attention_layernorm", default=True),
        sequential(layer_norm("post_attention_layernorm"), GATED),
        parallel(layer_norm("input_layernorm"), GATED, "self_attn"),
    ),
)  # fmt: skip
family(
    "falcon", "FalconDecoderLayer",
    either(
        lambda view: view.has("post_attention_layernorm"),
        sequential(layer_norm("post_attention_layernorm"), DENSE_4H, mixer=Mixer("self_attention.dense")),
        either(
            lambda view: view.has("ln_mlp"),
            parallel(layer_norm("ln_mlp"), DENSE_4H, "self_attention", "dense"),
            parallel(layer_norm("input_layernorm"), DENSE_4H, "self_attention", "dense"),
        ),
    ),
)  # fmt: skip
FC12 = Plain("fc1", "fc2", default="relu")
family(
    "opt", "OPTDecoderLayer",
    either(
        lambda view: view.setting("do_layer_norm_before", default=True),
        sequential(layer_norm("final_layer_norm"), FC12, mixer=Mixer("self_attn.out_proj")),
        post_ln(
            FC12, layer_norm("final_layer_norm"),
            mixer=Mixer("self_attn.out_proj", output=StatePoint("self_attn_layer_norm")),
        ),
    ),
    defaults={"bias": True},
)  # fmt: skip
family(
    "olmo_hybrid", "OlmoHybridAttentionDecoderLayer OlmoHybridLinearAttentionDecoderLayer",
    either(
        lambda view: view.live and "LinearAttention" in type(view.layer).__name__,
        sequential(AFTER_ATTENTION, GATED, mixer=Mixer("linear_attn.o_proj")),
        sequential(None, GATED, Norm("post_feedforward_layernorm"), mixer=Mixer(after=AFTER_ATTENTION)),
    ),
)  # fmt: skip

# -------------------------------------------------------------------------------- multipliers, gains and gates


def depth_multiplier(view: View) -> Any:
    """MiniCPM3: scale_depth / √layers."""
    return view.setting("scale_depth", default=1.4) / math.sqrt(view.setting("num_hidden_layers", default=2))


GRANITE = sequential(AFTER_ATTENTION, GATED, times=multiplier)
family("granite", "GraniteDecoderLayer", GRANITE)
family("granite_swa", "GraniteSWADecoderLayer", GRANITE)
family("minicpm3", "MiniCPM3DecoderLayer", sequential(AFTER_ATTENTION, GATED, times=depth_multiplier))


def state_space(view: View) -> Component:
    """What the state-space mixer adds beside attention."""
    view.sites["inputs"] += (StatePoint("mamba", "after"),)
    return Mixed(2, "state-space output", view.size("d")) >> Times(view.setting("ssm_out_multiplier", default=1))


family(
    "falcon_h1", "FalconH1DecoderLayer",
    sequential(
        Norm("pre_ff_layernorm"),
        Gated("feed_forward", times=lambda view: tuple(view.setting("mlp_multipliers", default=(1, 1)))),  # type: ignore[arg-type]
    ),
    mixer=Mixer(times=lambda view: view.setting("attention_out_multiplier", default=1), beside=state_space),
)  # fmt: skip


def doge(view: View) -> Component | None:
    """A per-channel gain on the skip.  The mixture of ``is_moe`` mixes tokens and is refused."""
    if view.setting("is_moe", default=False):
        raise NotControllable(
            "doge: mixture of experts (mlp)", "its router reads neighbouring positions, also later ones",
            "use the dense variant (is_moe=False)", "architecture doge",
        )  # fmt: skip
    return sequential(AFTER_ATTENTION, GATED, skip=fixed_scale("post_attention_residual")).build(view)


family(
    "doge", "DogeDecoderLayer", Shape(doge, "sequential, pre-norm, gain on the skip", "gated"),
    mixer=Mixer(skip=fixed_scale("input_residual")),
)  # fmt: skip


def beam(view: View) -> Component:
    """√((n−1)/n) x + post(half(pre(x)))/√n with n from the depth."""
    n = 2 * (view.index + 1) + 1
    half = MoE(SigmoidTop(scaling=(), groups=True), dense=GATED, times=("routed_scaling_factor",))(view)
    branch = Norm("pre_feedforward_layernorm")(view) >> half >> Norm("post_feedforward_layernorm")(view)
    return residual(branch >> Times(1 / math.sqrt(n)), Times(math.sqrt((n - 1) / n)))


BEAM = "sequential, pre- and post-norm, both terms scaled by depth"
BEAM_MIXER = Mixer(
    after=AFTER_ATTENTION, times=lambda view: 1 / math.sqrt(2 * (view.index + 1)),
    skip=lambda view: Times(math.sqrt(1 - 1 / (2 * (view.index + 1)))),
)  # fmt: skip
family("beam", "BeamDecoderLayer", Shape(beam, BEAM, "mixture of experts, gated in some layers"), mixer=BEAM_MIXER)


def factors(view: View) -> Any:
    """MiniMax's α and β: of the normed state, and of what the half adds to it."""
    return view.setting("mlp_alpha_factor", default=1.0), view.setting("mlp_beta_factor", default=1.0)


def minimax_factor(view: View, which: str) -> Any:
    """α or β of a layer's attention, which is linear or full."""
    kind = "linear" if view.live and view.has("self_attn.out_proj") else "full"
    return view.setting(f"{kind}_attn_{which}_factor", default=1.0)


family(
    "minimax", "MiniMaxDecoderLayer", after_norm(AFTER_ATTENTION, MoE(softmax_top()), factors),
    mixer=Mixer(
        "self_attn.o_proj self_attn.out_proj", times=lambda view: minimax_factor(view, "beta"),
        skip=lambda view: Fixed(Norm("input_layernorm")(view) >> Times(minimax_factor(view, "alpha"))),
    ),
)  # fmt: skip


def mllama(view: View) -> Component:
    """Cross-attention layers gate the feed-forward half with tanh of one number."""
    branch = AFTER_ATTENTION(view) >> GATED(view)
    if view.live and view.has("cross_attn_mlp_gate"):
        branch = branch >> Gate(view.param("cross_attn_mlp_gate", "one"), "tanh")
    return residual(branch)


def mllama_gate(view: View) -> Component | None:
    """The same of what cross-attention adds."""
    gate = "cross_attn_attn_gate"
    return Gate(view.param(gate, "one"), "tanh") if view.live and view.has(gate) else None


family(
    "mllama mllama_text_model", "MllamaSelfAttentionDecoderLayer MllamaCrossAttentionDecoderLayer",
    Shape(mllama, "sequential, pre-norm, tanh gate in cross-attention layers", "gated"),
    mixer=Mixer("self_attn.o_proj cross_attn.o_proj", mllama_gate),
)  # fmt: skip

# ------------------------------------------------------------------------------------------- several norms


# groups that are left out count 0 here, not −∞: with a negative correction one of their experts may be chosen
AXK2 = replace(DEEPSEEK, routing=SigmoidTop(groups=True, options={"group_fill": 0.0}))


def gated_norm(view: View) -> Component:
    """Pre-norm, in sparse layers multiplied by the sigmoid of a small MLP of itself."""
    if not view.has("post_attention_layernorm.mlp"):
        return AFTER_ATTENTION(view) >> AXK2(view)
    at = "post_attention_layernorm"
    mlp = view.linear(f"{at}.mlp.fc1", "r", "d") >> Activation("silu") >> view.linear(f"{at}.mlp.fc2", "d", "r")
    return Norm(f"{at}.norm")(view) >> Product((Identity(), Fixed(mlp) >> Activation("sigmoid"))) >> AXK2(view)


def axk2(view: View) -> Component:
    """As DeepSeek V3, with a gated norm before the mixtures."""
    return residual(gated_norm(view))


family(
    "axk2",
    "AXK2DecoderLayer",
    Shape(
        axk2, "sequential, pre-norm (gated in some layers)", "mixture of experts, gated in some layers, shared experts"
    ),
)


def gemma4(view: View) -> Component:
    """Sandwich norms; maybe a mixture beside the MLP, each with norms of its own; then a stored factor.

    The router reads the raw residual.  Where per-layer embeddings follow, the block ends before them.
    """
    mlp = Norm("pre_feedforward_layernorm")(view) >> Gated(default="gelu_tanh")(view)
    if view.has("experts"):
        router = (
            view.bare_norm("router.norm")
            >> fixed_scale("router.scale")(view)
            >> Times(_root(view))
            >> view.router("router.proj")
        )
        routing = Routing(top_k(view), renormalise=1, per_expert=view.param("router.per_expert_scale", "E"))
        first = view.experts("experts.gate_up_proj", "2h", "d") >> Glu(
            view.activation(default="gelu_tanh", module="experts.act_fn")
        )
        mixture = Mixture(
            router, routing, Norm("pre_feedforward_layernorm_2")(view) >> first,
            view.experts("experts.down_proj", "d", "h"),
        )  # fmt: skip
        mlp = Sum(
            (mlp >> Norm("post_feedforward_layernorm_1")(view), mixture >> Norm("post_feedforward_layernorm_2")(view))
        )
    block = residual(mlp >> Norm("post_feedforward_layernorm")(view))
    if view.has("per_layer_input_gate"):
        view.sites["output"] = StatePoint("per_layer_input_gate")
        return block
    return block >> Gate(view.param("layer_scalar", "one"))


def _root(view: View) -> Any:
    return view.setting("hidden_size", default=4) ** -0.5


GEMMA4 = Shape(
    gemma4, "sequential, pre- and post-norm, stored factor", "gated, mixture of experts beside it",
    mixer=Mixer(after=AFTER_ATTENTION),
)  # fmt: skip
GEMMA4_UNIFIED = replace(GEMMA4, feed_forward="gated")


def assisted(config: Any) -> int:
    """An assistant reads an embedding and a last state of the model that it assists."""
    return 2 * config.backbone_hidden_size


family("gemma4_assistant", "Gemma4TextDecoderLayer", GEMMA4_UNIFIED, embeds=assisted)
family("gemma4_unified_assistant", "Gemma4UnifiedTextDecoderLayer", GEMMA4_UNIFIED, embeds=assisted)
family("gemma4 gemma4_text", "Gemma4TextDecoderLayer", GEMMA4)
family("gemma4_unified gemma4_unified_text", "Gemma4UnifiedTextDecoderLayer", GEMMA4_UNIFIED)


def xmod(view: View) -> Component:
    """x + half(x), or x + half(LN(x)): the sum is reproduced; an adapter follows, maybe the same LN, which is local.

    The sum is seen where a norm reads it; without one the adapters get it in pieces, one for each language.
    """
    half = Plain("intermediate.dense", "output.dense")(view)
    first, own = view.setting("pre_norm", default=False), view.has("output.adapter_layer_norm")
    if not (own or view.setting("adapter_reuse_layer_norm", default=True)):
        raise NotControllable(
            "xmod: adapter without a norm (output.adapter_modules)", "no module shows the sum at its positions",
            "use a config with adapter_layer_norm=True or adapter_reuse_layer_norm=True", "architecture xmod",
        )  # fmt: skip
    view.sites["output"] = StatePoint(
        "output.adapter_layer_norm" if own else "output.LayerNorm", run=2 if first and not own else 1
    )
    if not first:
        return residual(half)
    view.sites["inputs"] = (StatePoint("output.LayerNorm"),)
    view.sites[f"{view.prefix}output.LayerNorm"] = "skip"  # it may run again behind the half
    return residual(Fixed(layer_norm("output.LayerNorm")(view)) >> half)


family(
    "xmod", "XmodLayer", Shape(xmod, "post-norm after the sum, or pre-norm; language adapter", "plain"),
    ignored=("output.adapter", "output.LayerNorm"),
    mixer=Mixer("attention.output.dense", output=StatePoint("attention.output.LayerNorm")),
)  # fmt: skip


def hyperclovax(view: View) -> Component:
    """Post-norms by a switch, and Granite's residual multiplier."""
    post = Norm("post_norm2") if view.has("post_norm2.weight", default=True) else None
    return sequential(AFTER_ATTENTION, GATED, post, times=multiplier).build(view)  # type: ignore[return-value]


family(
    "hyperclovax", "HyperCLOVAXDecoderLayer", Shape(hyperclovax, "sequential, pre- and post-norm, multiplier", "gated"),
    mixer=Mixer(after=there(Norm("post_norm1")), times=multiplier),
)  # fmt: skip


def zaya(view: View) -> Component:
    """(mixture + b₁) s₁ + (r + b₂) s₂; the router adds what the router of the layer before saw.

    Where the router chooses no expert the experts' matrices move nothing: a bias makes up.
    """
    gate, affine = "mlp.gate", "post_mlp_residual_scale"
    view.sites[view.prefix + affine] = "weight"
    carried = view.has(f"{gate}.router_states_scale")  # from the second layer on
    r = (Select(0, "hidden state", view.size("d")),) if carried else ()
    normed = Sequence((*r, AFTER_ATTENTION(view)))

    def scaled(name: str) -> Sequence:
        return Bias(view.param(f"{affine}.{name}_bias", "d")) >> Scale(view.param(f"{affine}.{name}_scale", "d"))

    state: Component = normed >> view.linear(f"{gate}.down_proj", "r", "d", bias=True)
    view.sites["inputs"] = (StatePoint("post_attention_residual_scale", "after"),)
    if carried:
        before = Select(1, "router state", view.size("r"))
        state = state + (before >> fixed_scale(f"{gate}.router_states_scale", "r")(view))
        view.sites["inputs"] += (StatePoint("", argument="prev_router_hidden_states"),)
    router = state >> Norm(f"{gate}.router_mlp.norm")(view, "r")
    for module in ("fc1", "fc2"):
        router = router >> view.linear(f"{gate}.router_mlp.{module}", "r", "r", bias=True) >> Activation("gelu")
    router = router >> view.linear(f"{gate}.router_mlp.out_proj", "E+1", "r")
    routing = Routing(1, correction=view.param(f"{gate}.balancing_biases", "E+1"), skip=True)
    inner = normed >> view.experts("mlp.experts.gate_up_proj", "2h", "d") >> Glu(view.activation())
    mixture = Mixture(router, routing, inner, view.experts("mlp.experts.down_proj", "d", "h"))
    return Sum((Sequence((*r, scaled("residual"))), mixture >> scaled("hidden_states")))


def zaya_mixer(view: View) -> Component | None:
    """(W a + b₁) s₁ + (r + b₂) s₂."""
    affine = "post_attention_residual_scale"
    view.sites[view.prefix + affine] = "weight"

    def scaled(name: str) -> Sequence:
        return Bias(view.param(f"{affine}.{name}_bias", "d")) >> Scale(view.param(f"{affine}.{name}_scale", "d"))

    after, skip = (lambda _: scaled("hidden_states")), (lambda _: Fixed(scaled("residual")))
    return Mixer(after=after, skip=skip, output=StatePoint(affine, "after"))(view)


family(
    "zaya", "ZayaDecoderLayer",
    Shape(zaya, "sequential, pre-norm, scale and bias on both terms", "mixture of experts, router state carried on"),
    mixer=zaya_mixer,
)  # fmt: skip
