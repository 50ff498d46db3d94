"""Nothing is silently wrong: mixers after the last layer, pooled heads, shared weights and configs, other settings."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from family_models import RECIPES, build, inputs, logits_of, randomise
from helpers import hook_count, snapshot, unchanged
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import controllability as ct

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(5, 55, (1, 12), generator=torch.Generator().manual_seed(0))
TARGET, SOURCE = {"input_ids": IDS}, {"input_ids": IDS[:, 8:]}


def llama(seed=0, **more):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **more)).eval()
    randomise(model)
    return model


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_a_mixer_after_the_last_feed_forward_half_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(RECIPES["nemotron_h"]["overrides"], "layers_block_type", ["moe", "full_attention"])
    model = build("nemotron_h", torch.float32)
    target, source = inputs("nemotron_h", model)
    with pytest.raises(ct.NotControllable) as refused:
        ct.patch_model(model, target=target, source=source)
    assert "layer model.layers.1" in refused.value.culprit
    assert "after the last feed-forward half" in refused.value.reason


def test_a_pooled_head_needs_its_position_named():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = BertForSequenceClassification(config).eval()
    randomise(model)
    with pytest.raises(ct.NotVerified, match="reads a position that is not paired"):
        ct.patch_model(model, target=TARGET, source=SOURCE)
    mp = ct.patch_model(model, target=TARGET, source=SOURCE, positions=([0], [0]))
    assert relative(mp.logits, mp.target_logits) < 1e-5


@pytest.mark.parametrize("name", ["gemma4", "xmod"])
def test_what_follows_the_block_must_be_the_same_in_both_runs(name):
    """Per-layer embeddings of other tokens, adapters of other languages: the blocks agree, the logits cannot."""
    model = build(name, torch.float32)
    target, source = inputs(name, model, batch=1)
    options = {"positions": ([0, 1, 2, 3], [7, 8, 9, 10])} if name == "gemma4" else {}
    if name == "xmod":
        target, source = target | {"lang_ids": torch.tensor([0])}, source | {"lang_ids": torch.tensor([1])}
    before = snapshot(model)
    with torch.no_grad(), pytest.raises(ct.NotVerified, match="after the last patched layer"):
        ct.patch_model(model, target=target, source=source, **options)
    assert unchanged(model, before)


def test_target_logits_belong_to_the_pairs():
    """Both runs padded to the same length: a pair's logits stand elsewhere in the two."""
    model = llama()
    target = torch.randint(5, 55, (2, 12), generator=torch.Generator().manual_seed(1))
    source = torch.zeros_like(target)
    source[:, :4] = target[:, 8:]
    with torch.no_grad():
        mp = ct.patch_model(
            model, target={"input_ids": target, "attention_mask": torch.ones_like(target)},
            source={"input_ids": source, "attention_mask": (source > 0).long()},
        )  # fmt: skip
        wanted = logits_of(model, {"input_ids": target})[:, 8:].reshape(8, -1)
    assert mp.target_logits.shape == (2, 4, wanted.shape[-1])
    assert torch.allclose(mp.target_logits.flatten(0, 1), wanted, atol=1e-5)
    assert relative(mp.rows.of(mp.logits), wanted) < 1e-5


@pytest.mark.parametrize("where", ["another layer", "the head", "one storage"])
def test_merging_into_a_shared_parameter_is_refused(where):
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    if where == "another layer":
        second.down_proj.weight = first.down_proj.weight
    elif where == "one storage":
        second.down_proj.weight = torch.nn.Parameter(first.down_proj.weight.detach())
    else:
        model.lm_head.weight = torch.nn.Parameter(first.gate_proj.weight.detach()[:, :16].repeat(2, 1)[:60])
        first.gate_proj.weight = torch.nn.Parameter(model.lm_head.weight.detach()[:32])
    before = snapshot(model)
    with torch.no_grad():
        mp = ct.patch_model(model, target=TARGET, source=SOURCE, scope="last")
        with pytest.raises(ct.PatchError, match="merging would change that as well"):
            mp.merge(model)
        with mp.applied(model):
            assert relative(logits_of(model, SOURCE)[:, -1], mp.target_logits) < 1e-4
    assert unchanged(model, before)


