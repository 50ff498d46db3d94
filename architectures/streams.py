"""Families with several residual streams: exact at the logits, by the last half and what joins the streams behind it.

A half writes one vector into all streams, so the states of the layers before stay apart; what the head reads does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from architectures.experts import DEEPSEEK
from architectures.feed_forward import FeedForward, MoE, Norm, SigmoidTop
from architectures.registry import StatePoint
from architectures.shapes import Shape, family
from architectures.view import View
from controllability.components import (
    AboveMean,
    Activation,
    Bias,
    Clamp,
    Collapse,
    Correction,
    Fixed,
    Gate,
    Glu,
    InverseRms,
    Joined,
    Linear,
    Normalize,
    NormalizeEach,
    Product,
    Remixed,
    Routing,
    Scale,
    Select,
    Spread,
    Streams,
    Sum,
    Times,
    gated,
)
from controllability.errors import NotControllable
from controllability.interfaces import Component

AFTER_ATTENTION = Norm("post_attention_layernorm")
SCORES: dict[str, Any] = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
SEVERAL = "several residual streams"


def behind(view: View) -> View:
    """The module two levels above a layer, as a builder sees it: what joins the streams belongs to it."""
    prefix = view.prefix.rstrip(".").rpartition(".")[0].rpartition(".")[0]
    return replace(view, prefix=f"{prefix}." if prefix else "", layer=view.parent)


def last(view: View) -> bool:
    """Whether it is the last layer that runs, or an abstract one."""
    return not view.live or view.index == min(len(view.parent.layers), view.setting("num_hidden_layers")) - 1


def collapsed(view: View, streams: Component, half: FeedForward, logits: Component) -> Component:
    """Σ_n (σ(l_n) + ε) S_n, l the head's ``logits`` of S: the streams with what the half adds to them."""
    around = behind(view)
    squash = Gate(around.param("hc_head.hc_scale", "one")) >> Fixed(
        Bias(around.param("hc_head.hc_base", str(count(view))))
    )
    branch = Select(0, "collapsed state", view.size("d")) >> AFTER_ATTENTION(view) >> half(view)
    written = Spread(streams, Select(1, "write weights", count(view)), branch)
    view.sites["inputs"] = (StatePoint("post_attention_layernorm"), StatePoint("ffn_hc", "after", item=0))
    view.sites["inputs"] += (StatePoint("ffn_hc"),)
    view.sites["output"] = StatePoint("../../hc_head", "after")
    view.sites[f"{around.prefix}hc_head"] = "weight"
    return Collapse(
        written, Joined() >> logits >> squash >> Activation("sigmoid"), view.setting("hc_eps", default=1e-6)
    )


def count(view: View) -> int:
    """How many streams there are."""
    return int(view.setting("hc_mult", "hc_count", default=4))


def head(view: View) -> Linear:
    """The map from all streams to a logit for each."""
    n = count(view)
    return Linear(behind(view).param("hc_head.hc_fn", str(n), f"{n}d"))


def carried(view: View) -> Component:
    """The streams that enter the half's hyper-connection."""
    n = count(view)
    return Select(2, "streams", view.size(f"{n}d")) >> Streams(n)


def hy_v4(view: View) -> Component | None:
    """S + b⊗half; the head normalises after its map."""
    if not last(view):
        return None
    size = InverseRms(behind(view).eps("hc_head.input_norm", 1e-6))
    return collapsed(view, carried(view), HALF_HY, Product((head(view), size)))


def clamped_glu(view: View) -> Component:
    """SwiGLU with both halves clamped."""
    return Glu(view.activation(), limit=view.setting("swiglu_limit", default=10.0))


def clamped_silu(view: View) -> Component:
    """The same of HY V4's experts, which do not ask the config for their activation."""
    return Glu(Activation("silu"), limit=view.setting("swiglu_limit", default=10.0))


def clamped(view: View) -> Component:
    """The shared expert of DeepSeek V4: gate and up are clamped."""
    limit, at = view.setting("swiglu_limit", default=10.0), "mlp.shared_experts"
    act = view.activation(module=f"{at}.act_fn")
    gate = view.linear(f"{at}.gate_proj", "h", "d") >> Clamp(None, limit) >> act
    up = view.linear(f"{at}.up_proj", "h", "d") >> Clamp(-limit, limit)
    return Product((gate, up)) >> view.linear(f"{at}.down_proj", "d", "h")


def scored(view: View) -> Routing:
    """DeepSeek V4's scores: the root of softplus, or sigmoids."""
    name = view.setting("scoring_func", default="sqrtsoftplus")
    if name not in SCORES:
        reason = (
            f"scoring_func {name!r} is none of {', '.join(SCORES)}, of which rules of the choice of experts are known"
        )
        raise NotControllable(
            "deepseek_v4: mixture of experts (mlp.gate)", reason, "take one of those", "architecture deepseek_v4"
        )
    return replace(SigmoidTop(renormalise="")(view), score=SCORES[name])


