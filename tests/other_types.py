"""Beyond causal language models: how many of transformers' types of each kind are read.

    PYTHONPATH=. python tests/other_types.py

Every type of an auto mapping is built from its default config made small, with random weights, and read; what is read
is compared with the modules on random input, as before every patch.  Prints a Markdown table, and the types behind it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

import architectures
from controllability.errors import BadInput, NotControllable, ReadingError
from controllability.models.reading.compare_with_module import compare

KINDS = {
    "encoders (masked language models)": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "vision (image classification)": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "encoder-decoders": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "multimodal (image and text to text)": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32, "emb_dim": 32,
    "intermediate_size": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "hidden_dim": 48, "ffn_dim": 48,
    "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_layers": 2, "num_decoder_layers": 2,
    "n_layers": 2, "n_layer": 2, "num_attention_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_heads": 4, "n_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "vocab_size": 128,
    "image_size": 32, "patch_size": 8, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "decoder_start_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "image_token_id", "video_token_id", "image_token_index")
LARGEST = 3e7  # parameters: what is still larger than that was not made small


def smaller(config: Any) -> Any:
    """A config with small sizes, in its parts too."""
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            smaller(value)
        elif key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, key, min(value, SMALL[key]))
        elif key in TOKENS and isinstance(value, int):
            setattr(config, key, TOKENS.index(key) + 1)
        elif key.endswith("layer_types") and isinstance(value, list):
            setattr(config, key, value[:2])
    return config


def built(kind: str, name: str) -> nn.Module:
    """A small model of a type, with random weights."""
    config = smaller(transformers.AutoConfig.for_model(kind))
    cls = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return cls(config).eval()


def example(model: Any) -> dict[str, torch.Tensor]:
    """Inputs in the form that the model takes."""
    config, ids = model.config, torch.arange(20, 28)[None]
    if model.main_input_name == "pixel_values" and not hasattr(config, "text_config"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), size, size)}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})


def outcome(kind: str, names: Any) -> tuple[str, str]:
    """(read, refused, unknown, or not built; why)."""
    name = names if isinstance(names, str) else names[0]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = built(kind, name)
            inputs = example(model)
            model(**inputs)
    except BaseException as error:  # whatever transformers raises, missing packages too
        if isinstance(error, KeyboardInterrupt):
            raise
        return "not built", f"{type(error).__name__}: {error}".splitlines()[0][:100]
    try:
        with torch.no_grad():
            compare(model, architectures.read(model), inputs)
    except (BadInput, NotControllable, ReadingError) as error:
        unknown = "unknown architecture" in str(error)
        return ("unknown" if unknown else "refused"), str(error).splitlines()[0][:160]
    return "read", ""


def main() -> None:
    """A row a kind, then the types."""
    ends = ("read", "refused", "unknown", "not built")
    print(
        "| kind | types | read | refused, with the reason | not registered | could not be built small |\n|---|---|---|---|---|---|"
    )
    details = []
    for title, mapping in KINDS.items():
        found = defaultdict(list)
        for kind, names in mapping.items():
            end, why = outcome(kind, names)
            found[end].append(kind + (f" ({why})" if end in ("refused", "not built") else ""))
        print(f"| {title} | {len(mapping)} | {' | '.join(str(len(found[end])) for end in ends)} |", flush=True)
        details += [f"{title}, {end}: {', '.join(found[end])}" for end in ends]
    print("", *details, sep="\n")


if __name__ == "__main__":
    main()
