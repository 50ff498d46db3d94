"""Families with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from architectures.feed_forward import (
    Fused,
    Gated,
    MoE,
    Norm,
    Plain,
    SigmoidTop,
    layer_norm,
    softmax_top,
    top_k,
    top_softmax,
)
from architectures.mixers import Mixer
from architectures.shapes import family, parallel, sequential
from architectures.view import View
from controllability.components import Activation, Bias, ExpertLinear, Glu, Mixture, Routing, Swish, Times, gated
from controllability.interfaces import Component

GATED = Gated()
AFTER_ATTENTION = Norm("post_attention_layernorm")
SHARED = Gated("mlp.shared_experts")


def pre(half: MoE, norm: Norm = AFTER_ATTENTION) -> Any:
    """The usual place of a mixture: pre-norm, residual."""
    return sequential(norm, half)


# ----------------------------------------------------------------------------- soft-max over all, then top-k
SOFTMAX = MoE(softmax_top("norm_topk_prob"), dense=GATED)
family("mixtral", "MixtralDecoderLayer", pre(MoE(softmax_top())))
family("olmoe", "OlmoeDecoderLayer", pre(MoE(softmax_top("norm_topk_prob"))))
family("qwen3_moe", "Qwen3MoeDecoderLayer", pre(SOFTMAX))
family("mellum", "MellumDecoderLayer", pre(SOFTMAX))
QWEN2_MOE = replace(SOFTMAX, shared=Gated("mlp.shared_expert"), shared_gate="shared_expert_gate")
family("qwen2_moe", "Qwen2MoeDecoderLayer", pre(QWEN2_MOE))
NORM_1P = replace(AFTER_ATTENTION, offset=1)
family("qwen3_next", "Qwen3NextDecoderLayer", pre(QWEN2_MOE, NORM_1P), mixer="linear_attn.out_proj self_attn.o_proj")
family(
    "qwen3_5_moe qwen3_5_moe_text",
    "Qwen3_5MoeDecoderLayer",
    pre(replace(QWEN2_MOE, routing=softmax_top()), NORM_1P),
    mixer="linear_attn.out_proj self_attn.o_proj",
)
family(
    "jamba", "JambaAttentionDecoderLayer JambaMambaDecoderLayer",
    pre(MoE(softmax_top(False), "feed_forward", "router", dense=Gated("feed_forward")), Norm("pre_ff_layernorm")), mixer="mamba.out_proj self_attn.o_proj",
)  # fmt: skip
family(
    "hunyuan_v1_moe", "HunYuanMoEV1DecoderLayer",
    pre(MoE(softmax_top(), router="gate.wg", shared=Gated("mlp.shared_mlp"))),
)  # fmt: skip
family(
    "flex_olmo", "FlexOlmoDecoderLayer",
    sequential(None, MoE(softmax_top("norm_topk_prob")), Norm("post_feedforward_layernorm")),
    mixer=Mixer(after=AFTER_ATTENTION),
)  # fmt: skip


def deepseek_v2(view: View) -> Routing:
    """Soft-max scores; greedy, or only in the best groups, a group being worth its best expert."""
    limited = view.setting("topk_method", default="greedy") == "group_limited_greedy"
    groups = (view.setting("n_group", default=1), view.setting("topk_group", default=1)) if limited else None
    return Routing(
        top_k(view),
        groups=groups,
        group_best=1,
        group_fill=0.0,
        scaling=view.setting("routed_scaling_factor", default=1),
    )


family("deepseek_v2", "DeepseekV2DecoderLayer", pre(MoE(deepseek_v2, shared=SHARED, dense=GATED)))


def ernie(view: View) -> Routing:
    """Soft-max; a correction for the choice; the sum that divides is at least moe_norm_min (never reached)."""
    return Routing(
        top_k(view), correction=view.param("mlp.gate.moe_statics.e_score_correction_bias", "one", "E"), renormalise=1
    )


family(
    "ernie4_5_moe",
    "Ernie4_5_MoeDecoderLayer",
    pre(MoE(ernie, shared=SHARED, shared_at="mlp.shared_experts", dense=GATED, shared_first=True)),
)


# ----------------------------------------------------------- sigmoid scores with a correction, in the best groups
DEEPSEEK = MoE(SigmoidTop(groups=True), shared=SHARED, dense=GATED)
family("deepseek_v3", "DeepseekV3DecoderLayer", pre(DEEPSEEK))
family("deepseek_v32", "DeepseekV32DecoderLayer", pre(DEEPSEEK))
family("bailing_hybrid", "BailingHybridDecoderLayer", pre(DEEPSEEK))
family("dots1", "Dots1DecoderLayer", pre(DEEPSEEK))
family("dots3_note dots3_note_text", "Dots3NoteTextDecoderLayer", pre(DEEPSEEK))
family("exaone_moe", "ExaoneMoeDecoderLayer", pre(DEEPSEEK))
family("glm4_moe", "Glm4MoeDecoderLayer", pre(DEEPSEEK))
family("glm4_moe_lite", "Glm4MoeLiteDecoderLayer", pre(DEEPSEEK))
family("glm_moe_dsa", "GlmMoeDsaDecoderLayer", pre(DEEPSEEK))
family("kimi_linear", "KimiLinearDecoderLayer", pre(DEEPSEEK))
family("solar_open", "SolarOpenDecoderLayer", pre(DEEPSEEK))
family("mimo_v2_flash", "MiMoV2FlashDecoderLayer", pre(replace(DEEPSEEK, shared=None)))
family("axk1", "AXK1DecoderLayer", pre(replace(DEEPSEEK, after="post_mlp_layernorm")))
family(
    "hy_v3", "HYV3DecoderLayer",
    pre(replace(DEEPSEEK, routing=SigmoidTop("mlp.e_score_correction_bias", ("router_scaling_factor",), ""))),
)  # fmt: skip
family("minimax_m2", "MiniMaxM2DecoderLayer", pre(MoE(SigmoidTop("mlp.e_score_correction_bias", (), "", eps=0.0))))
family(
    "lfm2_moe", "Lfm2MoeDecoderLayer",
    pre(
        MoE(
            SigmoidTop("feed_forward.expert_bias", eps=1e-6), "feed_forward",
            dense=Gated("feed_forward", "w1", "w3", "w2"),
        ),
        Norm("ffn_norm"),
    ), mixer="conv.out_proj self_attn.out_proj",
)  # fmt: skip
family(
    "flint", "FlintDecoderLayer",
    pre(MoE(SigmoidTop("", (), eps=0.0), shared=Gated("mlp.shared_expert"), dense=GATED)),
)  # fmt: skip
family(
    "kolibri1", "Kolibri1DecoderLayer",
    sequential(
        AFTER_ATTENTION, MoE(SigmoidTop(scaling=(), eps=0.0, options={"choose_logits": True}), shared=SHARED),
        Norm("post_mlp_layernorm"),
    ),
    mixer=Mixer(after=Norm("post_self_attn_layernorm")),
)  # fmt: skip
family(
    "afmoe", "AfmoeDecoderLayer",
    sequential(
        Norm("pre_mlp_layernorm"),
        MoE(
            SigmoidTop("mlp.expert_bias", ("route_scale",), ""), router="router.gate", shared=SHARED, dense=GATED,
            shared_first=True,
        ),
        Norm("post_mlp_layernorm"),
    ),
    mixer=Mixer(after=AFTER_ATTENTION),
)  # fmt: skip


def laguna(view: View) -> Routing:
    """DeepSeek's without groups; maybe a soft-cap on the logits; the block scales."""
    cap = view.setting("moe_router_logit_softcapping", default=0.0)
    plain = SigmoidTop(scaling=(), renormalise="", eps=0.0)(view)
    return replace(plain, cap=cap if cap > 0 else None)


