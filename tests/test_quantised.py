"""Quantised linear layers: the patch is computed beside them; what cannot be patched is refused by name."""

from __future__ import annotations

import types

import pytest
import torch
from helpers import error, hook_count, runs, tiny_gemma
from quantised_forms import FORMS, LINEAR, ROUNDING, Rows8, form as form, made, same, state
from torch import nn

import architectures
import controllability as ct
from architectures import quantised
from controllability.models.hooks.carried_patches import carried
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import fingerprint

# --------------------------------------------------------------------------------- what is patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("via", ["input-output", "output"])
def test_a_patch_beside_quantised_layers(form, dtype, via):
    """Patched: what the quantised model itself gives with the context; the control is far away; undone to the bit."""
    model = made(form, dtype)
    target, source = runs(context=9, query=4)
    with torch.no_grad():
        before, wanted = model(**source).logits, model(**target).logits[:, -4:]
        bits, mark = state(model), fingerprint(model)
        mp = ct.patch_model(model, target, source, via=via)
        with mp.applied(model):
            patched = model(**source).logits
        after = model(**source).logits
    assert error(patched, wanted) < ROUNDING[dtype] < 0.1 < error(before, wanted)
    assert torch.equal(before, after)
    assert same(state(model), bits)
    assert fingerprint(model) == mark
    assert hook_count(model) == 0
    assert carried(model) == ()


def test_it_is_the_quantised_model_that_is_reproduced(form):
    """Not the one it was made from: the two differ by far more than the patch's error."""
    target, source = runs(context=9, query=4)
    model = made(form)
    mp = ct.patch_model(model, target, source)
    with torch.no_grad(), mp.applied(model):
        patched = model(**source).logits
        plain = tiny_gemma(d=64, h=128)(**target).logits[:, -4:]
    assert error(patched, mp.target_logits) < ROUNDING[torch.float32] < 1e-3 < error(patched, plain)


def test_one_patch_generates_with_quantised_layers(form):
    model = made(form)
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(model, target, source, scope="last")
    with torch.no_grad(), mp.applied(model):
        patched = model(**source).logits[:, -1]
        tokens = model.generate(source["input_ids"], max_new_tokens=3, do_sample=False)
    assert error(patched, mp.target_logits.reshape(patched.shape)) < ROUNDING[torch.float32]
    assert tokens.shape == (1, 7)


def test_nothing_is_dequantised_to_patch_or_apply(form, monkeypatch):
    """Only the comparison of the reading with the modules needs the numbers, once per model."""
    model = made(form)
    target, source = runs(context=9, query=4)
    asked = []
    numbers = quantised.dequantised
    monkeypatch.setattr(quantised, "dequantised", lambda *args: asked.append(1) or numbers(*args))
    ct.patch_model(model, target, source)
    assert asked
    del asked[:]
    mp = ct.patch_model(model, target, source)
    with torch.no_grad(), mp.applied(model):
        model(**source)
    assert not asked


def test_a_saved_patch_knows_the_quantised_weights(form, tmp_path):
    model = made(form)
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(model, target, source)
    mp.save(tmp_path / "patch")
    loaded = ct.load_patch(tmp_path / "patch")
    with torch.no_grad(), loaded.applied(made(form)) as twin:
        assert error(twin(**source).logits, mp.target_logits) < ROUNDING[torch.float32]
    for other in (tiny_gemma(d=64, h=128), FORMS[form](tiny_gemma(d=64, h=128, seed=1))):
        with pytest.raises(ct.PatchError, match="made for other weights"), loaded.applied(other):
            pass


def test_changed_integers_are_noticed(form):
    model = made(form)
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(model, target, source)
    name = "model.layers.0.mlp.up_proj.weight"
    module = model.get_submodule(name.rpartition(".")[0])
    integers = next(p for _, p in quantised.pieces(name, module, module.weight) if quantised.packed(p))
    with torch.no_grad():
        integers.view(torch.uint8).view(-1)[:1] ^= 1
    with pytest.raises(ct.PatchError, match=r"up_proj.weight\S* changed since this patch was made"), mp.applied(model):
        pass


def test_a_model_that_is_quantised_after_its_first_patch_is_read_anew(form):
    model = tiny_gemma(d=64, h=128)
    target, source = runs(context=9, query=4)
    old = ct.patch_model(model, target, source)
    FORMS[form](model)
    with pytest.raises(ct.PatchError, match="changed since this patch was made"), old.applied(model):
        pass
    mp = ct.patch_model(model, target, source)
    with torch.no_grad(), mp.applied(model):
        assert error(model(**source).logits, mp.target_logits) < ROUNDING[torch.float32]
    assert checked_reading(model).reading.layers[0].params.quantised


# -------------------------------------------------------------------------------- what was checked


