"""Beyond causal language models: encoders, a vision transformer, encoder-decoders, a multimodal model."""

from __future__ import annotations

import pytest
import torch
from family_models import randomise
from helpers import hook_count, runs, snapshot, tiny_gemma, unchanged
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import controllability as ct
from controllability.models.exact_mode import exact_mode


def ready(model):
    model = model.eval().double()
    randomise(model)
    return model


def ids(*shape, seed=0, low=5, high=90):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def output(model, inputs):
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def check(model, target, source, target_rows, source_rows, **options):
    """Patch, and hold the paired positions against the target run; a row is (positions,)."""
    with exact_mode(), torch.no_grad():
        output(model, target)  # transformers installs hooks of its own in the first run
        before, hooks = snapshot(model), hook_count(model)
        mp = ct.patch_model(model, target=target, source=source, **options)
        wanted = output(model, target)[:, target_rows]
        unpatched = output(model, source)[:, source_rows]
        with mp.applied(model):
            patched = output(model, source)[:, source_rows]
    assert relative(patched, wanted) <= 1e-9
    assert relative(unpatched, wanted) > 1e-3
    assert unchanged(model, before)
    assert hook_count(model) == hooks


def bert(**more):
    torch.manual_seed(0)
    return ready(BertModel(BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, **more
    )))  # fmt: skip


def test_a_bidirectional_encoder_at_its_first_token():
    model, target = bert(), ids(2, 12)
    source = target.clone()
    source[:, 6:] = ids(2, 6, seed=1)
    positions = ([0], [0])
    check(model, {"input_ids": target}, {"input_ids": source}, [0], [0], positions=positions)


def test_a_shorter_encoder_input_at_its_last_positions():
    target = ids(2, 12)
    check(bert(), {"input_ids": target}, {"input_ids": target[:, 8:]}, slice(8, 12), slice(0, 4))


def test_chunked_feed_forward_calls():
    """The model splits its feed-forward half over positions; a patch sees it in one piece."""
    target = ids(2, 12)
    model = bert(chunk_size_feed_forward=4)
    check(model, {"input_ids": target}, {"input_ids": target[:, 8:]}, slice(8, 12), slice(0, 4))
    assert all(layer.chunk_size_feed_forward == 4 for layer in model.encoder.layer)


def test_a_vision_transformer_at_its_class_token():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = ready(ViTModel(config))
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    every = list(range(5))
    check(model, {"pixel_values": one}, {"pixel_values": two}, [0], [0], positions=([0], [0]))
    check(model, {"pixel_values": one}, {"pixel_values": two}, every, every, positions=(every, every))


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_a_decoder_whose_context_sits_in_its_encoder(kind):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj=kind,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = ready(T5ForConditionalGeneration(config))
    decoder = ids(2, 4, seed=5)
    rows = list(range(4))
    check(
        model, {"input_ids": ids(2, 9), "decoder_input_ids": decoder},
        {"input_ids": ids(2, 3, seed=1), "decoder_input_ids": decoder}, rows, rows,
    )  # fmt: skip


def test_bart_with_and_without_its_document():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    model = ready(BartForConditionalGeneration(config))
    decoder = ids(2, 8, seed=5)
    check(
        model, {"input_ids": ids(2, 9), "decoder_input_ids": decoder},
        {"input_ids": ids(2, 3, seed=1), "decoder_input_ids": decoder[:, 4:]}, slice(4, 8), slice(0, 4),
    )  # fmt: skip


def test_the_language_model_inside_a_multimodal_model():
    """LLaVA: the image stands in the context; the same question is answered without it."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99, image_seq_length=4)
    model = ready(LlavaForConditionalGeneration(config))
    question = ids(1, 4, seed=2)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prompt = torch.cat([torch.full((1, 4), 99), question], 1)
    positions = torch.arange(4, 8)[None]
    check(
        model, {"input_ids": prompt, "pixel_values": image}, {"input_ids": question, "position_ids": positions},
        slice(4, 8), slice(0, 4),
    )  # fmt: skip


def test_a_switch_that_depends_on_the_input_is_noticed():
    """The comparison on random input cannot see everything; a layer that misses its target then says so."""
    model = tiny_gemma(dtype=torch.float64)
    short = lambda module, args, output: output * (output.shape[1] != 4)  # noqa: E731
    model.model.layers[1].mlp.register_forward_hook(short)
    before = snapshot(model)
    with pytest.raises(ct.NotVerified, match=r"layer 1 .* misses the target run by .*a mask, or a switch"):
        ct.patch_model(model, *runs(context=9, query=4))
    assert unchanged(model, before)
