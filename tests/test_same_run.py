"""The run that is solved is the run that is used: one notion of the same model, the same input, the same cache, the same lock."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import error, runs, tiny_gemma
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import controllability as ct
from controllability.models.hooks.carried_patches import carried
from controllability.models.reading.settings import settings_of


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | more))).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


# ------------------------------------------------------------------------------- the same run


def first_kept(target: dict[str, Any], query: int = 3) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """(source, positions): the first token of the target at 0, and its last ones where they were."""
    ids = target["input_ids"]
    at = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(ids.shape[1])[-query:]])
    return {"input_ids": ids[:, at], "position_ids": at[None]}, (torch.arange(len(at)), at)


@pytest.mark.parametrize("make", [tiny_gemma, llama, gpt2])
@pytest.mark.parametrize("scope", ["each", "last", "all"])
def test_a_gap_in_the_positions_is_solved_as_the_model_runs_it(make, scope):
    model, (target, _) = make(), runs(context=9, query=3)
    source, positions = first_kept(target)
    mp = ct.patch_model(model, target, source, scope=scope, positions=positions)
    row = slice(-1, None) if scope == "last" else slice(None)
    wanted = logits(model, target)[:, positions[1]][:, row]
    with mp.applied(model):
        assert error(logits(model, source)[:, row], wanted) < 2e-5
    assert error(logits(model, source)[:, row], wanted) > 0.1


def test_without_a_cache_such_a_row_is_packed_and_that_is_what_is_solved_when_asked_for():
    model, (target, _) = llama(), runs(context=9, query=3)
    source, positions = first_kept(target)
    packed = source | {"use_cache": False}
    assert error(logits(model, packed), logits(model, source)) > 0.1
    mp = ct.patch_model(model, target, packed, positions=positions)
    wanted = logits(model, target)[:, positions[1]]
    with mp.applied(model):
        assert error(logits(model, packed), wanted) < 2e-5
        with pytest.raises(ct.PatchError, match="it is use_cache False, the model got True"):
            logits(model, source)


@pytest.mark.parametrize("scope", ["last", "all"])
@pytest.mark.parametrize("order", ["gap", "backwards"])
def test_one_set_of_weights_is_not_used_on_its_own_input_run_otherwise(scope, order):
    model, (target, source) = llama(), runs(context=9, query=3)
    positions = None
    if order == "gap":
        source, positions = first_kept(target)
    else:
        source = source | {"position_ids": source["position_ids"].flip(-1)}
    mp = ct.patch_model(model, target, source, scope=scope, positions=positions)
    with mp.applied(model):
        assert error(logits(model, source)[:, -1], mp.target_logits[:, -1]) < 2e-5
        with pytest.raises(ct.PatchError, match="it is use_cache True, the model got False"):
            logits(model, source | {"use_cache": False})
        masked = source | {"attention_mask": torch.ones_like(source["input_ids"]), "use_cache": False}
        assert error(logits(model, masked)[:, -1], mp.target_logits[:, -1]) < 2e-5, (
            "a mask says that it is one sequence"
        )
        logits(model, {"input_ids": source["input_ids"] + 1, "use_cache": False})  # another input is nobody's business


@pytest.mark.parametrize("asked", [None, True, False])
def test_elsewhere_a_cache_is_no_matter(asked):
    model, (target, source) = llama(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source | {"use_cache": asked})
    with mp.applied(model):
        for used in (None, True, False):
            assert error(logits(model, source | {"use_cache": used}), mp.target_logits) < 2e-5


@pytest.mark.parametrize("same_object", [True, False])
def test_a_layer_that_stands_twice_finds_its_own_entries_in_the_cache(same_object):
    model, (target, source) = llama(), runs(context=9, query=3)
    layers = model.model.layers
    twin = layers[1] if same_object else copy.deepcopy(layers[1])
    model.model.layers = nn.ModuleList([layers[0], layers[1], twin]).eval()
    model.config.num_hidden_layers = 3
    assert error(logits(model, source | {"use_cache": False}), logits(model, source)) > 0.01, "both have layer_idx 1"
    mp, wanted = ct.patch_model(model, target, source), logits(model, target)[:, -3:]
    with mp.applied(model):
        assert error(logits(model, source), wanted) < 2e-5
        with pytest.raises(ct.PatchError, match="it is use_cache True, the model got False"):
            logits(model, source | {"use_cache": False})


def test_a_corrected_merge_runs_each_layer_twice_on_one_cache():
    model, (target, _) = llama(), runs(context=9, query=3)
    source, positions = first_kept(target)
    mp = ct.patch_model(model, target, source, "last", positions=positions)
    mp.merge(model, corrected=True)
    assert error(logits(model, source)[:, -1], logits_without(mp, model, target)) < 2e-5


def logits_without(mp: ct.ModelPatch, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The last logits of the model as it was before the merge."""
    mp.unmerge(model)
    return logits(model, inputs)[:, -1]