def test_the_reading_is_held_against_the_dequantised_weights(form):
    """Weights of few bits are compared to rounding; where inputs are rounded as well, to what 8 bits explain."""
    model = made(form)
    ct.patch_model(model, *runs(context=9, query=4))
    worst = checked_reading(model).worst
    assert worst < (0.05 if form in EIGHT_BIT_INPUTS else 1e-5)


EIGHT_BIT_INPUTS = (
    "stand-in, inputs of 8 bits", "torchao int8, inputs of 8 bits", "bitsandbytes int8",
    "bitsandbytes nf4, packed", "bitsandbytes fp4, packed",  # bfloat16: eight bits and an exponent
)  # fmt: skip


def test_a_quantised_layer_that_computes_something_else_is_refused(form):
    """Twice the scales in what it says it stores, not in what it computes."""
    model = made(form)
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = types.MethodType(lambda self, x, forward=layer.forward: 1.1 * forward(x), layer)
    with pytest.raises(ct.ReadingError, match=r"layer 1 .*quantised model.layers.1.mlp.up_proj does not compute"):
        ct.patch_model(model, *runs(context=9, query=4))


def test_around_quantised_layers_the_comparison_is_as_sharp_as_ever():
    """A wrong activation between layers that round their inputs: 1 %, below what they are allowed themselves."""
    model = made("stand-in, inputs of 8 bits")
    own = model.model.layers[1].mlp.act_fn.forward
    model.model.layers[1].mlp.act_fn.forward = lambda x: 1.01 * own(x)
    with pytest.raises(
        ct.ReadingError, match=r"layer 1 .*disagree at what model.layers.1.mlp.down_proj reads: .* difference 0.00\d"
    ):
        ct.patch_model(model, *runs(context=9, query=4))


# --------------------------------------------------------------------------------- what is refused


def test_merging_is_refused_and_nothing_is_changed(form):
    model = made(form)
    target, source = runs(context=9, query=1)
    mp = ct.patch_model(model, target, source)
    bits = state(model)
    with pytest.raises(ct.PatchError, match=r"layers.0.mlp.\w+.weight is quantised, .* nothing was changed"):
        mp.merge(model)
    assert same(state(model), bits)
    assert carried(model) == ()
    with torch.no_grad(), mp.applied(model):
        assert error(model(**source).logits, mp.target_logits) < ROUNDING[torch.float32]


def test_a_patch_of_what_is_not_quantised_is_merged():
    """Only the patched parameters must be plain: attention may be quantised."""
    model = tiny_gemma(d=64, h=128)
    for name, module in model.named_modules():
        if name.endswith(LINEAR) and "self_attn" in name:
            module.weight = nn.Parameter(Rows8.of(module.weight), requires_grad=False)
    target, source = runs(context=9, query=1)
    bits = state(model)
    mp = ct.patch_model(model, target, source)
    with torch.no_grad():
        unpatched = error(model(**source).logits, mp.target_logits)
        mp.merge(model)
        assert error(model(**source).logits, mp.target_logits) < ROUNDING[torch.float32] < unpatched
    mp.unmerge(model)
    assert same(state(model), bits)


class Unknown(nn.Module):
    """Four bits in 32, as GPTQ packs them."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.width = linear.out_features

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.width)


def test_a_layer_that_is_packed_in_an_unknown_way_is_refused(gemma):
    gemma.model.layers[1].mlp.up_proj = Unknown(gemma.model.layers[1].mlp.up_proj).eval()
    bits = state(gemma)
    with pytest.raises(ct.BadInput, match=r"parameter model.layers.1.mlp.up_proj.qweight is torch.int32: .*torchao"):
        ct.patch_model(gemma, *runs(context=9, query=4))
    assert same(state(gemma), bits)
    assert hook_count(gemma) == 0


@pytest.mark.parametrize(
    ("module", "attribute", "why"),
    [
        ("mlp.experts", "down_proj", "experts in one tensor"),
        ("mlp.gate", "weight", "a weight that is used inside a larger module"),
    ],
)
def test_quantised_experts_and_routers_are_refused_by_name(module, attribute, why):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    ct.patch_model(model, *runs(context=9, query=4))  # the same, not quantised
    holder = model.model.layers[1].get_submodule(module)
    weight = getattr(holder, attribute)
    setattr(holder, attribute, nn.Parameter(Rows8.of(weight), requires_grad=False))
    with pytest.raises(ct.BadInput, match=rf"parameter model.layers.1.{module}.{attribute} is quantised, and {why}"):
        ct.patch_model(model, *runs(context=9, query=4))
    assert hook_count(model) == 0


def test_a_reading_says_which_parameters_are_quantised(form):
    layer = architectures.read(made(form)).layers[0]
    assert layer.params.quantised == {f"model.layers.0.mlp.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")}
    assert layer.params.dtypes == {torch.float32}
    assert layer.params["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
