"""Families that are refused by name: why, and what would be needed."""

from __future__ import annotations

from architectures.shapes import refuse

STREAMS = (
    "the residual is several streams and the feed-forward half writes one vector into all of them: "
    "d numbers can be chosen, and as many times d differ between the runs"
)
WIDER = "a rule that steers what writes into each stream (the streams' own mixing weights) would be needed"
NEIGHBOURS = "rows of one sweep would depend on each other; a patch solved position by position would be needed"

refuse(
    "deepseek_v4",
    "DeepseekV4DecoderLayer",
    "hyper-connections",
    STREAMS,
    WIDER,
    "several residual streams",
    "mixture of experts",
)
refuse(
    "hy_v4",
    "HYV4DecoderLayer",
    "hyper-connections",
    STREAMS,
    WIDER,
    "several residual streams",
    "gated, mixture of experts",
)
refuse(
    "qwen4_exp qwen4_exp_text", "Qwen4ExpDecoderLayer", "hyper-connections", STREAMS, WIDER, "several residual streams",
    "mixture of experts",
)  # fmt: skip
refuse("gemma3n gemma3n_text", "Gemma3nTextDecoderLayer", "AltUp", STREAMS, WIDER, "several residual streams", "gated")
for name, layer in (("inkling_text", "InklingDecoderLayer"), ("inkling2_text", "Inkling2DecoderLayer")):
    refuse(
        name, layer, "short convolution after the feed-forward half (mlp_sconv)",
        "it reads neighbouring positions: the output at t holds feed-forward outputs of t−3 … t", NEIGHBOURS,
        "sequential, convolution over time", "mixture of experts",
    )  # fmt: skip
