"""Models of a user's own, in plain torch: declared, patched exactly, and told clearly what is wrong with them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import error, hook_count, snapshot, unchanged
from torch import nn
from torch.nn import functional as F  # noqa: N812

import architectures
import controllability as ct
from architectures.reading import architecture_of
from architectures.widths import misfits
from controllability.components import (
    Activation,
    ExpertLinear,
    Fixed,
    Glu,
    Linear,
    Mixture,
    Routing,
    Scale,
    gated,
    residual,
)
from controllability.interfaces import Param
from controllability.models.reading_check import checked_reading

# ------------------------------------------------------------------------------------- the model


class Attention(nn.Module):
    def __init__(self, d, heads=2):
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate, self.up = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    """Called as openai-gpt's layers are."""

    def __init__(self, d=16, h=24):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.attention, self.ff = Attention(d), FeedForward(d, h)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.ff(self.ff_norm(x))


class Minnow(nn.Module):
    def __init__(self, layer=Block, d=16, vocabulary=60):
        super().__init__()
        self.positions, self.tokens = nn.Embedding(64, d), nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def made(cls=Minnow, layer=Block, dtype=torch.float64):
    torch.manual_seed(0)
    model = cls(layer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def declared(view, act="silu", gate="ff.gate", up="ff.up", norm="ff_norm", down=None):
    inner = gated(view.linear(gate, "h", "d"), view.linear(up, "h", "d"), Activation(act))
    return residual(view.rms_norm(norm) >> inner >> (down(view) if down else view.linear("ff.down", "d", "h")))


TARGET = {"input_ids": torch.arange(5, 17)[None]}
SOURCE = {"input_ids": TARGET["input_ids"][:, -4:], "position_ids": torch.arange(8, 12)[None]}


@pytest.fixture
def registered():
    """Registers a builder for ``Block`` (again), and forgets it after the test."""

    def register(build=declared, **options):
        architectures.unregister("minnow")
        architectures.register("minnow", **({"layer_class": Block} | options))(build)

    register()
    yield register
    architectures.unregister("minnow")


def refused(kind, message, model=None, target=TARGET):
    """Patching raises ``kind`` with this text and leaves no trace on the model."""
    model = model if model is not None else made()
    before = snapshot(model)
    with pytest.raises(kind, match=message) as raised:
        ct.patch_model(model, target, SOURCE)
    assert hook_count(model) == 0
    if not any(v.is_meta for v in before.values()):
        assert unchanged(model, before)
    return str(raised.value)


# -------------------------------------------------------------------------------------- it works


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("scope", ["each", "last"])
@torch.no_grad()
def test_a_plain_module_is_patched_merged_and_saved(registered, scope, dtype, limit, tmp_path):
    model = made(dtype=dtype)
    before = snapshot(model)
    wanted, without = model(**TARGET).logits[:, -4:], model(**SOURCE).logits
    count = 4 if scope == "each" else 1
    mp = ct.patch_model(model, TARGET, SOURCE, scope=scope)
    loaded = ct.load_patch(mp.save(tmp_path / "patch"))
    assert json.loads((tmp_path / "patch" / "patch.json").read_text())["model_type"] == ""
    for patch in (mp, loaded):
        with patch.applied(model):
            assert error(model(**SOURCE).logits[:, -count:], wanted[:, -count:]) <= limit
    assert error(without[:, -count:], wanted[:, -count:]) > 0.1
    if scope == "last":
        mp.merge(model)
        assert hook_count(model) == 0
        assert error(model(**SOURCE).logits[:, -1], wanted[:, -1]) <= limit
        mp.unmerge(model)
    assert unchanged(model, before)


class ReturnsTensor(Minnow):
    def forward(self, input_ids, position_ids=None):
        return super().forward(input_ids, position_ids).logits


class ReturnsTuple(Minnow):
    def forward(self, input_ids, position_ids=None):
        return super().forward(input_ids, position_ids).logits, "more"


class ReturnsDict(Minnow):
    def forward(self, input_ids, position_ids=None):
        return vars(super().forward(input_ids, position_ids))


class HandsOn(Minnow):
    """Hands what it does not know on to something that refuses it."""

    def forward(self, input_ids, position_ids=None, **more):
        return super().forward(input_ids, position_ids, **more)


class WithConfig(Minnow):
    def __init__(self, layer):
        super().__init__(layer)
        self.config = SimpleNamespace(vocab_size=60)


class WithRotaryAngles(Minnow):
    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("angles", torch.polar(torch.ones(4), torch.arange(4.0)))

    def to(self, dtype):
        for part in (self.positions, self.tokens, self.layers, self.head):
            part.to(dtype)
        return self


@pytest.mark.parametrize("cls", [ReturnsTensor, ReturnsTuple, ReturnsDict, HandsOn, WithConfig, WithRotaryAngles])
@torch.no_grad()
def test_what_a_forward_returns_and_what_a_model_holds_is_its_own_affair(registered, cls, tmp_path):
    model = made(cls)
    wanted = Minnow.forward(model, **TARGET).logits[:, -4:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp = ct.patch_model(model, TARGET, SOURCE)
        mp.save(tmp_path / "patch")
    with mp.applied(model):
        assert error(Minnow.forward(model, **SOURCE).logits, wanted) < 1e-12
    assert error(mp.logits, wanted) < 1e-12
    assert error(mp.target_logits, wanted) < 1e-12


def test_a_result_without_logits_is_refused(registered):
    class Silent(Minnow):
        def forward(self, input_ids, position_ids=None):
            super().forward(input_ids, position_ids)
            return "done"

    refused(ct.BadInput, r"the model returned a str without logits: its forward must return a tensor", made(Silent))


def test_a_class_that_was_registered_itself_settles_which_architecture_it_is(registered):
    model = made()
    assert architectures.read(model).architecture.name == "minnow"
    model.config = SimpleNamespace(model_type="gpt2")  # a config borrowed from another family
    assert architectures.read(model).architecture.name == "minnow"
    registered(layer_class="Block")
    with pytest.raises(ct.ReadingError, match="gpt2: no module of class GPT2Block in Minnow"):
        architectures.read(model)
    del model.config  # by name: the user's Block comes before openai-gpt's
    assert architectures.read(model).architecture.name == "minnow"
    architectures.unregister("minnow")
    assert architecture_of(model).name == "openai-gpt"


def test_what_is_registered_anew_is_read_anew(registered):
    model = made()
    ct.patch_model(model, TARGET, SOURCE)
    registered(lambda view: declared(view, act="relu"))
    refused(ct.ReadingError, "activation relu", model)


@pytest.mark.parametrize("used_before", [False, True])
def test_token_ids_are_checked_without_being_told_which_embedding_reads_them(registered, used_before):
    model = made()
    if used_before:
        ct.patch_model(model, TARGET, SOURCE)
        assert checked_reading(model).embedding is model.tokens
    refused(
        ct.BadInput, "target: token ids must lie in 0 … 59, got 99 … 99", model, {"input_ids": torch.full((1, 6), 99)}
    )


# --------------------------------------------------------------- declarations that are not the model


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
        r"layer layers.0: no module reads the block's input as it is: .* with inputs=\(architectures.Seen\(module\),\)",
        model,
    )
    registered(build, layer_class=Reversed, inputs=(architectures.Seen("ff"),))
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


# ------------------------------------------------------------------------- models in another state


def int8_parameter(up):
    up.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)