family(
    "laguna", "LagunaDecoderLayer",
    pre(MoE(laguna, shared=SHARED, dense=GATED, shared_first=True, times=("moe_routed_scaling_factor",))),
)  # fmt: skip


# ---------------------------------------------------------------------------------- top-k, then soft-max
def silu(view: View) -> Glu:
    """Experts that compute with SiLU whatever the config says; their shared ones do not."""
    return Glu(Activation("silu"))


family(
    "aria_text",
    "AriaTextDecoderLayer",
    pre(MoE(top_softmax, router="router", shared=SHARED, transposed=True, glu=silu)),
)


GRANITE = MoE(
    top_softmax, "block_sparse_moe", "router", dense=Fused("shared_mlp", "input_linear", "output_linear"),
    shared=Fused("shared_mlp", "input_linear", "output_linear"), shared_at="shared_mlp",
)  # fmt: skip


def multiplier(view: View) -> Any:
    """Granite's residual multiplier."""
    return view.setting("residual_multiplier", default=1.0)


GRANITE_SHARED = sequential(AFTER_ATTENTION, GRANITE, times=multiplier)
family(
    "granitemoe", "GraniteMoeDecoderLayer",
    sequential(AFTER_ATTENTION, replace(GRANITE, shared=None, dense=None), times=multiplier),
)  # fmt: skip
family("granitemoe_swa", "GraniteMoeSWADecoderLayer", GRANITE_SHARED)
family("granitemoeshared", "GraniteMoeSharedDecoderLayer", GRANITE_SHARED)
family("granitemoehybrid", "GraniteMoeHybridDecoderLayer", GRANITE_SHARED, mixer="mamba.out_proj self_attn.o_proj")