# ----------------------------------------------------------------------------- the same model


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


# ----------------------------------------------------------------------------- the same input


def ones(source: dict[str, Any]) -> dict[str, Any]:
    return source | {"attention_mask": torch.ones_like(source["input_ids"])}


OTHER = {
    "positions forgotten": (lambda m, s: {"input_ids": s["input_ids"]}, "position_ids 9, the model got 0"),
    "positions shifted": (lambda m, s: s | {"position_ids": s["position_ids"] + 1}, "position_ids 9, the model got 10"),
    "a mask": (lambda m, s: s | {"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask None, the model got "),
    "tokens": (lambda m, s: s | {"input_ids": (s["input_ids"] + 1) % 60}, "made for: at sample 0, position 0 it is token"),
    "embeddings": (
        lambda m, s: {"inputs_embeds": torch.randn(1, 3, 32), "position_ids": s["position_ids"]},
        r"input_ids \(1, 3\), the model got None",
    ),
    "a past": (
        lambda m, s: s | {"past_key_values": m(**s | {"attention_mask": None}).past_key_values}, "past_key_values None, the model got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("make", [tiny_gemma, llama, gpt2])
def test_each_refuses_any_other_input(make, change, tmp_path):
    model, (target, source) = make(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    mp.save(tmp_path / "patch")
    alter, words = OTHER[change]
    with torch.no_grad():
        other = alter(model, source)
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        with patch.applied(model), pytest.raises(ct.PatchError, match=words):
            logits(model, other)


def test_each_accepts_what_means_the_same():
    model, (target, source) = gpt2(), runs(context=9, query=3, batch=2)
    mp = ct.patch_model(model, target, source)
    one = source | {"position_ids": source["position_ids"][:1]}
    for same in (
        source,
        ones(source),
        one,
        source | {"output_hidden_states": True, "return_dict": True, "labels": source["input_ids"]},
    ):
        with mp.applied(model):
            assert error(logits(model, same), mp.target_logits) < 2e-5
    counted = ct.patch_model(model, target, {"input_ids": source["input_ids"]})
    with counted.applied(model):
        assert error(logits(model, one | {"position_ids": torch.arange(3)[None]}), counted.target_logits) < 2e-5
        assert error(model(source["input_ids"]).logits, counted.target_logits) < 2e-5, "by position"


def test_each_of_embeddings_and_of_padded_rows():
    model, (target, source) = llama(), runs(context=9, query=3)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(source["input_ids"]),
        "position_ids": source["position_ids"],
    }
    mp = ct.patch_model(model, target, embedded)
    with mp.applied(model):
        assert error(logits(model, embedded), mp.target_logits) < 2e-5
        other = embedded["inputs_embeds"].detach().clone()
        other[0, 1, 3] += 1
        with pytest.raises(ct.PatchError, match="at sample 0, position 1 it is inputs_embeds"):
            logits(model, embedded | {"inputs_embeds": other})
    mask = torch.tensor([[0, 1, 1]])
    mp = ct.patch_model(model, target, source | {"attention_mask": mask})
    with mp.applied(model):
        logits(model, source | {"attention_mask": mask.bool()})
        with pytest.raises(ct.PatchError, match=r"attention_mask .* the model got None"):
            logits(model, source)


# --------------------------------------------------------------------- copies, threads, one lock


@pytest.mark.parametrize("scope", ["each", "last", "all"])
def test_the_callers_buffers_are_copied(scope, tmp_path):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    pairs = torch.arange(3), torch.arange(9, 12)
    held = {"target": target["input_ids"].clone(), "source": source["input_ids"].clone()}
    mp = ct.patch_model(model, target, source, scope=scope, positions=pairs)
    for buffer in (target["input_ids"], source["input_ids"], source["position_ids"], *pairs):
        buffer.fill_(1)
    mp.save(tmp_path / "patch")
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        for role, ids in held.items():
            assert torch.equal(patch.inputs[role]["input_ids"], ids)
        assert torch.equal(patch.inputs["positions"][1], torch.arange(9, 12))
    right = {"input_ids": held["source"], "position_ids": torch.arange(9, 12)[None]}
    row = slice(-1, None) if scope == "last" else slice(None)
    with mp.applied(model):
        assert error(logits(model, right)[:, row], mp.target_logits) < 2e-5


def test_what_extends_a_patch_is_copied():
    model = llama(hidden_size=128, intermediate_size=256)
    ids = [runs(9, 3, seed=seed)[0]["input_ids"] for seed in range(2)]
    mp = ct.patch_model(model, {"input_ids": ids[0]}, {"input_ids": ids[0][:, -3:]}, scope="all")
    buffer = ids[1].clone()
    mp.extend(model, {"input_ids": buffer}, {"input_ids": buffer[:, -3:]})
    buffer.fill_(1)
    assert torch.equal(mp.stream.sequences[1].target, ids[1][0])


@pytest.mark.parametrize("objects", [1, 2])
def test_extensions_from_several_threads_are_all_there(objects):
    """Also on two model objects of the same weights, whose locks are two."""
    model = llama(hidden_size=128, intermediate_size=256)
    used = [model, copy.deepcopy(model)] if objects == 2 else [model, model]
    ids = [runs(9, 3, seed=seed)[0]["input_ids"] for seed in (0, 1, 3, 4)]
    plain = [({"input_ids": x}, {"input_ids": x[:, -3:]}) for x in ids]
    mp = ct.patch_model(model, *plain[0], scope="all")
    threads = [threading.Thread(target=mp.extend, args=(used[i % 2], *each)) for i, each in enumerate(plain[1:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mp.extensions) == 3
    wanted = [logits(model, target)[:, -3:] for target, _ in plain]
    with mp.applied(model):
        assert max(error(logits(model, s), w) for (_, s), w in zip(plain, wanted, strict=True)) < 1e-4


def wrapped(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), adapter_name="a").eval()


@pytest.mark.parametrize("base_first", [True, False])
@pytest.mark.parametrize("pair", ["base", "peft"])
def test_a_model_and_its_base_are_one(pair, base_first):
    (outer, inner), (target, source) = halves(pair), runs(context=9, query=3)
    first, second = (inner, outer) if base_first else (outer, inner)
    a, b = (ct.patch_model(each, target, source, scope="last") for each in (first, second))
    with a.applied(first):
        with (
            pytest.raises(ct.PatchError, match="the model carries 1 patch and this one was made while it carried 0"),
            b.applied(second),
        ):
            pass
        on_top = ct.patch_model(second, target, source, via="output")
        assert on_top.made_under == (a.id,)
    with b.applied(second):
        pass


def halves(pair: str) -> tuple[Any, Any]:
    model = llama()
    return (wrapped(model), model) if pair == "peft" else (model, model.model)


def test_a_merge_that_was_undone_is_none_for_the_base_either():
    model, (target, source) = llama(), runs(context=9, query=3)
    inner = ct.patch_model(model.model, target, source, scope="last")
    outer = ct.patch_model(model, target, source, scope="last")
    outer.merge(model)
    with pytest.raises(ct.PatchError, match="carries 1 patch"), inner.applied(model.model):
        pass
    outer.unmerge(model)
    with inner.applied(model.model):
        pass


def test_a_model_and_its_base_wait_for_each_other():
    model, failed = llama(), []

    def work(part: Any) -> None:
        for seed in range(3):
            try:
                ct.patch_model(part, *runs(9, 3, seed=seed))
            except ct.ControllabilityError as refused:
                failed.append(refused)

    threads = [threading.Thread(target=work, args=(part,)) for part in (model, model.model)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_models_that_share_an_embedding_alone_do_not_wait():
    a, b = llama(), llama()
    b.model.embed_tokens = a.model.embed_tokens
    target, source = runs(context=9, query=3)
    one, two = ct.patch_model(a, target, source), ct.patch_model(b, target, source)
    with one.applied(a), two.applied(b):
        assert error(logits(b, source), two.target_logits) < 2e-5


def test_a_context_may_be_left_by_another_thread():
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    plain, context, seen = logits(model, source), mp.applied(model), []
    worker = threading.Thread(target=context.__enter__)
    worker.start()
    worker.join()
    assert error(logits(model, source), mp.target_logits) < 2e-5
    waiting = threading.Thread(target=lambda: seen.append(ct.patch_model(model, target, source)), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert not seen and waiting.is_alive(), "the model is in use"
    context.__exit__(None, None, None)
    waiting.join(60)
    assert len(seen) == 1 and carried(model) == ()
    assert torch.equal(logits(model, source), plain)
    with mp.applied(model):
        pass


def test_weights_for_a_while_may_be_taken_out_by_another_thread():
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    plain, context = logits(model, source), mp.applied(model, as_weights=True)
    threads = [
        threading.Thread(target=context.__enter__),
        threading.Thread(target=context.__exit__, args=(None, None, None), daemon=True),
    ]
    for thread in threads:
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert torch.equal(logits(model, source), plain) and carried(model) == ()
