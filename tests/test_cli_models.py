"""Commands and models: the family that a config names, patches of other weights, forged patches, models that cannot run."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import PATCH, one_line, status_of

import controllability as ct
from controllability.models.loading import embedded_directory


def test_prove_finds_the_family_of_a_model(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    for name, family in (
        ("embedded", "gemma3"), (embedded_directory(), "gemma3"), (embedded_directory() / "config.json", "gemma3"),
        (tmp_path, "mixtral"), (tmp_path / "config.json", "mixtral"),
    ):  # fmt: skip
        assert status_of("prove", name, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert status_of("prove", family, "--json") == 0
        assert found == json.loads(capsys.readouterr().out)
        assert found["name"] == family


@pytest.mark.parametrize(("config", "status", "reason"), [
    ('{"model_type": "nonsense"}', 2, "unknown architecture"),
    ("{}", 2, "names no model_type"), ("[]", 2, "names no model_type"), ('{"model_type": 3}', 2, "names no model_type"),
    ("{", 2, "corrupt or truncated"), ("[" * 100_000, 2, "corrupt or truncated"), (None, 2, "config.json is missing"),
])  # fmt: skip
def test_prove_of_a_directory_that_is_no_patchable_model(capsys, tmp_path, config, status, reason):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert status_of("prove", tmp_path) == status
    err = " ".join(capsys.readouterr().err.split())
    assert reason in err
    assert "internal error" not in err


def test_prove_finds_the_family_of_a_gguf_file(capsys, tmp_path):
    pytest.importorskip("gguf")
    from gguf import GGUFWriter

    for name, family in (("llama", "llama"), ("qwen3moe", "qwen3_moe"), ("nonsense", None)):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert status_of("prove", tmp_path / f"{name}.gguf", "--json") == (0 if family else 2)
        shown = capsys.readouterr()
        assert (json.loads(shown.out)["name"] == family) if family else ("'nonsense'" in shown.err)


def other_model(directory, vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(directory)
    for path in embedded_directory().glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("vocabulary", [8, 500])
def test_verify_and_export_with_another_model(capsys, tmp_path, saved_patch, vocabulary):
    model = other_model(tmp_path / "other", vocabulary)
    assert status_of("verify", model, saved_patch) == 2
    one_line(capsys.readouterr().err, "made for other weights")
    assert status_of("export", saved_patch, "--model", model, "--out", tmp_path / "adapter") == 2
    one_line(capsys.readouterr().err, "made for other weights")
    assert not (tmp_path / "adapter").exists()


def forged(saved_patch, directory, change):
    """The saved patch with its tensors changed and the checksums made to fit."""
    import hashlib

    from safetensors.torch import load_file, save_file

    from controllability.models.files.patch_files import _digest

    shutil.copytree(saved_patch, directory)
    tensors = load_file(directory / "patch.safetensors")
    change(tensors)
    save_file(tensors, directory / "patch.safetensors")
    described = json.loads((directory / "patch.json").read_text())
    described.pop("sha256")
    described["tensors_sha256"] = hashlib.sha256((directory / "patch.safetensors").read_bytes()).hexdigest()
    (directory / "patch.json").write_text(json.dumps(described | {"sha256": _digest(described)}))
    return directory


FORGED = {
    "a token that the model does not know": lambda t: t["target::input_ids"].fill_(10**6),
    "rows beyond the text": lambda t: t["rows.position"].add_(100),
    "a factor of another width": lambda t: t.update(
        {k: v[..., :3].clone() for k, v in t.items() if k.endswith("left")}
    ),
    "no source": lambda t: t.pop("source::input_ids"),
    "factors of tokens that are not there": lambda t: t.update(
        {k: v.repeat(7, *[1] * (v.ndim - 1)) for k, v in t.items() if k.endswith(("left", "right", "shift"))}
    ),
    "a factor with an axis too many": lambda t: t.update({k: v[None] for k, v in t.items() if k.endswith("left")}),
    "a factor that is no number": lambda t: [v.fill_(float("nan")) for k, v in t.items() if k.endswith("right")],
    "factors of whole numbers": lambda t: t.update({k: v.long() for k, v in t.items() if k.endswith("right")}),
    "positions that are no integers": lambda t: t.update({"rows.position": t["rows.position"].float()}),
    "tokens below 0": lambda t: t["source::input_ids"].fill_(-3),
    "tokens that are no integers": lambda t: t.update({"source::input_ids": t["source::input_ids"].float()}),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_patch_is_damaged_and_no_internal_error(capsys, tmp_path, saved_patch, how):
    patch = forged(saved_patch, tmp_path / "forged", FORGED[how])
    with pytest.raises((ct.PatchError, ct.BadInput)):  # of ours, as soon as the model is known
        ct.load_patch(patch).merge(ct.load_model("embedded")[0])
    assert status_of("verify", "embedded", patch) == 2
    one_line(capsys.readouterr().err)
    assert status_of("export", patch, "--model", "embedded", "--out", tmp_path / "out") in (0, 2)
    assert "internal error" not in capsys.readouterr().err


REPORTS = {
    "a margin that is a number": lambda r: r["layers"][0]["margins"].__setitem__(0, 3),
    "a change that is a word": lambda r: r["layers"][0]["relative_changes"].update(
        dict.fromkeys(r["layers"][0]["relative_changes"], "x")
    ),
    "a route that is none": lambda r: r["layers"][0].update(route=True),
    "too few tokens": lambda r: r["layers"][0]["tokens"].update(margins=[[]]),
    "an amplification in parts": lambda r: r["layers"][0].update(amplification={"a": 1}),
}


@pytest.mark.parametrize("how", REPORTS)
def test_a_report_that_cannot_be_shown_is_damaged(tmp_path, saved_patch, how):
    from controllability.models.files.patch_files import _digest

    shutil.copytree(saved_patch, tmp_path / "forged")
    described = json.loads((tmp_path / "forged" / "patch.json").read_text())
    described.pop("sha256")
    REPORTS[how](described["report"])
    (tmp_path / "forged" / "patch.json").write_text(json.dumps(described | {"sha256": _digest(described)}))
    with pytest.raises(ct.PatchError, match="is corrupt"):
        ct.load_patch(tmp_path / "forged")


def test_a_model_that_cannot_run_is_no_internal_error(capsys, monkeypatch):
    def broken(*_, **__):
        import torch

        return torch.nn.functional.embedding(torch.tensor([9]), torch.ones(2, 2))

    monkeypatch.setattr("controllability.cli.patch.patch_model", broken)
    assert status_of(*PATCH) == 2
    one_line(capsys.readouterr().err, "torch cannot run this: IndexError")
    monkeypatch.setattr("controllability.cli.patch.patch_model", lambda *_, **__: (_ for _ in ()).throw(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")))  # fmt: skip
    assert status_of(*PATCH) == 2
    one_line(capsys.readouterr().err, "not enough memory")
