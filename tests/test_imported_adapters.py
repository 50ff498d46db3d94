"""LoRA adapters as patches: what peft itself made and saved is applied, merged and saved, or refused by its reason."""

from __future__ import annotations

import json

import pytest
import torch
from family_models import build, inputs, logits_of
from helpers import error, runs, snapshot, tiny_gemma, unchanged
from safetensors.torch import load_file, save_file
from test_adapters import patched, quiet  # noqa: F401 (a fixture for every test)

import controllability as ct

peft = pytest.importorskip("peft")


def foreign(model, directory, **options):
    """An adapter that peft itself made and saved, every factor random; its own output function."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "init_lora_weights": False} | options))
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(str(directory))
    return adapted


ORDINARY = {
    "rank 3": ("llama", {"target_modules": ["up_proj", "down_proj"]}),
    "rank stabilised": ("llama", {"target_modules": ["up_proj", "gate_proj"], "use_rslora": True}),
    "ranks by pattern": ("llama", {"target_modules": ["up_proj", "down_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"0.mlp.up_proj": 7}}),
    "one layer": ("gemma3_text", {"target_modules": r".*layers\.1\.mlp\.up_proj"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_fc"]}),
    "experts, router": ("mixtral", {"target_parameters": ["gate_up_proj", "down_proj", "mlp.gate.weight"], "target_modules": []}),
    "scales": ("gemma3_text", {"target_modules": ["up_proj"], "modules_to_save": ["post_feedforward_layernorm"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDINARY)
def test_anybodys_feed_forward_lora_is_a_patch(case, tmp_path):
    name, options = ORDINARY[case]
    model = build(name, torch.float32)
    source = inputs(name, model, batch=1)[1]
    plain = logits_of(model, source)
    adapted = foreign(build(name, torch.float32), tmp_path / "adapter", **options)
    if case == "scales":  # as after training
        for path, value in adapted.named_parameters():
            value += 0.1 * torch.randn_like(value) if "modules_to_save" in path else 0
        adapted.save_pretrained(str(tmp_path / "adapter"))
    wanted = logits_of(adapted, source)
    mp = ct.import_peft(tmp_path / "adapter", model)
    with mp.applied(model):
        assert error(logits_of(model, source), wanted) < 1e-5 < 1e-3 < error(plain, wanted)
    before = snapshot(model)
    mp.merge(model)
    assert error(logits_of(model, source), wanted) < 1e-5
    mp.unmerge(model)
    assert unchanged(model, before)
    mp.save(tmp_path / "patch")
    with ct.load_patch(tmp_path / "patch").applied(model):
        assert error(logits_of(model, source), wanted) < 1e-5
    again = mp.export_peft(tmp_path / "again")
    assert (again.verified, again.check.note) == (True, "compared on random tokens")


NO_PATCH = {
    "attention": ({"target_modules": ["q_proj"]}, r"changes model.layers.0.self_attn.q_proj.weight.*feed-forward halves only"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "neither lora_A, lora_B nor"),
    "dora": ({"target_modules": ["up_proj"], "use_dora": True, "init_lora_weights": True}, "uses use_dora=True"),
    "biases": ({"target_modules": ["up_proj"], "bias": "all"}, "trains biases"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_PATCH)
def test_adapters_that_are_no_patch_are_refused(case, tmp_path):
    options, reason = NO_PATCH[case]
    foreign(build("llama", torch.float32), tmp_path / "adapter", **options)
    model = build("llama", torch.float32)
    before = snapshot(model)
    with pytest.raises(ct.PatchError, match=reason):
        ct.import_peft(tmp_path / "adapter", model)
    assert unchanged(model, before)


def test_another_method_is_refused(tmp_path):
    config = peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"])
    peft.get_peft_model(build("llama", torch.float32), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ct.PatchError, match="is a IA3: only LoRA"):
        ct.import_peft(tmp_path / "adapter", build("llama", torch.float32))


def edit(directory, how):
    config, tensors = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    held = load_file(tensors)
    first = next(key for key in held if "lora_B" in key)
    if how == "no config":
        config.unlink()
    elif how == "truncated config":
        config.write_text(config.read_text()[:40])
    elif how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif how == "pickled":
        torch.save(held, directory / "adapter_model.bin")
        tensors.unlink()
    elif how == "pissa":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    elif how == "unknown field":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"twist": 2}))
    elif how == "lora_B missing":
        save_file({k: v for k, v in held.items() if k != first}, tensors)
    elif how == "other shape":
        save_file(held | {first: held[first][1:].contiguous()}, tensors)
    elif how == "unknown module":
        save_file({k.replace("mlp", "ffn"): v for k, v in held.items()}, tensors)
    elif how == "not a number":
        save_file(held | {first: held[first] / 0}, tensors)
    elif how == "odd alpha":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": "much"}))
    elif how == "odd pattern":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {"(": 2}}))
    elif how == "empty":
        save_file({}, tensors)


EDITS = {
    "no config": "is not a PEFT adapter", "truncated config": "corrupt or truncated", "truncated tensors": "corrupt or truncated",
    "pickled": "pickled weights are not loaded", "pissa": "started with pissa, which changes the base weights",
    "unknown field": "uses twist=2", "lora_B missing": "holds only lora_A of model.layers.0.mlp", "other shape": "does not fit model.layers",
    "unknown module": "changes module model.layers.0.ffn", "empty": "changes nothing",
    "not a number": "holds what is no finite number", "odd alpha": "lora_alpha is 'much', which peft", "odd pattern": "alpha_pattern is",
}  # fmt: skip


@pytest.mark.parametrize("how", EDITS)
def test_damaged_adapters_are_refused(how, tmp_path):
    model, mp, _ = patched()
    mp.export_peft(tmp_path / "adapter")
    edit(tmp_path / "adapter", how)
    with pytest.raises(ct.PatchError, match=EDITS[how]):
        ct.import_peft(tmp_path / "adapter", model)


def test_our_adapters_know_their_model(gemma, tmp_path):
    mp = ct.patch_model(gemma, *runs(context=9, query=4), scope="last")
    mp.export_peft(tmp_path / "adapter")
    with pytest.raises(ct.PatchError, match="exported for other weights"):
        ct.import_peft(tmp_path / "adapter", tiny_gemma(seed=1))
    with pytest.raises(ct.PatchError, match=r"it is a PEFT adapter: ct.import_peft\(directory, model\)"):
        ct.load_patch(tmp_path / "adapter")
    with mp.applied(gemma), pytest.raises(ct.PatchError, match="patches are on the model"):
        ct.import_peft(tmp_path / "adapter", gemma)
