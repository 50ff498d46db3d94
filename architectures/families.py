"""Every causal-LM family of transformers whose block has an ordinary form: one declaration each.

The shapes they share come first; below, a family costs a line.  Families with something of their own are
in ``special.py``, several residual streams in ``streams.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from architectures import (
    containers as _containers,  # noqa: F401
    convolutions as _convolutions,  # noqa: F401
    encoders as _encoders,  # noqa: F401  (registers them)
    experts as _experts,  # noqa: F401
    mixer_only as _mixer_only,  # noqa: F401
    special as _special,  # noqa: F401
    streams as _streams,  # noqa: F401
)
from architectures.feed_forward import Fused, Gated, Norm, Plain, layer_norm
from architectures.mixers import Mixer, there
from architectures.registry import StatePoint
from architectures.shapes import after_norm, either, family, parallel, post_ln, sequential
from architectures.view import View
from controllability.components import Bias, Fixed, Identity
from controllability.interfaces import Component

GATED = Gated()
OUT_PROJ = "self_attn.out_proj"
GATED_FEED_FORWARD = Gated("feed_forward")
W123 = Gated("feed_forward", "w1", "w3", "w2", default="silu")
AFTER_ATTENTION = Norm("post_attention_layernorm")

# ----------------------------------------------------------- pre-norm, RMSNorm, gated: the most common shape
PRE_GATED = sequential(AFTER_ATTENTION, GATED)
family("cwm", "CwmDecoderLayer", PRE_GATED)
family("diffllama", "DiffLlamaDecoderLayer", PRE_GATED)
family("emu3 emu3_text_model", "Emu3DecoderLayer", PRE_GATED)
family("ernie4_5", "Ernie4_5DecoderLayer", PRE_GATED)
family("helium", "HeliumDecoderLayer", PRE_GATED)
family("hunyuan_v1_dense", "HunYuanDenseV1DecoderLayer", PRE_GATED)
family("llama internlm3 iquestcoder", "LlamaDecoderLayer", PRE_GATED)
family("ministral", "MinistralDecoderLayer", PRE_GATED)
family("ministral3", "Ministral3DecoderLayer", PRE_GATED)
family("mistral", "MistralDecoderLayer", PRE_GATED)
family("qwen2 got_ocr2", "Qwen2DecoderLayer", PRE_GATED)
family("qwen3 moss_transcribe_diarize", "Qwen3DecoderLayer", PRE_GATED)
family("seed_oss", "SeedOssDecoderLayer", PRE_GATED)
family("smollm3", "SmolLM3DecoderLayer", PRE_GATED)
family("youtu", "YoutuDecoderLayer", PRE_GATED)
family(
    "bamba",
    "BambaDecoderLayer",
    sequential(Norm("pre_ff_layernorm"), GATED_FEED_FORWARD),
    mixer="mamba.out_proj self_attn.o_proj",
)
family("lfm2", "Lfm2DecoderLayer", sequential(Norm("ffn_norm"), W123), mixer="conv.out_proj self_attn.out_proj")
family(
    "xlstm",
    "xLSTMBlock",
    sequential(Norm("norm_ffn"), Gated("ffn", "proj_up_gate", "proj_up", "proj_down")),
    mixer="mlstm_layer.out_proj",
)
family("bitnet", "BitNetDecoderLayer", sequential(AFTER_ATTENTION, Gated(norm="ffn_sub_norm", default="relu2")))

# -------------------------------------------------------------------------------- the same with other norms
PRE_GATED_1P = sequential(replace(AFTER_ATTENTION, offset=1), GATED)
family("gemma", "GemmaDecoderLayer", PRE_GATED_1P)
family("qwen3_5 qwen3_5_text", "Qwen3_5DecoderLayer", PRE_GATED_1P, mixer="linear_attn.out_proj self_attn.o_proj")
family("vaultgemma", "VaultGemmaDecoderLayer", sequential(Norm("pre_feedforward_layernorm", offset=1), GATED))
family(
    "recurrent_gemma", "RecurrentGemmaDecoderLayer",
    sequential(Norm("channel_pre_norm", offset=1), Gated("mlp_block", default="gelu_tanh")), mixer="temporal_block.linear_out temporal_block.o_proj",
)  # fmt: skip
family("olmo", "OlmoDecoderLayer", sequential(Norm("post_attention_layernorm", "layer", bare=True), GATED))
family("hrm_text", "HrmTextDecoderLayer", sequential(replace(AFTER_ATTENTION, bare=True), GATED))

# ------------------------------------------------------------------------------------------ fused gate and up
PRE_FUSED = sequential(AFTER_ATTENTION, Fused())
family("glm", "GlmDecoderLayer", PRE_FUSED)
family("phi3", "Phi3DecoderLayer", PRE_FUSED)
family("phi4_multimodal", "Phi4MultimodalDecoderLayer", PRE_FUSED)
family(
    "moshi moshi_depth",
    "MoshiDecoderLayer",
    sequential(AFTER_ATTENTION, Fused("mlp", "fc1", "fc2")),
    mixer="self_attn.o_proj.linear",
)
family(
    "modernbert-decoder", "ModernBertDecoderLayer",
    sequential(layer_norm("mlp_norm", bias=False), Fused("mlp", "Wi", "Wo", default="gelu")), mixer="attn.Wo",
)  # fmt: skip

# ------------------------------------------------------------------- norms before and after, or only after
SANDWICH = sequential(
    Norm("pre_feedforward_layernorm", offset=1), GATED, Norm("post_feedforward_layernorm", offset=1),
    mixer=Mixer(after=replace(AFTER_ATTENTION, offset=1)),
)  # fmt: skip
family("gemma2", "Gemma2DecoderLayer", SANDWICH, defaults={"activation": "gelu_tanh"})
family("gemma3 gemma3_text", "Gemma3DecoderLayer", SANDWICH, defaults={"activation": "gelu_tanh"})
family(
    "glm4", "Glm4DecoderLayer", sequential(AFTER_ATTENTION, Fused(), Norm("post_mlp_layernorm")),
    mixer=Mixer(after=Norm("post_self_attn_layernorm")),
)  # fmt: skip
LFM3 = either(
    lambda view: view.has("post_ffn_norm.weight", default=True),
    sequential(Norm("ffn_norm"), W123, Norm("post_ffn_norm")), sequential(Norm("ffn_norm"), W123),
)  # fmt: skip
family(
    "lfm3", "Lfm3DecoderLayer", LFM3, mixer=Mixer("conv.out_proj self_attn.out_proj", there(Norm("post_operator_norm")))
)
OUTPUT_NORM = sequential(None, GATED, Norm("post_feedforward_layernorm"), mixer=Mixer(after=AFTER_ATTENTION))
family("olmo2", "Olmo2DecoderLayer", OUTPUT_NORM)
family("olmo3", "Olmo3DecoderLayer", OUTPUT_NORM)
family("exaone4", "Exaone4DecoderLayer", OUTPUT_NORM)

# -------------------------------------------------------------------------- plain feed-forward, pre-LayerNorm
FC12 = Plain("fc1", "fc2", default="gelu")
PRE_FC = sequential(layer_norm("final_layer_norm"), FC12)
PLAIN_GPT = sequential(layer_norm("ln_2"), Plain("mlp.c_fc", "mlp.c_proj", default="gelu_tanh"))
DENSE_4H = Plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
PRE_4H = sequential(layer_norm("post_attention_layernorm"), DENSE_4H)
UP_DOWN = Plain("mlp.up_proj", "mlp.down_proj", default="relu2")
family("bigbird_pegasus", "BigBirdPegasusDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family("biogpt", "BioGptDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family("blenderbot", "BlenderbotDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family("mbart", "MBartDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family("pegasus", "PegasusDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family("whisper", "WhisperDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family("xglm", "XGLMDecoderLayer", PRE_FC, mixer=OUT_PROJ)
family(
    "musicgen musicgen_decoder",
    "MusicgenDecoderLayer",
    PRE_FC,
    codebooks=lambda config: config.num_codebooks,
    mixer=OUT_PROJ,
)
family(
    "musicgen_melody musicgen_melody_decoder", "MusicgenMelodyDecoderLayer", PRE_FC,
    codebooks=lambda config: config.num_codebooks, mixer=OUT_PROJ,
)  # fmt: skip
family("gpt2 gpt-sw3", "GPT2Block", PLAIN_GPT, defaults={"conv1d": True, "bias": True}, mixer="attn.c_proj")
family("gpt_bigcode", "GPTBigCodeBlock", PLAIN_GPT, mixer="attn.c_proj")
family("gpt_neo", "GPTNeoBlock", PLAIN_GPT, mixer="attn.attention.out_proj")
family("persimmon fuyu", "PersimmonDecoderLayer", PRE_4H, mixer="self_attn.dense")


def japanese_bias(view: View) -> Component:
    """The last layer's attention has a bias, which is added with the residual."""
    bias = "attention.dense_bias"
    return Fixed(Bias(view.param(bias, "d"))) if view.live and view.has(bias) else Identity()


