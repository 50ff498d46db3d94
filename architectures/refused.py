"""Families that are refused by name: why, and what would be needed."""

from __future__ import annotations

from architectures.shapes import refuse

NO_HALF = (
    "its layers have no feed-forward half: everything mixes positions, so there are no weights to move the context into"
)
OTHER = "patch a model whose layers have a feed-forward half"
STREAMS = (
    "the residual is several streams and the feed-forward half writes one vector into all of them: "
    "d numbers can be chosen, and as many times d differ between the runs"
)
WIDER = "a rule that steers what writes into each stream (the streams' own mixing weights) would be needed"
NEIGHBOURS = "rows of one sweep would depend on each other; a patch solved position by position would be needed"

refuse("mamba", "MambaBlock", "every layer", NO_HALF, OTHER, "no feed-forward half")
refuse("mamba2", "Mamba2Block", "every layer", NO_HALF, OTHER, "no feed-forward half")
refuse("falcon_mamba", "FalconMambaBlock", "every layer", NO_HALF, OTHER, "no feed-forward half")
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
refuse(
    "reformer", "ReformerLayer", "reversible residual",
    "the layer hands on two streams and its feed-forward half writes into one of them: the other keeps the context", WIDER,
    "two residual streams", "plain",
)  # fmt: skip
for name, layer in (("inkling_text", "InklingDecoderLayer"), ("inkling2_text", "Inkling2DecoderLayer")):
    refuse(
        name, layer, "short convolution after the feed-forward half (mlp_sconv)",
        "it reads neighbouring positions: the output at t holds feed-forward outputs of t−3 … t", NEIGHBOURS,
        "sequential, convolution over time", "mixture of experts",
    )  # fmt: skip
refuse(
    "rwkv", "RwkvBlock", "token shift (feed_forward.time_shift)",
    "the feed-forward half reads neighbouring positions: its first maps see a mix with the position before", NEIGHBOURS,
    "sequential, token shift", "plain, gated by a receptance",
)  # fmt: skip
for name, layer in (("zamba", "ZambaHybridLayer"), ("zamba2", "Zamba2HybridLayer")):
    refuse(
        name, layer, "shared transformer block",
        "its feed-forward output only enters a Mamba mixer, which mixes positions; and its weights are those of every hybrid layer",
        "a feed-forward half after the last mixer would be needed", "shared block before a mixer", "gated",
    )  # fmt: skip
