"""One notion of the same model: its weights, its settings, its active adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import error, runs, tiny_gemma
from small_models import llama, logits
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import controllability as ct
from controllability.models.hooks.carried_patches import carried
from controllability.models.reading.fingerprints import settings_of


def exchanged_activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU().eval()


def function_for_activation(model: Any) -> None:
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = torch.relu


def other_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))


def attribute(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def setting(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


CHANGES = {
    "activation": (exchanged_activation, r"act_fn \(\w+, now ReLU\)"),
    "activation, a function": (function_for_activation, r"act_fn \(\w+, now \S*relu\)"),
    "forward": (other_forward, "layers.0.mlp "),
    "eps": (attribute("model.layers.1.input_layernorm", "eps", 0.5), r"input_layernorm.eps \(1e-06, now 0.5\)"),
    "scaling": (attribute("model.layers.0.self_attn", "scaling", 1.0), "self_attn.scaling"),
    "window": (setting("sliding_window", 2), r"config.sliding_window \(8, now 2\)"),
    "soft-cap": (setting("final_logit_softcapping", 1.0), r"config.final_logit_softcapping \(None, now 1.0\)"),
    "kinds of layers": (lambda m: m.config.layer_types.__setitem__(0, "full_attention"), "config.layer_types"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["made here", "loaded", "another model object"])
def test_what_changes_the_function_and_no_tensor_is_refused_by_name(change, how, tmp_path):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.save(tmp_path / "patch")
    used = copy.deepcopy(model) if how == "another model object" else model
    patch = ct.load_patch(tmp_path / "patch") if how == "loaded" else mp
    before = used.state_dict()
    alter, words = CHANGES[change]
    alter(used)
    assert all(torch.equal(before[name], value) for name, value in used.state_dict().items())
    for use in (lambda: patch.applied(used).__enter__(), lambda: patch.merge(used)):
        with pytest.raises(ct.PatchError, match=words):
            use()
    assert carried(used) == ()
    if change.startswith(("activation", "forward")):  # the config says otherwise, and the model is read anew
        with pytest.raises((ct.ReadingError, ct.PatchError), match=r"expression and module disagree|was not called"):
            ct.patch_model(used, target, source, scope="last")
        return
    anew = ct.patch_model(used, target, source, scope="last")
    with anew.applied(used):
        assert error(logits(used, source)[:, -1:], anew.target_logits) < 2e-5
    with pytest.raises(ct.PatchError, match=r"different settings|the model changed between"):
        ct.diff(anew, patch)


HARMLESS = {
    "attention kernel": lambda m: m.set_attn_implementation("eager"),
    "outputs": lambda m: m.config.update(
        {"output_attentions": False, "output_hidden_states": True, "use_cache": False}
    ),
    "names": lambda m: m.config.update({"pad_token_id": 7, "architectures": ["Other"]}),
    "dropout": lambda m: m.config.update({"attention_dropout": 0.5}),
    "gradients": lambda m: m.requires_grad_(False),
    "hooks": lambda m: m.model.register_forward_hook(lambda *_: None),
    "to the same dtype": lambda m: m.to(torch.float32),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_what_changes_no_logit_is_accepted(change, tmp_path):
    model, (target, source) = tiny_gemma(attn_implementation="sdpa"), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.save(tmp_path / "patch")
    HARMLESS[change](model)
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        with patch.applied(model):
            assert error(logits(model, source)[:, -1:], mp.target_logits) < 2e-5


def test_a_model_that_counts_its_calls_is_the_same_model():
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.calls, self._last = inner, 0, 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self._last = float(x.abs().max())
            return self.inner(x)

    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Counting(layer.self_attn.o_proj).eval()
    mp = ct.patch_model(model, target, source, scope="last")
    logits(model, target)
    with mp.applied(model):
        assert error(logits(model, source)[:, -1:], mp.target_logits) < 2e-5


class Steered(nn.Module):
    """An adapter of another make: how strong it is stands in a plain attribute."""

    def __init__(self, inner: nn.Module, name: str, value: Any, strength: Callable[[Any], float]) -> None:
        super().__init__()
        self.inner, self.strength, self.name = inner, strength, name
        setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + self.strength(vars(self)[self.name]))


ATTRIBUTES = {
    "private number": ("_scale", 0.5, 2.0, float),
    "private list": ("_active", ["a"], ["b"], lambda held: float("a" in held)),
    "set": ("active", {"a"}, {"b"}, lambda held: float("a" in held)),
    "namespace": ("options", SimpleNamespace(scale=0.5), SimpleNamespace(scale=2.0), lambda held: held.scale),
    "NumPy number": ("scale", np.float32(0.5), np.float32(2), float),
    "NumPy array": ("scales", np.array([0.5, 1.0]), np.array([2.0, 1.0]), lambda held: float(held[0])),
    "tensor that is no buffer": ("scale", torch.tensor(0.5), torch.tensor(2.0), float),
    "vector that is no buffer": ("scales", torch.full((40,), 0.5), torch.full((40,), 2.0), lambda held: float(held[0])),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_plain_attribute_of_any_kind_is_a_setting(kind, loaded, tmp_path):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    name, before, after, strength = ATTRIBUTES[kind]
    for layer in model.model.layers:
        layer.self_attn.o_proj = Steered(layer.self_attn.o_proj, name, copy.deepcopy(before), strength).eval()
    mp = ct.patch_model(model, target, source)
    if loaded:
        mp = ct.load_patch(mp.save(tmp_path / "patch"))
    with mp.applied(model):
        logits(model, source)
    for layer in model.model.layers:
        setattr(layer.self_attn.o_proj, name, after)
    with pytest.raises(ct.PatchError, match=rf"self_attn.o_proj.{name}"), mp.applied(model):
        pass
    for layer in model.model.layers:
        setattr(layer.self_attn.o_proj, name, copy.deepcopy(before))
    with mp.applied(model):
        logits(model, source)


def test_an_attention_function_of_the_callers_own_is_a_setting(tmp_path):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    mp.save(tmp_path / "patch")
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["mine"] = lambda *args, **kwargs: (plain(*args, **kwargs)[0] * 0.5, None)
    try:
        model.config._attn_implementation = "mine"
        for patch in (mp, ct.load_patch(tmp_path / "patch")):
            with pytest.raises(ct.PatchError, match=r"config.attention"), patch.applied(model):
                pass
        model.config._attn_implementation = "eager"
        with mp.applied(model):
            assert error(logits(model, source), mp.target_logits) < 2e-5
    finally:
        del ALL_ATTENTION_FUNCTIONS["mine"]


def test_what_changes_while_a_patch_is_applied_is_told(recwarn):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    with mp.applied(model):
        logits(model, source)
    assert not [w for w in recwarn if issubclass(w.category, ct.ControllabilityWarning)]
    with (
        pytest.warns(ct.ControllabilityWarning, match=r"o_proj.weight changed while the patch was applied"),
        mp.applied(model),
        torch.no_grad(),
    ):
        model.model.layers[0].self_attn.o_proj.weight.mul_(2)


def test_logits_that_are_handed_out_are_the_callers_own():
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    for taken in (mp.target_logits, mp.logits):
        taken.zero_()
    mp.merge(model)
    assert mp.merged.relative_error < 1e-4 and float(mp.target_logits.abs().max()) > 0.1


def test_settings_hold_no_model_and_fit_into_json():
    model = tiny_gemma()
    found = settings_of(model.named_modules())
    assert found["config.sliding_window"] == 8 and found["model.layers.0.mlp.act_fn"].__name__ == "GELUTanh"
    assert not any(isinstance(value, nn.Module | Tensor) for value in found.values())
    assert settings_of(copy.deepcopy(model).named_modules()) == found


def test_a_patch_file_tells_the_settings_and_one_without_them_loads(tmp_path, monkeypatch):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.save(tmp_path / "patch")
    text = json.loads((tmp_path / "patch" / "patch.json").read_text())
    assert text["settings"]["config.sliding_window"] == 8
    again = ct.load_patch(tmp_path / "patch")
    again.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "patch.json").read_text())["settings"] == text["settings"]
    assert ct.diff(mp, again).largest.relative < 1e-6


@pytest.mark.parametrize("loaded", [False, True])
def test_the_active_adapter_belongs_to_the_model(loaded, tmp_path):
    peft = pytest.importorskip("peft")
    make = lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)  # noqa: E731
    model = peft.get_peft_model(llama(), make(), adapter_name="a")
    model.add_adapter("b", make())
    model.eval()
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    mp.save(tmp_path / "patch")
    patch = ct.load_patch(tmp_path / "patch") if loaded else mp
    model.set_adapter("b")
    with pytest.raises(ct.PatchError, match=r"active_adapter\S* \(\S*a\S*, now \S*b"), patch.applied(model):
        pass
    model.set_adapter("a")
    with (
        model.disable_adapter(),
        pytest.raises(ct.PatchError, match=r"_disable_adapters|_adapters_disabled"),
        patch.applied(model),
    ):
        pass
    with patch.applied(model):
        assert error(logits(model, source), mp.target_logits) < 2e-5
        with pytest.raises(ct.PatchError, match="it is token"):
            logits(model, source | {"input_ids": source["input_ids"].flip(1)})