def int8_buffer(up):
    del up.weight
    up.register_buffer("weight", torch.zeros(24, 16, dtype=torch.int8))
    up.register_buffer("scale", torch.ones(24))


def packed(up):
    del up.weight
    up.register_buffer("qweight", torch.zeros(24, 2, dtype=torch.int32))


def float8(up):
    up.weight = nn.Parameter(torch.zeros(24, 16).to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (int8_parameter, "weight is torch.int8"),
        (int8_buffer, "weight is torch.int8"),
        (packed, "qweight is torch.int32"),
        (float8, "weight is torch.float8_e4m3fn"),
    ],
)
def test_quantised_weights_are_refused(registered, change, what):
    model = made()
    change(model.layers[1].ff.up)
    refused(
        ct.BadInput,
        rf"parameter layers.1.ff.up.{what}: quantised parameters cannot be patched; load the model unquantised",
        model,
    )


@pytest.mark.parametrize(("where", "name"), [("", "layers.0.ff.down.weight"), ("tokens", "tokens.weight")])
def test_a_model_on_the_meta_device_is_refused(registered, where, name):
    model = made()
    model.get_submodule(where).to("meta")
    refused(ct.BadInput, f"parameter {name} is on the meta device: load the weights first", model)


@pytest.mark.parametrize(
    ("where", "which"), [("", "the model"), ("layers.1.ff.dropout", r"module layers\.1\.ff\.dropout")]
)
def test_training_mode_is_refused(registered, where, which):
    model = made()
    ct.patch_model(model, TARGET, SOURCE)  # the same in evaluation mode is patched
    model.get_submodule(where).train()
    refused(
        ct.BadInput, rf"^{which} is in training mode: call model.eval\(\) first, dropout would make runs differ", model
    )