def deepseek_v4(view: View) -> Component | None:
    """combᵀ S + b⊗half with a doubly stochastic comb; the head normalises before its map."""
    if not last(view):
        return None
    if view.has("mlp.gate.tid2eid"):
        reason = "the last layer chooses experts by the token's id (hash_moe), which no state shows"
        raise NotControllable(
            "deepseek_v4: mixture of experts (mlp)",
            reason,
            "end with a layer that routes (moe)",
            "architecture deepseek_v4",
        )
    n, around = count(view), behind(view)
    norm = Normalize("rms", around.eps("hc_head.input_norm", 1e-6), f"{around.prefix}hc_head.input_norm")
    streams = Remixed(Select(3, "mixing weights", n * n), carried(view))
    block = collapsed(view, streams, HALF_V4, norm >> head(view))
    view.sites["inputs"] += (StatePoint("ffn_hc", "after", item=1),)
    return block


HALF_HY = replace(DEEPSEEK, glu=clamped_silu)
HALF_V4 = MoE(scored, shared=clamped, glu=clamped_glu)
HEAD = f"{SEVERAL}, collapsed by hc_head"
family("hy_v4", "HYV4DecoderLayer", Shape(hy_v4, HEAD, "gated, mixture of experts", mixer=None), level="logits")
family(
    "deepseek_v4", "DeepseekV4DecoderLayer", Shape(deepseek_v4, HEAD, "mixture of experts", mixer=None), level="logits"
)


def qwen4_exp(view: View) -> Component | None:
    """The last mixer alone: Σ_n w_n∘m_n∘n(S_n)/n, w a low-rank map of the normed streams.

    Each stream is normalised by itself, so the half before is not asked: the mixer's own scale and map do it all.
    """
    if view.has("block_inject_weight"):
        return None
    n = count(view)
    norm = NormalizeEach(n, view.eps("hc_norm", 1e-6), f"{view.prefix}hc_norm")
    values = norm >> Scale(view.param("hc_norm.weight", f"{n}d"), 1) >> Streams(n)
    low = view.linear("input_mix_weight_down", "r", f"{n}d") >> Times(1 / n) >> Activation("silu")
    weights = Joined() >> low >> view.linear("input_mix_weight_up", f"{n}d", "r") >> Activation("sigmoid") >> Streams(n)
    return Collapse(values, weights) >> Times(1 / n)


family(
    "qwen4_exp qwen4_exp_text", "Qwen4ExpTextGatedResidual",
    Shape(qwen4_exp, f"{SEVERAL}, each normalised, mixed by hyper_connection_mixer", "not moved", mixer=None),
    inputs=(StatePoint(""),), level="logits",
)  # fmt: skip


def gemma3n(view: View) -> Component | None:
    """AltUp: the active stream is the prediction, corrected by what the last layer gives with a gain of its own."""
    if not last(view):
        return None
    if view.live and view.setting("altup_active_idx", default=0):
        reason = "the active stream is not the first (altup_active_idx), and the head reads it otherwise"
        raise NotControllable("gemma3n: AltUp", reason, "altup_active_idx=0", "architecture gemma3n")
    n, x = int(view.setting("altup_num_inputs", default=4)), Select(0, "hidden state", view.size("d"))
    gate: Component = view.linear("mlp.gate_proj", "h", "d")
    if sparse := getattr(view.get("mlp"), "activation_sparsity", 0):
        gate = gate >> AboveMean(NormalDist().inv_cdf(sparse))
    half = gated(gate, view.linear("mlp.up_proj", "h", "d"), view.activation(default="gelu_tanh"))
    half = half >> view.linear("mlp.down_proj", "d", "h") >> Norm("post_feedforward_layernorm")(view)
    activated = Sum((x, x >> Norm("pre_feedforward_layernorm")(view) >> half))
    router = Norm("altup.router_norm")(view) >> Gate(view.param("altup.router_input_scale", "one"))
    router = Fixed(router >> view.linear("altup.modality_router", str(n), "d")) >> Activation("tanh")
    gains = router >> view.linear("altup.correction_coefs", str(n), str(n))
    return Correction(Select(1, "prediction", view.size("d")), activated, gains)


def unembeddings(view: View) -> Mapping[str, Component]:
    """The further streams' own maps, each a block behind the layers."""
    names = [f"altup_unembed_projections.{i}" for i in range(len(view.get("altup_unembed_projections")))]
    return {name: view.linear(name, "d", "d") for name in names}


family(
    "gemma3n gemma3n_text", "Gemma3nTextDecoderLayer",
    Shape(gemma3n, f"{SEVERAL} (AltUp), joined by altup_unembed_projections", "gated", mixer=None),
    inputs=(StatePoint("pre_feedforward_layernorm"), StatePoint("input_layernorm")),
    output=StatePoint("", "after", item=0), level="logits", tail=unembeddings,
    ignored=("altup.correct_output_scale", "altup.prediction_coefs"),
)  # fmt: skip