family("gpt_neox_japanese", "GPTNeoXJapaneseLayer", PRE_4H, mixer=Mixer("attention.dense", skip=japanese_bias))
BLOOM = layer_norm("post_attention_layernorm"), replace(DENSE_4H, default="gelu_tanh")


def bloom_behind(view: View) -> Any:
    """Whether both residuals are taken behind the norms."""
    return view.setting("apply_residual_connection_post_layernorm", default=False)


family(
    "bloom", "BloomBlock",
    either(lambda view: not bloom_behind(view), sequential(*BLOOM), after_norm(*BLOOM)), defaults={"bias": True},
    mixer=Mixer(
        "self_attention.dense",
        skip=lambda view: Fixed(layer_norm("input_layernorm")(view)) if bloom_behind(view) else Identity(),
    ),
)  # fmt: skip
family("jais2", "Jais2DecoderLayer", sequential(layer_norm("post_attention_layernorm"), UP_DOWN))
family("nemotron", "NemotronDecoderLayer", sequential(layer_norm("post_attention_layernorm", offset=1), UP_DOWN))
family(
    "starcoder2", "Starcoder2DecoderLayer",
    sequential(layer_norm("post_attention_layernorm"), Plain("mlp.c_fc", "mlp.c_proj", default="gelu_tanh")),
)  # fmt: skip
family(
    "ctrl",
    "EncoderLayer",
    sequential(layer_norm("layernorm2"), Plain("ffn.0", "ffn.2", default="relu")),
    mixer="multi_head_attention.dense",
)
family(
    "mpt",
    "MptBlock",
    sequential(layer_norm("norm_2", bias=False), Plain("ffn.up_proj", "ffn.down_proj")),
    mixer="attn.out_proj",
)
family("arcee", "ArceeDecoderLayer", sequential(AFTER_ATTENTION, UP_DOWN))
family("apertus", "ApertusDecoderLayer", sequential(Norm("feedforward_layernorm"), replace(UP_DOWN, default="xielu")))
family(
    "nanochat", "NanoChatDecoderLayer",
    sequential(replace(AFTER_ATTENTION, bare=True), Plain("mlp.fc1", "mlp.fc2", default="relu2")),
)  # fmt: skip
INTERMEDIATE = Plain("intermediate.dense", "output.dense")
family("megatron-bert", "MegatronBertLayer", sequential(layer_norm("ln"), INTERMEDIATE), mixer="attention.output.dense")
family(
    "xlm-roberta-xl",
    "XLMRobertaXLLayer",
    sequential(layer_norm("LayerNorm"), INTERMEDIATE),
    mixer="attention.output.dense",
)
family(
    "roberta-prelayernorm",
    "RobertaPreLayerNormLayer",
    sequential(layer_norm("intermediate.LayerNorm"), INTERMEDIATE),
    mixer="attention.output.dense",
)

