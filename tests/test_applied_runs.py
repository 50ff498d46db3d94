"""What is run while a patch is applied: every mode of autograd, generation, other lengths and other tokens."""

from __future__ import annotations

import pytest
import torch
from helpers import error, hook_count, runs, snapshot, unchanged
from transformers import Phi3Config, Phi3ForCausalLM

import controllability as ct


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_autograd(gemma, mode, made_in):
    target, source = runs(context=9, query=4)
    before = snapshot(gemma)
    with made_in():
        mp = ct.patch_model(gemma, target, source)
    with mode():
        plain = gemma(**source).logits
        with mp.applied(gemma):
            patched = gemma(**source).logits
        assert error(patched, mp.target_logits) < 5e-6 < error(plain, mp.target_logits)
        assert torch.equal(gemma(**source).logits, plain)
    assert unchanged(gemma, before)


def test_a_whole_generation_with_one_patch(gemma):
    """Scope "last": every token of ``model.generate`` is computed with the patch, from a cache as without one."""
    target, source = runs(context=9, query=4, seed=2)
    before = snapshot(gemma)
    mp = ct.patch_model(gemma, target, {"input_ids": source["input_ids"]}, scope="last")
    ids = source["input_ids"]
    with torch.no_grad():
        plain = gemma.generate(ids, max_new_tokens=6, do_sample=False)
        with mp.applied(gemma):
            cached = gemma.generate(ids, max_new_tokens=6, do_sample=False)
            by_hand = ids
            for _ in range(6):
                by_hand = torch.cat([by_hand, gemma(by_hand, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached, by_hand)
        assert not torch.equal(cached, plain)
        assert int(cached[0, 4]) == int(mp.target_logits.reshape(-1, 60)[-1].argmax())
        assert torch.equal(gemma.generate(ids, max_new_tokens=6, do_sample=False), plain)
    assert unchanged(gemma, before)


def with_statistics(gemma):
    """A buffer that no forward reads, and that was never filled."""
    gemma.register_buffer("statistics", torch.tensor([float("nan"), 0.5]))
    return gemma, ct.patch_model(gemma, *runs(context=9, query=4))


def test_nan_in_an_unrelated_buffer_is_no_change(gemma):
    model, mp = with_statistics(gemma)
    with torch.no_grad(), mp.applied(model):
        assert error(model(**runs(context=9, query=4)[1]).logits, mp.target_logits) < 5e-6


@pytest.mark.parametrize("bits", [0, 0x7FC00001, -0x400000, 0x7F800000], ids=["zero", "payload", "sign", "infinity"])
def test_a_buffer_of_nan_that_changed_is_noticed(gemma, bits):
    """Behind torch's back, where no version counts it: by its bits."""
    model, mp = with_statistics(gemma)
    model.statistics.data.view(torch.int32)[0] = bits
    with pytest.raises(ct.PatchError, match="statistics changed"), mp.applied(model):
        pass


def test_generating_with_a_patch_for_each_position_is_refused(patched):
    """After the first step the model gets one token, and the patch has one for each of four."""
    model, mp, target, source = patched
    before, ids = snapshot(model), source["input_ids"]
    with pytest.raises(ct.PatchError, match=r"position 0 it is position_ids 9, the model got 0; .* use scope 'last'"):
        generate_with(mp, model, ids)
    mp = ct.patch_model(model, target, {"input_ids": ids})
    with pytest.raises(ct.PatchError, match=r"\(1, 4\) \(B, T\), the model got \(1, 1\): .* use scope 'last'"):
        generate_with(mp, model, ids)
    assert unchanged(model, before)
    assert hook_count(model) == 0


def generate_with(mp, model, ids):
    with mp.applied(model):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_gradient_checkpointing_changes_nothing(gemma):
    """It acts in training mode only, and models are patched in evaluation mode."""
    target, source = runs(context=9, query=4)
    new = hasattr(gemma, "activation_checkpointing_enable")  # its name from transformers 5.23 on
    getattr(gemma, "activation_checkpointing_enable" if new else "gradient_checkpointing_enable")()
    mp = ct.patch_model(gemma, target, source)
    with mp.applied(gemma):
        assert error(gemma(**source).logits, mp.target_logits) < 5e-6


def test_a_patch_of_each_refuses_other_shapes(patched):
    model, mp, target, _ = patched
    with (
        pytest.raises(ct.PatchError, match=r"for inputs of shape \(1, 4\) \(B, T\), the model got \(1, 13\)"),
        mp.applied(model),
    ):
        model(**target)
    assert hook_count(model) == 0


def test_a_patch_made_in_inference_mode_works_with_gradients(gemma):
    target, source = runs(context=9, query=4)
    with torch.inference_mode():
        mp = ct.patch_model(gemma, target, source)
    with mp.applied(gemma):
        gemma(**source).logits.sum().backward()
    assert gemma.model.layers[0].mlp.up_proj.weight.grad is not None


def test_scope_last_serves_longer_inputs(gemma):
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(gemma, target, source, scope="last")
    with torch.no_grad(), mp.applied(gemma):
        longer = gemma(input_ids=torch.randint(3, 60, (3, 7))).logits
    assert torch.isfinite(longer).all()


def test_a_patch_of_each_refuses_other_tokens(patched, tmp_path):
    """A saved one too: the token ids it is valid for are in the file.  Scope "last" is one patch for any input."""
    model, mp, target, source = patched
    other = {**source, "input_ids": source["input_ids"].clone()}
    other["input_ids"][0, 2] = (other["input_ids"][0, 2] + 1) % 60
    mp.save(tmp_path / "patch")
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        with (
            torch.no_grad(),
            patch.applied(model),
            pytest.raises(ct.PatchError, match=r"at sample 0, position 2 it is token \d+, the model got \d+"),
        ):
            model(**other)
    assert hook_count(model) == 0
    last = ct.patch_model(model, target, source, scope="last")
    with torch.no_grad(), last.applied(model):
        assert torch.isfinite(model(**other).logits).all()


@torch.no_grad()
def test_rotary_frequencies_that_depend_on_the_length_are_no_change_of_the_model():
    """The rotary embedding writes them anew in every forward pass."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 16}
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=60, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    ids = torch.randint(3, 60, (1, 24))  # beyond the length from which on the frequencies are others
    mp = ct.patch_model(model, {"input_ids": ids}, {"input_ids": ids[:, 20:]})
    with mp.applied(model):
        found = model(input_ids=ids[:, 20:]).logits
    assert error(found, mp.target_logits) < 1e-5 < 1e-2 < error(model(input_ids=ids[:, 20:]).logits, mp.target_logits)
