"""Variants of a family's config that change its layers are read and patched exactly, or refused by name."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import variants
from family_models import RECIPES, build, inputs, logits_of
from test_families import quiet, relative
from transformers.activations import ACT2CLS, ACT2FN

import controllability as ct
from architectures.view import ACTIVATIONS, LEARNED
from controllability.checks.rebuilt_blocks import RATIONAL_ACTIVATIONS
from controllability.components import Activation
from controllability.models.exact_mode import exact_mode

ROUNDED = {"gelu_fast": 1e-6, "sqrtsoftplus": 1e-10}  # √(2/π) in eight digits; torch's softplus of x > 20 is x
DECLARED = [
    ("xmod", {"pre_norm": True}),
    ("xmod", {"pre_norm": True, "adapter_layer_norm": True}),
    ("xmod", {"pre_norm": True, "add_cross_attention": True, "ln_before_adapter": True}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"layer_norm_elementwise_affine": False, "do_layer_norm_before": False}),
    ("xlstm", {"use_bias": True}),
    ("aria_text", {"hidden_act": "relu"}),
    ("bert", {"hidden_act": "xielu"}),
    ("bart", {"activation_function": "prelu"}),
    ("llama", {"hidden_act": "prelu"}),
    ("phi3", {"hidden_act": "prelu"}),
    ("qwen2_moe", {"hidden_act": "prelu"}),
    ("deepseek_v3", {"hidden_act": "mish"}),
]


@pytest.mark.parametrize(
    ("name", "changes"), DECLARED, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_a_variant_is_patched_exactly(name, changes):
    with quiet(), exact_mode():
        model = build(name, config=variants.changed_config(name, changes))
        target, source = inputs(name, model)
        patch = ct.patch_model(model, target=target, source=source)
        unpatched = logits_of(model, source)
        with patch.applied(model):
            patched = logits_of(model, source)
    assert relative(patched, patch.target_logits) <= 1e-9
    assert relative(unpatched, patch.target_logits) > 1e-3


@pytest.mark.parametrize("first", [False, True])
def test_an_adapter_that_gets_the_sum_without_a_norm_is_refused_by_name(first):
    model = build(
        "xmod", config=variants.changed_config("xmod", {"adapter_reuse_layer_norm": False, "pre_norm": first})
    )
    target, source = inputs("xmod", model)
    with pytest.raises(ct.NotControllable, match="adapter without a norm") as refused, quiet():
        ct.patch_model(model, target=target, source=source)
    assert "adapter_layer_norm=True" in refused.value.hint


@pytest.mark.parametrize("theirs", sorted(ACT2CLS.keys() - LEARNED.keys()))
def test_an_activation_is_that_of_transformers(theirs):
    x = torch.cat([torch.linspace(-30, 30, 61, dtype=torch.float64), torch.randn(500, dtype=torch.float64)])
    own = Activation(ACTIVATIONS.get(theirs, theirs))
    with exact_mode():
        wanted = ACT2FN[theirs](x.clone())
    assert relative(own({}, x), wanted) <= ROUNDED.get(theirs, 1e-14)
    assert np.allclose(own({}, x.numpy()), own({}, x).numpy(), rtol=1e-12, atol=1e-14)
    if own.name in RATIONAL_ACTIVATIONS:
        exact = own({}, np.array([Fraction(value) for value in x.tolist()], dtype=object))
        assert all(isinstance(value, Fraction) for value in exact)
        assert np.allclose(exact.astype(float), wanted.numpy(), rtol=1e-14, atol=0)


def test_an_unknown_activation_is_refused_with_those_that_are_known():
    model = build("llama")
    model.config.hidden_act = "snake"
    with pytest.raises(ct.ReadingError, match=r"'snake' is not declared: known are .*hardswish.*prelu"):
        ct.patch_model(model, *inputs("llama", model))


def test_a_combination_that_is_read_wrongly_is_noticed(monkeypatch):
    """The negative control of the sweep: with a wrong declaration of one switch it says so."""
    from controllability.components import activation

    assert variants.outcome("llama", {"hidden_act": "relu"})[0] == "exact"
    monkeypatch.setitem(activation.FORMULAS, "relu6", activation.FORMULAS["leaky_relu"])
    monkeypatch.setattr("controllability.arrays.tensors.KERNELS", ())
    end, why, _ = variants.outcome("llama", {"hidden_act": "relu6"})
    assert end == "undeclared"
    assert "disagree" in why


def test_every_switch_that_is_known_to_change_a_layer_is_found():
    """What others found by reading the code: the sweep must find it by itself."""
    known = {
        "bloom": {"apply_residual_connection_post_layernorm"}, "falcon": {"parallel_attn", "new_decoder_architecture", "bias"},
        "gpt_neox": {"use_parallel_residual"}, "opt": {"do_layer_norm_before", "enable_bias"},
        "stablelm": {"use_parallel_residual"}, "xmod": {"pre_norm", "adapter_layer_norm"}, "doge": {"is_moe"},
        "cohere2_moe": {"expert_selection_fn", "shared_expert_combination_strategy"}, "deepseek_v2": {"topk_method"},
    }  # fmt: skip
    for name, switches in known.items():
        assert switches <= variants.options(name).keys(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_variant_is_read_or_refused_by_name(name):
    found = list(variants.sweep(name))
    assert not [one for one in found if one[1] == "undeclared"]
    assert variants.row(name, found) in variants.PAGE.read_text(encoding="utf-8") or not found