def test_two_models_of_one_config_do_not_meet():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    one, two = MixtralForCausalLM(config).eval(), MixtralForCausalLM(config).eval()
    before = config._experts_implementation
    patches = [ct.patch_model(m, target=TARGET, source=SOURCE) for m in (one, two)]
    with torch.no_grad():
        outer = patches[0].applied(one)
        outer.__enter__()
        with patches[1].applied(two):
            outer.__exit__(None, None, None)
            assert relative(logits_of(two, SOURCE), patches[1].target_logits) < 1e-5
    assert config._experts_implementation == before
    assert hook_count(one) == hook_count(two) == 0


def test_a_patch_does_not_fit_other_settings(tmp_path):
    model, other = llama(), llama(hidden_act="relu")
    ct.patch_model(model, target=TARGET, source=SOURCE).save(tmp_path / "patch")
    loaded = ct.load_patch(tmp_path / "patch")
    with torch.no_grad(), loaded.applied(model):
        logits_of(model, SOURCE)
    with pytest.raises(ct.PatchError, match="other weights"), loaded.applied(other):
        pass


def test_a_model_is_not_copied_while_a_patch_is_on_it():
    model = llama()
    mp = ct.patch_model(model, target=TARGET, source=SOURCE)
    with mp.applied(model), pytest.raises(ct.PatchError, match="leave the context before copying"):
        copy.deepcopy(model)
    assert hook_count(copy.deepcopy(model)) == 0


def test_gradients_reach_every_parameter_while_a_patch_is_on():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()
    mp = ct.patch_model(model, target=TARGET, source=SOURCE)
    with mp.applied(model):
        logits_of(model, SOURCE).sum().backward()
    assert all(layer.mlp.gate.weight.grad is not None for layer in model.model.layers)


@pytest.mark.parametrize("name", ["hyperclovax", "lfm3"])
def test_switches_that_drop_a_norm(name, monkeypatch):
    switch = {"hyperclovax": "use_post_norm", "lfm3": "use_sandwich_norm"}[name]
    monkeypatch.setitem(RECIPES[name]["overrides"], switch, False)
    model = build(name, torch.float32)
    target, source = inputs(name, model)
    with torch.no_grad():
        mp = ct.patch_model(model, target=target, source=source)
    assert relative(mp.logits, mp.target_logits) < 1e-5


def small_scales(dtype):
    """Gemma 3 with post-norms of about 1/1024, which it stores as 1/1024 − 1: half precisions hold few such numbers."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    model, drawn = Gemma3ForCausalLM(Gemma3TextConfig(**config)).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.model.embed_tokens.embed_scale.div_(1024)
        for name, weight in model.named_parameters():
            if "post_" in name and "norm" in name:
                weight.copy_(torch.exp(torch.randn(weight.shape, generator=drawn)) / 1024 - 1)
    return model.to(dtype)


@pytest.mark.parametrize(("dtype", "route"), [("float16", "uniform"), ("bfloat16", "uniform"), ("bfloat16", "secular")])
def test_a_miss_of_the_size_of_half_precisions_rounding_is_not_blamed_on_a_mask(dtype, route):
    drawn = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    target, source = {"input_ids": drawn}, {"input_ids": drawn[:, -3:], "position_ids": torch.arange(9, 12)[None]}
    with pytest.raises(
        ct.NotVerified, match=rf"which rounding to {dtype} may explain.*take float32, or route 'balanced'"
    ) as refused:
        ct.patch_model(small_scales(getattr(torch, dtype)), target, source, route=route)
    assert "a mask" not in str(refused.value)
    assert ct.patch_model(small_scales(torch.float32), target, source, route=route).report.residual < 1e-3


def test_a_source_run_that_leaves_the_range_of_float16_says_so():
    from controllability.models.sweep.target_run import check_finite

    layer, state = SimpleNamespace(index=3), torch.full((1, 2, 4), float("inf"), dtype=torch.float16)
    with pytest.raises(
        ct.BadInput,
        match=r"source run: the state leaving layer 3 .*a scale that the route asks for, leaves the range of float16",
    ):
        check_finite(state, "source", layer, "leaving")
    for run, dtype in (("target", torch.float16), ("source", torch.float32)):
        with pytest.raises(ct.BadInput, match="the model overflows on this input"):
            check_finite(state.to(dtype), run, layer, "leaving")