def cohere_routing(view: View) -> Routing:
    """Top-k over the logits, then soft-max or sigmoid of the chosen."""
    if view.setting("expert_selection_fn", default="softmax") == "softmax":
        return top_softmax(view)
    wanted = view.setting("norm_topk_prob", default=True)
    return Routing(top_k(view), "sigmoid", after=True, renormalise=1 if wanted else None)


def averaged(view: View, routed: Component, beside: Component | None) -> Component:
    """Routed and shared experts, averaged unless the config says 'sum'."""
    if beside is None:
        return routed
    total = routed + beside
    average = view.setting("shared_expert_combination_strategy", default="average") == "average"
    return total >> Times(0.5) if average else total


family(
    "cohere2_moe", "Cohere2MoeDecoderLayer",
    parallel(
        layer_norm("input_layernorm", bias=False),
        MoE(cohere_routing, shared=SHARED, shared_at="mlp.shared_experts", dense=GATED, merge=averaged), "self_attn",
    ),
)  # fmt: skip


def clamped(view: View) -> Glu:
    """gpt-oss's SwiGLU: clamped halves, slope alpha, up + 1; interleaved there."""
    alpha, limit = view.setting("swiglu_alpha", default=1.702), view.setting("swiglu_limit", default=7.0)
    return Glu(Swish(alpha), "gate_up", limit, 1)


