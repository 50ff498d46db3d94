"""Models whose weights ``accelerate`` has spread: several devices are no obstacle, offloaded weights are refused."""

from __future__ import annotations

import pytest
import torch
from helpers import error, hook_count, runs, tiny_gemma, unchanged
from torch import nn

import controllability as ct
from controllability.models.hooks.installation import HookStack

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("accelerate.hooks")
ROUNDING = 5e-6
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def spread(model, tmp_path, **elsewhere):
    """The model with a hook of accelerate's on every module, as a device_map of several devices gives it."""
    places = dict.fromkeys(PARTS, "cpu") | {part.replace("_layers_", ".layers."): d for part, d in elsewhere.items()}
    return accelerate.dispatch_model(
        model, device_map=places, main_device="cpu", force_hooks=True, offload_dir=str(tmp_path)
    )


def state(model):
    """Bits, hooks and the forwards that accelerate has put into the modules."""
    return {n: v.clone() for n, v in model.state_dict().items()}, [vars(m).get("forward") for m in model.modules()]


@pytest.mark.parametrize("scope", ["each", "last"])
def test_a_spread_model_is_patched_and_undone(gemma, tmp_path, scope):
    target, source = runs(context=9, query=4)
    model = spread(gemma, tmp_path)
    assert any(hasattr(m, "_hf_hook") for m in model.modules())
    bits, forwards = state(model)
    with torch.no_grad():
        before, wanted = model(**source).logits, model(**target).logits[:, -4:]
        mp = ct.patch_model(model, target, source, scope=scope)
        with mp.applied(model):
            patched = model(**source).logits
        after = model(**source).logits
    assert error(patched[:, -1:], wanted[:, -1:]) < ROUNDING < 0.1 < error(before[:, -1:], wanted[:, -1:])
    assert torch.equal(before, after)
    assert unchanged(model, bits)
    assert all(a is b for a, b in zip(state(model)[1], forwards, strict=True))
    assert hook_count(model) == 0


def test_a_spread_model_is_merged_into_and_restored(gemma, tmp_path):
    target, source = runs(context=9, query=1)
    model = spread(gemma, tmp_path)
    bits, _ = state(model)
    mp = ct.patch_model(model, target, source)
    mp.merge(model)
    with torch.no_grad():
        assert error(model(**source).logits, mp.target_logits) < ROUNDING
    mp.unmerge(model)
    assert unchanged(model, bits)


def test_a_loaded_model_with_a_device_map(saved_gemma):
    from transformers import AutoModelForCausalLM

    target, source = runs(context=9, query=4, vocab=40)
    model = AutoModelForCausalLM.from_pretrained(saved_gemma, device_map="cpu").eval()
    mp = ct.patch_model(model, target, source)
    with torch.no_grad(), mp.applied(model):
        assert error(model(**source).logits, mp.target_logits) < ROUNDING


@pytest.mark.parametrize(
    ("part", "culprit"),
    [("model_layers_1", "parameter model.layers.1.self_attn.q_proj.weight"), ("lm_head", "parameter lm_head.weight")],
)
def test_offloaded_weights_are_refused(tmp_path, part, culprit):
    """Wherever they are: not only in the layers that would be patched."""
    model = tiny_gemma(tie_word_embeddings=False)
    target, source = runs(context=9, query=4)
    with torch.no_grad():
        before = model(**source).logits
    model = spread(model, tmp_path, **{part: "disk"})
    hooks = hook_count(model)
    with pytest.raises(ct.BadInput, match=rf"{culprit} is offloaded: .* Load the model with its weights on devices"):
        ct.patch_model(model, target, source)
    with torch.no_grad():
        assert torch.equal(model(**source).logits, before)
    assert hook_count(model) == hooks


def test_a_patch_is_not_applied_to_a_model_that_was_offloaded_since(tmp_path):
    model = tiny_gemma(tie_word_embeddings=False)
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(model, target, source)
    model = spread(model, tmp_path, model_layers_1="disk")
    with pytest.raises(ct.BadInput, match="is offloaded"), mp.applied(model):
        pass
    with torch.no_grad():
        assert error(model(**source).logits, mp.target_logits) > 0.1


def test_a_model_that_is_offloaded_after_its_first_patch_is_refused(tmp_path):
    model = tiny_gemma(tie_word_embeddings=False)
    target, source = runs(context=9, query=4)
    ct.patch_model(model, target, source)
    with pytest.raises(ct.BadInput, match=r"parameter lm_head.weight is offloaded"):
        ct.patch_model(spread(model, tmp_path, lm_head="disk"), target, source)


def test_offloading_to_the_cpu_is_refused(gemma):
    """What a device_map with "cpu" beside an accelerator does; here the accelerator is the CPU as well."""
    target, source = runs(context=9, query=4)
    model = accelerate.cpu_offload(gemma, execution_device="cpu")
    with pytest.raises(ct.BadInput, match=r"parameter model\.\S+ is offloaded"):
        ct.patch_model(model, target, source)


def test_what_hooks_are_told_is_on_the_modules_device():
    """At the border of two devices torch's hooks see the input before accelerate has moved it."""
    module, told = nn.Linear(2, 2).to("meta"), []
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="meta"))
    installation = HookStack()
    installation.before(module, lambda x: told.append(x.device.type))
    installation.after(module, lambda x, y: told.append(x.device.type))
    module(torch.zeros(1, 2))
    installation.undo()
    assert told == ["meta", "meta"]
    assert hook_count(module) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs an accelerator beside the CPU")
def test_layers_on_two_devices(gemma, tmp_path):
    target, source = runs(context=9, query=4)
    places = dict.fromkeys(PARTS, 0) | {"model.layers.1": 1 if torch.cuda.device_count() > 1 else 0}
    model = accelerate.dispatch_model(gemma, device_map=places, force_hooks=True)
    mp = ct.patch_model(model, target, source)
    with torch.no_grad(), mp.applied(model):
        assert error(model(**source).logits.cpu(), mp.target_logits.cpu()) < ROUNDING