# ----------------------------------------------------------------------------- LayerNorm after the sum (BERT)
BERT = post_ln(
    INTERMEDIATE, layer_norm("output.LayerNorm"),
    mixer=Mixer("attention.output.dense", output=StatePoint("attention.output.LayerNorm")),
)  # fmt: skip
BART = post_ln(FC12, layer_norm("final_layer_norm"), mixer=Mixer(OUT_PROJ, output=StatePoint("self_attn_layer_norm")))
family("bert", "BertLayer", BERT)
family("bert-generation", "BertGenerationLayer", BERT)
family("big_bird", "BigBirdLayer", BERT)
family("camembert", "CamembertLayer", BERT)
family("data2vec-text", "Data2VecTextLayer", BERT)
family("electra", "ElectraLayer", BERT)
family("ernie", "ErnieLayer", BERT)
family("git", "GitLayer", BERT)
family("rembert", "RemBertLayer", BERT)
family("roberta", "RobertaLayer", BERT)
family("roc_bert", "RoCBertLayer", BERT)
family("roformer", "RoFormerLayer", BERT)
family("xlm-roberta", "XLMRobertaLayer", BERT)
family("bart", "BartDecoderLayer", BART)
family("blenderbot-small", "BlenderbotSmallDecoderLayer", BART)
family("marian", "MarianDecoderLayer", BART)
family("mvp", "MvpDecoderLayer", BART)
family("plbart", "PLBartDecoderLayer", BART)
family("trocr", "TrOCRDecoderLayer", BART)
family(
    "openai-gpt", "Block", post_ln(Plain("mlp.c_fc", "mlp.c_proj", renamed=(("gelu", "gelu_tanh"),)), layer_norm("ln_2")),
    defaults={"conv1d": True, "bias": True}, mixer=Mixer("attn.c_proj", output=StatePoint("ln_1")),
)  # fmt: skip

# ------------------------------------------------------------------------------- attention and MLP in parallel
LN = layer_norm("input_layernorm", bias=False)
COHERE = parallel(LN, GATED, "self_attn")
family("cohere", "CohereDecoderLayer", COHERE)
family("cohere2", "Cohere2DecoderLayer", COHERE)
family("cohere_compass_text", "CohereCompassDecoderLayer", COHERE)
FC_IN_OUT = parallel(layer_norm("ln_1"), Plain("mlp.fc_in", "mlp.fc_out", default="gelu_tanh"), "attn", "out_proj")
family("gptj", "GPTJBlock", FC_IN_OUT)
family("codegen", "CodeGenBlock", FC_IN_OUT)
family(
    "phi", "PhiDecoderLayer",
    parallel(layer_norm("input_layernorm"), Plain("mlp.fc1", "mlp.fc2", default="gelu_tanh"), "self_attn", "dense"),
)  # fmt: skip