family(
    "gpt_oss", "GptOssDecoderLayer",
    pre(MoE(top_softmax, router="router", transposed=True, glu=lambda view: replace(clamped(view), order="interleaved"))),
    defaults={"has": ("mlp.router.bias", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias")},
)  # fmt: skip
family(
    "minimax_m3_vl_text", "MiniMaxM3VLDecoderLayer",
    pre(
        MoE(
            SigmoidTop(renormalise="", scaling=()), times=("routed_scaling_factor",),
            shared=Fused("mlp.shared_experts", glu=clamped),
            shared_at="mlp.shared_experts", dense=Fused(glu=clamped), glu=clamped,
        ),
        NORM_1P,
    ),
)  # fmt: skip


def phimoe(view: View) -> Routing:
    """Sparse mixer: two choices, each with a soft-max of its own."""
    return Routing(2, "sparsemixer", jitter=view.setting("router_jitter_noise", default=0.01))


family("phimoe", "PhimoeDecoderLayer", pre(MoE(phimoe, router="router"), layer_norm("post_attention_layernorm")))


# ------------------------------------------------------------------------------ other storage, other dispatch
def dbrx(view: View) -> Component:
    """Experts' matrices stacked in two dimensions; the last one stored (h, d)."""
    count = view.layer.ffn.experts.num_experts if view.live else None
    matrix = ("E", "h", "d") if count is None else ("Eh", "d")

    def stack(name: str, transposed: bool = False) -> ExpertLinear:
        return ExpertLinear(
            view.param(f"ffn.experts.mlp.{name}", *matrix), None, "in_out" if transposed else "out_in", count
        )

    view.sites[f"{view.prefix}ffn.experts.mlp|experts"] = f"{view.prefix}ffn.experts"
    config = view.config.ffn_config if view.live else None
    act = view.activation(default=config.ffn_act_fn.get("name", "silu") if config else "silu")
    power = config.moe_normalize_expert_weights if config else 1
    routing = Routing(config.moe_top_k if config else 2, renormalise=None if power is None else int(power))
    return Mixture(view.router("ffn.router.layer"), routing, gated(stack("w1"), stack("v1"), act), stack("w2", True))


family(
    "dbrx",
    "DbrxBlock",
    replace(sequential(layer_norm("norm_attn_norm.norm_2", bias=False), dbrx), feed_forward=MoE.kind),
    mixer="norm_attn_norm.attn.out_proj",
)


def jetmoe(view: View) -> Component:
    """Experts in two modules of their own, and one learned bias for all after the sum."""
    for module in ("input_linear", "output_linear"):
        view.sites[f"{view.prefix}mlp.{module}|experts"] = f"{view.prefix}mlp"
    inner = view.experts("mlp.input_linear.weight", "2h", "d") >> Glu(view.activation())
    last = view.experts("mlp.output_linear.weight", "d", "h")
    view.sites[f"{view.prefix}mlp"] = "output"  # the module computes the whole mixture, not only its bias
    return Mixture(view.router("mlp.router.layer"), top_softmax(view), inner, last) >> Bias(view.param("mlp.bias", "d"))


family(
    "jetmoe", "JetMoeDecoderLayer",
    replace(sequential(AFTER_ATTENTION, jetmoe), feed_forward=MoE.kind, mixer=None),  # its attention is a mixture itself
)  # fmt: skip


def llama4_routing(view: View) -> Routing:
    """Top-k over the logits, then the sigmoid of each."""
    return Routing(top_k(view), "sigmoid", after=True)


LLAMA4 = MoE(
    llama4_routing, "feed_forward", "router", shared=Gated("feed_forward.shared_expert"), dense=Gated("feed_forward"),
    transposed=True, share_first=True, shared_first=False,
)  # fmt: skip
family("llama4 llama4_text", "Llama4TextDecoderLayer", pre(LLAMA4))


# ----------------------------------------------------------------------------- one mixer a layer (nemotron_h)
def nemotron_h(view: View) -> Component | None:
    """Layers are Mamba, attention, MLP or mixture; the first two have no feed-forward half."""
    latent = view.has("mixer.fc1_latent_proj.weight")
    moe = MoE(
        SigmoidTop("mixer.gate.e_score_correction_bias", groups=True), "mixer",
        shared=Plain("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj", default="relu2"), gated=False,
        dense=Plain("mixer.up_proj", "mixer.down_proj", default="relu2"),
        before_experts="fc1_latent_proj" if latent else "", after_experts="fc2_latent_proj" if latent else "",
    )  # fmt: skip
    if view.live and not (view.has("mixer.experts") or view.has("mixer.up_proj")):
        return None
    return sequential(Norm("norm"), moe).build(view)


family(
    "nemotron_h",
    "NemotronHBlock",
    replace(
        sequential(Norm("norm"), Plain("", "")),
        build=nemotron_h,
        feed_forward="plain or mixture of experts, one mixer a layer",
    ),
    mixer="mixer.out_proj mixer.o_proj",
)
