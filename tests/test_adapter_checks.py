"""Adapters of mixed ranks, and what a failed check of an adapter says."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import error, runs, tiny_gemma

import controllability as ct
from controllability.models.files import peft_export
from controllability.models.files.peft_export import check_adapter


def test_adapters_of_mixed_ranks_are_right_for_loaders_that_know_one_rank(gemma, tmp_path):
    from safetensors.torch import load_file

    mp = ct.patch_model(gemma, *runs(context=9, query=3), scope="all")
    small = next(e for e in mp.entries if e.param.name.endswith("up_proj.weight"))
    less = type(small.delta)(small.delta.left[:1], small.delta.right[:1])
    mp.entries = tuple(type(e)(e.param, less, e.layer) if e is small else e for e in mp.entries)
    done = mp.export_peft(tmp_path / "adapter", gemma)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["r"] == config["lora_alpha"] == done.rank == 3
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for entry in mp.entries:
        key = f"base_model.model.{entry.module}"
        if f"{key}.lora_A.weight" not in held:
            continue
        a, b = held[f"{key}.lora_A.weight"], held[f"{key}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == config["r"]
        plain = config["lora_alpha"] / config["r"] * (b @ a)  # what a loader without patterns adds
        assert error(plain, entry.delta.dense().reshape(plain.shape)) < 1e-6
    back = ct.import_peft(tmp_path / "adapter", gemma)
    ranks = {str(e.param): e.delta.left.shape[-2] for e in back.entries if hasattr(e.delta, "left")}
    assert ranks[str(small.param)] == 1 and max(ranks.values()) == 3  # what only fills up is no rank


def test_a_failed_check_of_an_adapter_names_the_true_reason(tmp_path, monkeypatch):
    model = tiny_gemma(layers=2)
    mp = ct.patch_model(model, *runs(context=9, query=3), scope="last")
    mp.export_peft(tmp_path / "adapter", model)

    def reason(directory):
        with pytest.raises(ct.NotVerified, match="misses the patched model's") as failed:
            check_adapter(mp, directory, model)
        return str(failed.value)

    from safetensors.torch import load_file, save_file

    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(n for n in held if "1.mlp.down_proj.lora_B" in n)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_bytes(
        (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    )
    save_file(
        held | {name: 1.5 * held[name]}, tmp_path / "other" / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    assert "holds another change of model.layers.1.mlp.down_proj.weight than the patch, off by 0.33" in reason(
        tmp_path / "other"
    )

    def past(self, x):  # reads the weight of a module that PEFT has wrapped
        wrapped = self.up_proj
        inner = getattr(wrapped, "base_layer", wrapped)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, inner.weight))

    mlp = type(model.model.layers[0].mlp)
    plain = mlp.forward
    twin = peft_export.on_twin

    def on_twin(*given):
        adapted = twin(*given)
        monkeypatch.setattr(mlp, "forward", past)
        return adapted

    monkeypatch.setattr(peft_export, "on_twin", on_twin)
    assert "model.layers.0.mlp.up_proj never ran, so its weights are read past" in reason(tmp_path / "adapter")
    monkeypatch.setattr(mlp, "forward", plain)
    monkeypatch.setattr(peft_export, "on_twin", twin)
    monkeypatch.setattr(peft_export, "VERIFIED", type("Strict", (), {"of": lambda *_: 1e-12})())
    assert "the file holds another change" in reason(
        tmp_path / "adapter"
    ) or "what is left is how PEFT rounds" in reason(tmp_path / "adapter")
