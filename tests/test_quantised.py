"""Quantised linear layers: the patch is computed beside them; what cannot be patched is refused by name.

torchao and bitsandbytes are not dependencies: where they are missing, layers made here stand in for them.
"""

from __future__ import annotations

import copy
import importlib.util
import types

import pytest
import torch
from helpers import error, hook_count, runs, tiny_gemma
from torch import nn

import architectures
import controllability as ct
from architectures import quantised
from controllability.models.hooks.carried_patches import carried
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import changes, fingerprint, look_at

ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 0.05}
LINEAR = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")


# --------------------------------------------------------------- layers as the two libraries have them


class Rows8(torch.Tensor):
    """A weight of 8-bit rows, as torchao keeps it: integers and scales behind a tensor of another type."""

    @staticmethod
    def __new__(cls, numbers, scale, rounds_inputs=False):
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)
        made.numbers, made.scale, made.rounds_inputs = numbers, scale, rounds_inputs
        return made

    def __init__(self, *_args, **_options):
        pass

    @classmethod
    def of(cls, weight, **options):
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale, **options)

    def __tensor_flatten__(self):
        return ["numbers", "scale"], {"rounds_inputs": self.rounds_inputs}

    def dequantize(self):
        return self.numbers.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight = args[:2]
            if weight.rounds_inputs:
                step = x.abs().amax(-1, keepdim=True) / 127
                x = (x / step).round() * step
            return nn.functional.linear(x, weight.dequantize())
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            held = args[0]
            return cls(func(held.numbers), func(held.scale), held.rounds_inputs)
        raise NotImplementedError(f"{func} of a quantised weight")


def stand_in(model, **options):
    for name, module in model.named_modules():
        if name.endswith(LINEAR):
            module.weight = nn.Parameter(Rows8.of(module.weight, **options), requires_grad=False)
    return model


def with_torchao(model, config, **options):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model, getattr(quantization, config)(**options), filter_fn=lambda module, name: name.endswith(LINEAR)
    )
    return model


def with_bitsandbytes(model, form, packs=False):
    """``packs``: whether the first forward packs 4-bit weights anew, as on processors that compute with bfloat16."""
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.MonkeyPatch.context() as processor:
        processor.setattr(bnb.nn.modules, "has_avx512bf16", lambda: packs)
        return _with_bitsandbytes(bnb, model, form)


def _with_bitsandbytes(bnb, model, form):
    for name, module in list(model.named_modules()):
        if not name.endswith(LINEAR):
            continue
        shape, weight = (module.in_features, module.out_features), module.weight.detach().clone()
        if form == "int8":
            new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*shape, bias=False, quant_type=form, compute_dtype=weight.dtype)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=form)
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, new.to("cpu").eval())
    return model


FORMS = {
    "stand-in": stand_in,
    "stand-in, inputs of 8 bits": lambda m: stand_in(m, rounds_inputs=True),
    "torchao int8": lambda m: with_torchao(m, "Int8WeightOnlyConfig"),
    "torchao int8, inputs of 8 bits": lambda m: with_torchao(m, "Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda m: with_torchao(m, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": lambda m: with_torchao(m, "Float8WeightOnlyConfig"),
    "bitsandbytes int8": lambda m: with_bitsandbytes(m, "int8"),
    "bitsandbytes nf4": lambda m: with_bitsandbytes(m, "nf4"),
    "bitsandbytes fp4": lambda m: with_bitsandbytes(m, "fp4"),
    "bitsandbytes nf4, packed": lambda m: with_bitsandbytes(m, "nf4", packs=True),
    "bitsandbytes fp4, packed": lambda m: with_bitsandbytes(m, "fp4", packs=True),
}


@pytest.fixture(params=FORMS)
def form(request):
    library = request.param.split()[0]
    if library in ("torchao", "bitsandbytes") and not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    if request.param.endswith(", packed") and not importlib.import_module("bitsandbytes.functional").has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16: bitsandbytes packs nothing")
    return request.param


def made(form, dtype=torch.float32):
    return FORMS[form](tiny_gemma(d=64, h=128, dtype=dtype))


def state(model):
    """Every tensor that the model's parameters and buffers consist of."""
    found = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        module = model.get_submodule(name.rpartition(".")[0])
        found |= {n: piece.detach().clone() for n, piece in quantised.pieces(name, module, value)}
    return found


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


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


# ------------------------------------------- four bits, packed anew for a processor that computes with bfloat16


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
