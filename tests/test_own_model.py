"""Models of a user's own that are declared rightly: patched, merged, saved; and those in a state that is refused."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import error, hook_count, snapshot, unchanged
from minnow import SOURCE, TARGET, Minnow, declared, made, refused, registering
from torch import nn

import architectures
import controllability as ct
from architectures.reading import architecture_of
from controllability.models.reading.checked_reading import checked_reading

registered = pytest.fixture(registering)


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
