"""Declarations that are not the model: told what disagrees, where, by how much, and what to do."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import error
from minnow import SOURCE, TARGET, Block, declared, made, refused, registering
from torch import nn
from torch.nn import functional as F  # noqa: N812

import architectures
import controllability as ct
from architectures.widths import misfits
from controllability.components import Activation, ExpertLinear, Fixed, Glu, Linear, Mixture, Routing, Scale, residual
from controllability.interfaces import Param

registered = pytest.fixture(registering)


def test_a_wrong_activation_is_shown_with_numbers_component_and_what_was_done(registered):
    registered(lambda view: declared(view, act="relu"))
    text = refused(
        ct.ReadingError,
        r"layer 0 \(layers.0\): expression and module disagree at layers.0.ff.down: relative difference [\d.]+ on random "
        r"input, rounding explains 1e-05; largest difference [\d.]+ \(expression [-\d.]+, module [-\d.]+\); "
        r"culprit: \(linear layers.0.ff.gate.weight >> activation relu\) \* linear layers.0.ff.up.weight, which the "
        r"expression puts before linear layers.0.ff.down.weight; the declaration is wrong, the family changed, or a "
        r"switch is on that nobody declared$",
    )
    number = r"(-?[\d.]+)"
    found = re.search(f"largest difference {number} \\(expression {number}, module {number}\\)", text)
    largest, expression, module = map(float, found.groups())
    assert largest == pytest.approx(abs(expression - module), rel=0.01)
    assert largest > 0


def doubled(view):
    return residual(declared(view).terms[1], declared(view).terms[1])


def transposed(view):
    return Linear(view.param("ff.down.weight", "h", "d"), None, "in_out")


WRONG = {
    "another norm": (
        lambda v: declared(v, norm="attention_norm"),
        r"disagree at layers.0.ff.gate: .* on random input.*; culprit: scale layers.0.attention_norm.weight, which the "
        "expression puts before linear layers.0.ff.gate.weight",
    ),
    "gate and up exchanged": (
        lambda v: declared(v, gate="ff.up", up="ff.gate"),
        r"disagree at layers.0.ff.down: .*culprit: \(linear layers.0.ff.up.weight >> activation silu\) \* linear",
    ),
    "no skip": (
        lambda v: declared(v).terms[1],
        "disagree at the output of the whole layer: .*every module agrees, what disagrees is how the expression puts them together",
    ),
    "misspelt": (
        lambda v: declared(v, gate="ff.gaet"),
        r"the model has no parameter layers.0.ff.gaet.weight \(close to it: layers.0.ff.gate.weight\): its layers are not what was registered",
    ),
    "no such module": (lambda v: declared(v, gate="moe.router"), "the model has no parameter layers.0.moe.router.weight: its layers"),
    "two missing": (
        lambda v: declared(v, gate="ff.a", up="ff.b"), "has no parameter layers.0.ff.a.weight.*; the model has no parameter layers.0.ff.b.weight",
    ),
    "axes": (
        lambda v: declared(v, down=lambda v: Linear(v.param("ff.down.weight", "E", "d", "h"))),
        r"layers.0.ff.down.weight has shape \(16, 24\), declared with 3 axes \(E, d, h\)",
    ),
    "numbers": (
        lambda v: declared(v, down=lambda v: Linear(Param("layers.0.ff.down.weight", (16, 32)))),
        r"layers.0.ff.down.weight has shape \(16, 24\), declared \(16, 32\)",
    ),
    "stored the other way round": (
        lambda v: declared(v, down=transposed),
        r"minnow: layer layers.0: layers.0.ff.down.weight has shape \(16, 24\), declared \(h, d\): it reads 16 numbers and gets "
        r"24 from linear layers.0.ff.gate.weight; as stored the other way round it would fit \(layout\): its layers",
    ),
    "the wrong matrix": (
        lambda v: declared(v, up="attention.out"),
        r"layer layers.0: the expression multiplies 24 numbers \(linear layers.0.ff.gate.weight\) and 16 numbers "
        r"\(linear layers.0.attention.out.weight\)",
    ),
    "a scale of another size": (
        lambda v: declared(v, down=lambda v: Scale(v.param("ff_norm.weight", "h")) >> v.linear("ff.down", "d", "h")),
        r"layers.0.ff_norm.weight has shape \(16,\), declared \(h\): it reads 16 numbers and gets 24 from linear layers.0.ff.gate",
    ),
    "no feed-forward half": (lambda v: None, r"minnow: none of its 2 layers has a feed-forward half \(its builder returned None\)"),
    "not a component": (lambda v: "block", "minnow: the builder of layer layers.0 returned a str"),
    "a builder that fails": (
        lambda v: declared(v, norm=v.config.norm),
        "minnow: layer layers.0 is not what was declared: 'NoneType' object has no attribute 'norm'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_declaration_that_is_not_the_model_is_refused(registered, name):
    build, message = WRONG[name]
    registered(build)
    refused(ct.ReadingError, message)


def test_a_component_of_ones_own_that_fails_is_named(registered):
    class Broken(ct.Component):
        def __call__(self, params, x):
            raise IndexError("seven")

        def describe(self):
            return "broken"

    registered(lambda view: declared(view, down=lambda v: Broken() >> v.linear("ff.down", "d", "h")))
    refused(
        ct.ReadingError,
        r"layer 0 \(layers.0\): the expression cannot be computed up to layers.0.ff.down on random input: IndexError: seven",
    )


def test_a_block_whose_input_no_module_shows_says_what_to_do(registered):
    class Reversed(Block):
        def __init__(self):
            super().__init__()
            self.ff = nn.Sequential(nn.SiLU(), nn.Linear(16, 16, bias=False))

        def forward(self, x):
            return (x := x + self.attention(x)) + self.ff(x)

    def build(view):
        return residual(Activation("silu") >> view.linear("ff.1", "d", "d"))

    model = made(layer=Reversed)
    registered(build, layer_class=Reversed)
    refused(
        ct.ReadingError,
        r"layer layers.0: no module reads the block's input as it is: .* with inputs=\(architectures.StatePoint\(module\),\)",
        model,
    )
    registered(build, layer_class=Reversed, inputs=(architectures.StatePoint("ff"),))
    mp = ct.patch_model(model, TARGET, SOURCE, via="output")
    assert error(mp.logits, mp.target_logits) < 1e-12


def test_one_module_that_computes_several_maps_is_refused(registered):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(16, 24))

        def forward(self, x):
            return F.linear(F.silu(F.linear(x, self.one)), self.two)

    def build(view):
        one, two = Linear(view.param("ff.one", "h", "d")), Linear(view.param("ff.two", "d", "h"))
        return residual(view.rms_norm("ff_norm") >> one >> Activation("silu") >> two)

    model = made()
    for layer in model.layers:
        layer.ff = Packed().double().eval()
    registered(build)
    refused(
        ct.ReadingError,
        "minnow: layer layers.0: module layers.0.ff computes linear layers.0.ff.one and linear layers.0.ff.two in one "
        r"forward, .*: give every linear map a module of its own \(torch.nn.Linear\)",
        model,
    )


def mixture(last):
    return Mixture(LINEAR["router"], Routing(2), ExpertLinear(Param("first")) >> Activation("silu"), ExpertLinear(last))


LINEAR = {name: Linear(Param(name)) for name in ("up", "down", "router", "odd")}
SHAPES = {
    "up": (6, 4), "down": (4, 6), "odd": (5, 4), "router": (3, 4), "first": (3, 6, 4), "last": (3, 4, 6), "short": (3, 4, 5),
    "narrow": (3, 2, 6), "bias": (4,),
}  # fmt: skip


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (residual(mixture(Param("last"))), None),
        (residual(mixture(Param("short"))), "short has shape (3, 4, 5): it reads 5 numbers and gets 6 from experts first"),
        (residual(mixture(Param("narrow"))), "the expression adds 4 numbers (linear router) and 2 numbers (experts narrow)"),
        (LINEAR["up"] >> Glu(Activation("silu")), None),
        (LINEAR["odd"] >> Glu(Activation("silu")), "linear odd gives 5 numbers, which have no two halves"),
        (LINEAR["up"] >> Glu(Activation("silu")) >> LINEAR["down"], "down has shape (4, 6): it reads 6 numbers and gets 3 from half of linear up"),
        (Linear(Param("up"), Param("bias")), "bias has shape (4,), and up of shape (6, 4) gives 6 numbers"),
        (LINEAR["up"] >> Fixed(Scale(Param("bias"))), "bias has shape (4,): it reads 4 numbers and gets 6 from linear up"),
    ],
)  # fmt: skip
def test_shapes_that_contradict_each_other(block, message):
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert misfits(block, params) == ([message] if message else [])


def add_parameter(ff):
    ff.gain = nn.Parameter(torch.ones(16))


def add_buffer(ff):
    ff.register_buffer("gain", torch.ones(16))


def add_module(ff):
    ff.extra = nn.Linear(16, 16).eval()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (add_parameter, "layers.1.ff.gain"),
        (add_buffer, "layers.1.ff.gain"),
        (add_module, "layers.1.ff.extra.weight, layers.1.ff.extra.bias"),
    ],
)
def test_what_the_expression_does_not_know_in_the_feed_forward_half_is_named(registered, change, names):
    model = made()
    change(model.layers[1].ff)
    refused(
        ct.ReadingError,
        f"minnow: layer layers.1 has {names} in its feed-forward half, which the registered expression does not know",
        model,
    )


def test_a_model_that_is_itself_a_layer_is_refused(registered):
    with pytest.raises(ct.ReadingError, match="minnow: the model is itself a Block, which was registered as a layer"):
        architectures.read(Block())
