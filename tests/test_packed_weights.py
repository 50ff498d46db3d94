"""Four bits, packed anew in the first forward for a processor that computes with bfloat16."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from helpers import error, runs, tiny_gemma
from quantised_forms import FORMS, LINEAR, ROUNDING, form as form, made, same, state

import architectures
import controllability as ct
from architectures import quantised
from controllability.models.reading.fingerprints import changes, fingerprint, look_at


@pytest.fixture(params=["nf4", "fp4"])
def awaiting(request):
    """A model whose first forward would pack its weights.  Here that is done by hand: it needs no such processor."""
    pytest.importorskip("bitsandbytes")
    return FORMS[f"bitsandbytes {request.param}, packed"](tiny_gemma(d=64, h=128))


def pack(model):
    """What the first forward does."""
    four_bit = importlib.import_module("bitsandbytes.functional")
    for name, module in model.named_modules():
        if name.endswith(LINEAR):
            module.weight.data, _ = four_bit._convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )
    return model


def linear(model):
    return model.model.layers[0].mlp.up_proj


def numbers(model):
    return architectures.read(model).layers[0].params["model.layers.0.mlp.up_proj.weight"]


def test_packed_four_bit_weights_are_read_as_they_lie(awaiting):
    """The same levels, with scales of bfloat16; nothing is unpacked in place by reading, and it reads the same twice."""
    plain, code = numbers(awaiting), linear(awaiting).weight.quant_state.code
    pack(awaiting)
    bits, held = state(awaiting), dict(vars(linear(awaiting).weight.quant_state))
    read = numbers(awaiting)
    scales = held["absmax"].T.reshape(-1, 1).double()
    steps = read.double().reshape(len(scales), -1) / scales
    assert read.dtype == plain.dtype == torch.float32
    assert float((steps[..., None] - code.double()).abs().amin(-1).max()) < 1e-6
    assert 1e-5 < error(read, plain) < 2**-8
    assert torch.equal(numbers(awaiting), read)
    assert same(state(awaiting), bits)
    assert vars(linear(awaiting).weight.quant_state) == held


def test_scales_that_are_not_nested_are_read_as_well():
    four_bit = pytest.importorskip("bitsandbytes.functional")
    bnb = importlib.import_module("bitsandbytes")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer.to("cpu")
    plain = quantised.dequantised(layer, layer.weight, "weight")
    layer.weight.data, _ = four_bit._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert error(quantised.dequantised(layer, layer.weight, "weight"), plain) < 2**-8


def test_packing_in_the_first_forward_is_no_change_of_the_weights(awaiting):
    """Neither to the fingerprint nor to the cheap look; and to look packs nothing."""
    bits, mark, seen = state(awaiting), fingerprint(awaiting), look_at(awaiting)
    assert same(state(awaiting), bits)
    pack(awaiting)
    assert not same(state(awaiting), bits)
    assert fingerprint(awaiting) == mark
    assert changes(seen, look_at(awaiting)) == []
    assert changes(look_at(awaiting), look_at(awaiting)) == []


def test_what_changed_before_the_weights_were_packed_is_noticed(awaiting):
    mark, seen = fingerprint(awaiting), look_at(awaiting)
    with torch.no_grad():
        linear(awaiting).weight.view(-1)[1:2] ^= 1  # an entry that no sample takes
    assert changes(seen, look_at(awaiting)) == ["model.layers.0.mlp.up_proj.weight"]
    pack(awaiting)
    assert changes(seen, look_at(awaiting)) == ["model.layers.0.mlp.up_proj.weight"]
    assert fingerprint(awaiting) != mark


def test_a_state_dict_rounds_the_scales_again_and_that_is_a_change(awaiting):
    """Bitsandbytes unpacks for it in place."""
    pack(awaiting)
    mark, seen = fingerprint(awaiting), look_at(awaiting)
    awaiting.state_dict()
    assert "model.layers.0.mlp.up_proj.weight.absmax" in changes(seen, look_at(awaiting))
    assert fingerprint(awaiting) != mark


def test_where_nothing_is_packed_fingerprints_are_of_the_weights_as_stored(monkeypatch):
    """On any other processor not even the packing is looked for."""
    four_bit = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.delattr(four_bit, "_convert_weight_packed_for_cpu")
    model = made("bitsandbytes nf4")
    assert [place for place, *_ in look_at(model).tensors.values() if place is None] == []
    weight = linear(model).weight
    assert quantised.as_run(linear(model), weight) is weight


def test_a_shape_that_cannot_be_packed_is_looked_at_as_it_is(awaiting):
    bnb = importlib.import_module("bitsandbytes")
    layer = copy.copy(linear(awaiting))
    weight = bnb.nn.Params4bit(torch.randn(24, 64), requires_grad=False).to("cpu")
    assert quantised.as_run(layer, weight) is weight


def test_packed_weights_that_this_bitsandbytes_cannot_unpack_are_refused_by_name(awaiting, monkeypatch):
    pack(awaiting)
    bits = state(awaiting)
    monkeypatch.delattr("bitsandbytes.functional._convert_weight_packed_for_cpu_inverse")
    with pytest.raises(
        ct.BadInput, match=r"parameter model.layers.0.mlp.up_proj.weight was packed by bitsandbytes for"
    ):
        numbers(awaiting)
    assert same(state(awaiting), bits)


@pytest.mark.parametrize("form", ["bitsandbytes nf4", "bitsandbytes nf4, packed"], indirect=True)
def test_an_adapter_is_exported_beside_packed_weights(form, tmp_path):
    """PEFT's loading asks its twin for a state_dict, for which bitsandbytes unpacks: the model's own weights stay."""
    pytest.importorskip("peft")
    target, source = runs(context=9, query=1)
    model = made(form)
    mp = ct.patch_model(model, target, source, scope="last")
    bits, mark = state(model), fingerprint(model)
    assert mp.export_peft(tmp_path / "adapter").check.verified
    assert same(state(model), bits)
    assert fingerprint(model) == mark
    with torch.no_grad(), mp.applied(model):
        assert error(model(**source).logits, mp.target_logits) < ROUNDING[torch.float32]


def test_patches_made_before_and_after_the_first_forward_are_of_the_same_weights(form):
    """The cheap look of the first was taken before anything ran."""
    model = made(form)
    target, source = runs(context=9, query=4)
    early = look_at(model)
    mp, other = (ct.patch_model(model, target, source, scope="last") for _ in range(2))
    mp._seen = early
    assert ct.diff(mp, other).parameters
    with torch.no_grad(), mp.applied(model):
        assert error(model(**source).logits[0, -1], mp.target_logits.reshape(-1)) < ROUNDING[torch.float32]