# -------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize(
    ("name", "model_types", "message"),
    [
        ("minnow", (), r"architecture 'minnow' is registered already: take another name, or architectures.unregister\('minnow'\) first"),
        ("mine", ("minnow",), "model type 'minnow' is registered already, by architecture 'minnow': architectures.unregister"),
        ("gemma3_text", ("mine",), "model type 'gemma3_text' is registered already, by architecture 'gemma3'"),
    ],
)  # fmt: skip
def test_a_name_is_taken_once(registered, name, model_types, message):
    known = architectures.names()
    with pytest.raises(ct.BadInput, match=message):
        architectures.register(name, layer_class="X", model_types=model_types)
    assert architectures.names() == known


def test_a_builder_without_an_abstract_block_is_named(registered):
    registered(lambda view: None)
    with pytest.raises(ct.BadInput, match="'minnow' builds no abstract block: its builder returned None"):
        architectures.block("minnow")


# ---------------------------------------------------------------------------------------- plug-ins

HEAD = "import architectures\nfrom controllability.components import residual\n"
REGISTER = """
@architectures.register({0!r}, layer_class="Layer")
def {0}(view):
    return residual(view.linear("mix", "d", "d"))
"""
PLUGINS = {
    "by_module": ("by_module", HEAD + REGISTER.format("trout")),
    "by_function": (
        "by_function:register_all",
        HEAD + "def register_all():\n    assert 'gemma3' in architectures.names()\n" + REGISTER.format("carp").replace("\n", "\n    "),
    ),
    "by_builder": ("by_builder:tench", HEAD + REGISTER.format("tench")),
    "half_way": ("half_way", HEAD + REGISTER.format("pike") + REGISTER.format("gemma3")),
    "missing": ("no_such_module", ""),
    "a_number": ("a_number:SEVEN", "SEVEN = 7"),
}  # fmt: skip
SCRIPT = """
import json, sys, warnings
import architectures, controllability as ct
early = [name for name in sys.modules if name.startswith("by_")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    known = architectures.names()
    architectures.find("llama"), architectures.names()
try:
    architectures.find("pike")
except ct.BadInput as error:
    unknown = str(error)
rules = ct.prove(architectures.block("carp"), via="output").rules
print(json.dumps([early, known, [[str(w.category.__name__), str(w.message)] for w in caught], unknown, rules]))
"""


def test_installed_plug_ins_are_loaded_and_a_broken_one_is_left_out_by_name(tmp_path):
    for name, (value, source) in PLUGINS.items():
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[controllability.architectures]\n{name} = {value}\n")
        if source:
            (tmp_path / f"{name}.py").write_text(source)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SCRIPT}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    early, known, caught, unknown, rules = json.loads(run.stdout)
    assert early == [], "plug-ins are not loaded by the import"
    assert {"trout", "carp", "tench", "gemma3", "llama"} <= set(known)
    assert "pike" not in known, "half a plug-in is none"
    assert {kind for kind, _ in caught} == {"RuntimeWarning"}
    assert len(caught) == 3, "each once"
    texts = "\n".join(text for _, text in caught)
    for part in (
        "architecture plug-in 'half_way' (half_way, from half_way 1.2) could not be loaded and is left out: "
        "BadInput: architecture 'gemma3' is registered already",
        "plug-in 'missing' (no_such_module, from missing 1.2) could not be loaded and is left out: "
        "ModuleNotFoundError: No module named 'no_such_module'; mend or uninstall it, everything else works",
        "plug-in 'a_number' (a_number:SEVEN, from a_number 1.2) could not be loaded and is left out: "
        "BadInput: a_number:SEVEN is a int; name a module, or a function without arguments",
    ):
        assert part in texts
    assert "unknown architecture or model type 'pike'" in unknown
    assert "the plug-in 'half_way' (half_way, from half_way 1.2) could not be loaded: BadInput: architecture" in unknown
    assert "theorem-1b" in rules
