"""The commands as a script calls them: JSON on stdout, one line on stderr, the exit status."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import one_line, outcome
from helpers import tiny_gemma

from controllability.cli.main import main

CONTEXT, QUERY = "Mia lives in Oslo . Leo lives in Rome .", "Where does Mia live ?"


def run(capsys, *arguments):
    """(exit status, JSON or None, stderr)."""
    status, data, _, err = outcome(capsys, *arguments)
    return status, data, err


def patch_arguments(model, *more):
    return ("patch", model, "--context", CONTEXT, "--query", QUERY, "--json", *more)


def test_patch_and_verify(capsys, saved_gemma, tmp_path):
    out = tmp_path / "patch"
    status, data, err = run(capsys, *patch_arguments(saved_gemma, "--out", out))
    assert (status, err) == (0, "")
    assert data["max_logit_error"] < 1e-4 < 0.1 < data["max_logit_error_unpatched"]
    assert data["relative_error"] < 5e-6
    assert data["top1_target"] == data["top1_patched"]
    assert data["kl"] < 1e-9
    assert data["out"] == str(out)
    assert [layer["index"] for layer in data["layers"]] == [0, 1]
    assert {"index", "residual", "margins", "relative_changes", "route"} <= set(data["layers"][0])
    assert sorted(p.name for p in out.iterdir()) == ["patch.json", "patch.safetensors"]
    status, checked, _ = run(capsys, "verify", saved_gemma, out, "--json")
    assert status == 0
    assert checked["valid"] is True
    assert checked["max_logit_error"] == data["max_logit_error"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("scope", ["each", "last"])
def test_dtypes_and_scopes(capsys, saved_gemma, tmp_path, dtype, scope):
    out = tmp_path / "patch"
    status, data, _ = run(capsys, *patch_arguments(saved_gemma, "--dtype", dtype, "--scope", scope, "--out", out))
    assert status == 0
    assert data["relative_error"] < {"float64": 1e-12, "bfloat16": 0.02, "float16": 0.005}[dtype]
    status, checked, _ = run(capsys, "verify", saved_gemma, out, "--json")
    assert status == 0
    assert checked["relative_error"] == data["relative_error"]


@pytest.mark.parametrize(
    "option", [("--via", "output"), ("--route", "scale"), ("--route", "secular"), ("--positions", "reset")]
)
def test_options(capsys, saved_gemma, option):
    status, data, _ = run(capsys, *patch_arguments(saved_gemma, *option))
    assert status == 0
    assert data["relative_error"] < 1e-5
    if option[0] == "--route":
        assert {layer["route"] for layer in data["layers"]} == {option[1]}


def test_tables_for_people(capsys, saved_gemma):
    assert main(["patch", str(saved_gemma), "--context", CONTEXT, "--query", QUERY]) == 0
    shown = capsys.readouterr().out
    for words in (
        "residual",
        "next word",
        "patched:",
        "the dense ΔW would hold",
        "verified",
        "checked numerically in float32",
    ):
        assert words in shown
    assert main(["list", "gemma"]) == 0
    assert "gemma3" in capsys.readouterr().out


def test_list(capsys):
    status, data, _ = run(capsys, "list", "--json")
    assert status == 0
    entry = next(a for a in data["architectures"] if a["name"] == "gemma3")
    assert entry["model_types"] == ["gemma3", "gemma3_text"]
    assert entry["verdict"] == "patchable"
    assert "theorem-1" in entry["rules"]


@pytest.mark.parametrize("level", ["derived", "symbolic", "exact", "numeric"])
def test_prove_levels(capsys, level):
    status, data, _ = run(capsys, "prove", "gemma3_text", "--level", level, "--json")
    assert status == 0
    assert (data["verdict"], data["level"]) == ("patchable", level)
    assert data["tree"]["rule"] == "theorem-1"
    assert all(c["status"] == "passed" for c in data["checks"])
    assert data["conditions"]
    assert {"statement", "where"} == set(data["conditions"][0])


@pytest.mark.parametrize("form", ["text", "latex", "html", "json"])
def test_prove_formats(capsys, form):
    assert main(["prove", "gemma3", "--format", form]) == 0
    shown = capsys.readouterr().out
    start = {
        "text": "patchable (derived), via input-output (Theorem 1)",
        "latex": r"\documentclass",
        "html": "<!doctype html>",
        "json": "{",
    }[form]
    assert shown.startswith(start)
    if form == "text":
        assert max(map(len, shown.splitlines())) <= 100


def test_demo(capsys, tmp_path):
    status, data, _ = run(capsys, "demo", "--json", "--worlds", "2", "--out", tmp_path / "pictures")
    assert status == 0
    assert data["accuracy"]["patched"] == data["accuracy"]["with_context"] == 1.0
    assert data["max_logit_error"] < 1e-4 < 1 < data["max_logit_error_unpatched"]
    assert {"context", "query", "expected", "with_context", "without_context", "patched"} == set(data["queries"][0])
    assert (tmp_path / "pictures" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["demo.png"]


# ------------------------------------------------------------------------------------- bad input


USAGE = {
    "no such command": ("dance",),
    "missing argument": ("patch",),
    "unknown route": ("prove", "gemma3", "--route", "x"),
    "unknown architecture": ("prove", "nonsense", "--json"),
    "no worlds": ("demo", "--worlds", "0"),
    "empty context": ("patch", "{model}", "--context", " ", "--query", QUERY),
    "empty query": ("patch", "{model}", "--context", CONTEXT, "--query", ""),
    "unknown scope": ("patch", "{model}", "--context", CONTEXT, "--query", QUERY, "--scope", "some"),
    "missing directory": ("patch", "{tmp}/none", "--context", CONTEXT, "--query", QUERY),
    "a file": ("patch", "{tmp}/file", "--context", CONTEXT, "--query", QUERY),
    "an empty directory": ("patch", "{tmp}/empty", "--context", CONTEXT, "--query", QUERY),
    "no saved patch": ("verify", "{model}", "{tmp}/empty"),
    "context too long": ("patch", "{model}", "--context", "Mia " * 200, "--query", QUERY),
    "output exists": ("patch", "{model}", "--context", CONTEXT, "--query", QUERY, "--out", "{tmp}/full"),
    "output below a file": ("patch", "{model}", "--context", CONTEXT, "--query", QUERY, "--out", "{tmp}/file/x"),
    "demo output is a file": ("demo", "--out", "{tmp}/file"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_one_clear_line_and_status_2(capsys, saved_gemma, tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    arguments = [a.format(model=saved_gemma, tmp=tmp_path) for a in USAGE[name]]
    status, data, err = run(capsys, *arguments)
    assert (status, data) == (2, None)
    one_line(err)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def damaged(saved, tmp_path, how):
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated config":
        config.write_text(config.read_text()[:50])
    elif how == "another architecture":
        config.write_text(json.dumps({"model_type": "llama", "vocab_size": 60, "hidden_size": 16}))
    elif how == "unknown model type":
        config.write_text(json.dumps({"model_type": "nonsense"}))
    elif how == "other sizes":
        config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    elif how == "more layers":
        text = json.loads(config.read_text())
        text["num_hidden_layers"], text["layer_types"] = 3, ["full_attention"] * 3
        config.write_text(json.dumps(text))
    elif how == "no tokenizer":
        for path in directory.glob("tokenizer*"):
            path.unlink()
    elif how == "nan weights":
        model = tiny_gemma(layers=2, vocab=json.loads(config.read_text())["vocab_size"])
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        model.save_pretrained(directory)
    return directory


DAMAGED = (
    "truncated weights", "no weights", "truncated config", "another architecture", "unknown model type",
    "other sizes", "more layers", "no tokenizer", "nan weights",
)  # fmt: skip


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_models_are_refused(capsys, saved_gemma, tmp_path, how):
    directory = damaged(saved_gemma, tmp_path, how)
    status, data, err = run(capsys, *patch_arguments(directory, "--out", tmp_path / "out"))
    assert (status, data) == (2, None)
    one_line(err)
    assert not (tmp_path / "out").exists()


def test_a_patch_for_other_weights_is_refused(capsys, saved_gemma, tmp_path):
    run(capsys, *patch_arguments(saved_gemma, "--out", tmp_path / "patch"))
    other = tmp_path / "other"
    shutil.copytree(saved_gemma, other)
    tiny_gemma(layers=2, vocab=json.loads((other / "config.json").read_text())["vocab_size"], seed=9).save_pretrained(
        other
    )
    status, data, err = run(capsys, "verify", other, tmp_path / "patch", "--json")
    assert (status, data) == (2, None)
    one_line(err)
    assert "made for other weights" in err


def test_unwritable_output(capsys, saved_gemma, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)  # root, who runs CI, may write anywhere
    status, _, err = run(capsys, *patch_arguments(saved_gemma, "--out", tmp_path / "out"))
    assert status == 2
    one_line(err)
    assert f"cannot write to {tmp_path / 'out'}: Permission denied" in err


def test_pickled_weights_are_not_loaded(capsys, saved_gemma, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(saved_gemma, directory)
    (directory / "model.safetensors").unlink()
    torch.save(tiny_gemma().state_dict(), directory / "pytorch_model.bin")
    status, _, err = run(capsys, *patch_arguments(directory))
    assert status == 2
    assert "pickled weights are not loaded" in err


@pytest.mark.parametrize("arguments", [("--help",), ("list", "gemma", "--json")])
def test_the_installed_command_and_the_module_agree(arguments):
    found = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [str(Path(sys.executable).with_name("controllability")), *arguments],
            [sys.executable, "-m", "controllability", *arguments],
        )
    ]
    assert found[0] == found[1]


def test_help_has_examples(capsys):
    for command in ("demo", "list", "prove", "patch", "verify", "generate", "protocol", "export"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"example:\n  controllability {command}" in capsys.readouterr().out
    assert main([]) == 2
