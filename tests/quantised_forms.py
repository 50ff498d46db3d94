"""Quantised linear layers as two libraries have them.

torchao and bitsandbytes are not dependencies: where they are missing, layers made here stand in for them.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import tiny_gemma
from torch import nn

from architectures import quantised

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
