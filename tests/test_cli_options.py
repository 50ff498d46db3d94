"""What all commands have in common: --out, --device, texts from files, options that contradict, models by their config."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest
from commands import PATCH, TEXTS, one_line, status_of

import controllability as ct
from controllability.cli.arguments import COMMANDS
from controllability.cli.main import main
from controllability.models.files import folders
from controllability.models.loading import embedded_directory, load_model, on_device

CONTEXT, QUERY = TEXTS[1], TEXTS[3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A patch of the embedded model, of scope "last"."""
    out = tmp_path_factory.mktemp("saved") / "patch"
    assert main([*PATCH, "--scope", "last", "--out", str(out), "--json"]) == 0
    return out


def stdin(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


# ------------------------------------------------------------------------------------------------------------ --version


def test_version(capsys):
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"controllability {ct.__version__}\n"


# ------------------------------------------------------------------------------------------------- --out: before the work


def long_name(tmp_path):
    return tmp_path / ("n" * 300)


UNUSABLE = {
    "the working directory": (lambda tmp: ".", "it is the working directory"),
    "its full name": (lambda tmp: tmp / "here", "it is the working directory"),
    "a full one": (lambda tmp: tmp / "full", "exists already"),
    "a link to a full one": (lambda tmp: tmp / "link", "exists already"),
    "a file": (lambda tmp: tmp / "file", "exists already"),
    "below a file": (lambda tmp: tmp / "file" / "x" / "y", "Not a directory"),
    "a link to itself": (lambda tmp: tmp / "loop", "cannot write to"),
    "a long name": (long_name, "File name too long"),
    "a long name on the way": (lambda tmp: long_name(tmp) / "x", "File name too long"),
    "a file system that takes nothing": (lambda tmp: "/proc/x", "cannot write to /proc/x"),
    "nothing": (lambda tmp: " ", "is empty"),
}


@pytest.mark.parametrize("how", ["patch", "compile", "export", "demo", "list", "verify"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_written_to_is_refused_before_the_work(capsys, tmp_path, monkeypatch, saved, name, how):
    for folder in ("here", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "q").write_text(QUERY)
    monkeypatch.chdir(tmp_path / "here")
    for module in ("patch", "compile", "demo"):
        monkeypatch.setattr(f"controllability.cli.{module}.load_model", lambda *_, **__: pytest.fail("the work began"))
    where, reason = UNUSABLE[name]
    arguments = {
        "patch": PATCH, "compile": ("compile", "embedded", *TEXTS[:2], "--queries", tmp_path / "q"), "demo": ("demo",),
        "export": ("export", saved), "list": ("list",), "verify": ("verify", "embedded", saved),
    }[how]  # fmt: skip
    before = sorted(os.walk(tmp_path))
    assert status_of(*arguments, "--out", where(tmp_path)) == 2
    for_file = how in ("list", "verify") and name in ("the working directory", "its full name")
    one_line(capsys.readouterr().err, "exists already" if for_file else reason)
    assert sorted(os.walk(tmp_path)) == before


def test_a_mounted_volume_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    out, real = tmp_path / "volume", os.replace
    out.mkdir()

    def busy(source, target):  # what the kernel says of a mount; a test that mounts would need rights
        if str(target) == str(out):
            raise OSError(16, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(folders.os, "replace", busy)
    monkeypatch.setattr("controllability.cli.patch.load_model", lambda *_, **__: pytest.fail("the work began"))
    assert status_of(*PATCH, "--out", out) == 2
    one_line(capsys.readouterr().err, "a mounted volume; give a new one in it")
    assert [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("name", ["empty", "link", "dangling", "n" * 250, "ä" * 125, "a/b/c"])
def test_what_can_be_written_to_is(capsys, tmp_path, name):
    out = tmp_path / name
    (tmp_path / "real").mkdir()
    if name == "empty":
        out.mkdir()
    elif name in ("link", "dangling"):
        out.symlink_to(tmp_path / ("real" if name == "link" else "fresh"))
    assert status_of(*PATCH, "--json", "--out", out) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert {p.name for p in out.iterdir()} == {"patch.json", "patch.safetensors"}
    assert out.is_symlink() == (name in ("link", "dangling"))
    assert not [*tmp_path.rglob(".*")]
    assert status_of(*PATCH, "--out", out) == 2  # the same one twice


def test_what_is_printed_goes_to_a_file(capsys, tmp_path):
    out = tmp_path / "a" / "page.html"
    assert status_of("prove", "gemma3", "--format", "html", "--out", out) == 0
    assert capsys.readouterr().out == f"saved to {out}\n"
    assert out.read_text().startswith("<!doctype html>")
    assert status_of("prove", "gemma3", "--format", "html", "--out", out) == 2
    one_line(capsys.readouterr().err, "exists already")
    assert status_of("prove", "mamba", "--json", "--out", tmp_path / "r.json") == 1  # a refusal is a result
    printed = capsys.readouterr().out
    assert json.loads(printed)["verdict"] == "refused"
    assert (tmp_path / "r.json").read_text() == printed
    assert status_of("prove", "nonsense", "--out", tmp_path / "none") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"a", "r.json"}


# ------------------------------------------------------------------------------------------- options that contradict


@pytest.mark.parametrize("arguments", [
    ("list", "--markdown", "--json"), ("prove", "gemma3", "--json", "--format", "html"),
    ("prove", "gemma3", "--json", "--format", "latex"), ("prove", "gemma3", "--json", "--format", "text"),
    (*PATCH, "--context-file", "x"), (*PATCH, "--query-file", "x"), ("export", "p", "--peft", "a", "--out", "b"),
    ("generate", "embedded", "--prompt", "a", "--prompt-file", "b"),
    ("patch", "embedded", "--context", "-", "--query", "-"), ("patch", "embedded", "--context-file", "-", "--query", "-"),
    ("generate", "embedded", "--prompt", "-", "--prompt", "-"),
    ("compile", "embedded", "--context", "-", "--queries", "-", "--out", "o"),
])  # fmt: skip
def test_options_that_contradict(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    stdin(monkeypatch, b"text")
    assert status_of(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    one_line(shown.err)
    assert not [*tmp_path.iterdir()]


def test_json_and_its_format_agree(capsys):
    assert status_of("prove", "gemma3", "--json", "--format", "json") == 0
    both = capsys.readouterr().out
    assert status_of("prove", "gemma3", "--json") == 0
    assert capsys.readouterr().out == both


# -------------------------------------------------------------------------------------- texts from files and from stdin


def result(capsys, *arguments):
    assert status_of(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    return found["top1_target"], found["max_logit_error_unpatched"]


@pytest.mark.parametrize("raw", [b"%s\n", b"\xef\xbb\xbf%s\r\n"])
def test_texts_from_files_are_the_texts(capsys, tmp_path, monkeypatch, raw):
    wanted = result(capsys, *PATCH)
    for name, text in (("c", CONTEXT), ("q", QUERY)):
        (tmp_path / name).write_bytes(raw % text.encode())
    rest = ("patch", "embedded", "--skip-sensitivity")
    files = ("--context-file", tmp_path / "c", "--query-file", tmp_path / "q")
    assert result(capsys, *rest, *files) == wanted
    for option in ("--context", "--context-file"):
        stdin(monkeypatch, raw % CONTEXT.encode())
        assert result(capsys, *rest, option, "-", *files[2:]) == wanted
    stdin(monkeypatch, raw % QUERY.encode())
    assert result(capsys, *rest, *files[:2], "--query-file", "-") == wanted
    stdin(monkeypatch, raw % b"Leo has a cat .")
    assert result(capsys, *rest, "--context-file", "-", *files[2:]) != wanted  # it is read


def test_prompts_queries_and_proofs_from_stdin(capsys, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text(QUERY + "\n")
    stdin(monkeypatch, CONTEXT.encode())
    prompts = ("--prompt-file", "-", "--prompt-file", tmp_path / "q.txt")
    assert status_of("generate", "embedded", *prompts, "--tokens", "1", "--skip-sensitivity", "--json") == 0
    assert [s["prompt"] for s in json.loads(capsys.readouterr().out)["samples"]] == [CONTEXT, QUERY]
    stdin(monkeypatch, f"{QUERY}\n\nWhat does Mia have ?\n".encode())
    assert status_of("compile", "embedded", *TEXTS[:2], "--queries", "-", "--out", tmp_path / "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["queries"]["texts"] == 2
    assert status_of("prove", "gemma3", "--json") == 0
    stdin(monkeypatch, capsys.readouterr().out.encode())
    assert status_of("recheck", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "patchable"


@pytest.mark.parametrize(("file", "reason"), [
    ("none", "No such file"), (".", "Is a directory"), ("/dev/zero", "larger than 64 MiB"), ("/dev/null", "the context is empty"),
])  # fmt: skip
def test_files_that_hold_no_text(capsys, tmp_path, monkeypatch, file, reason):
    monkeypatch.chdir(tmp_path)
    assert status_of("patch", "embedded", "--context-file", file, "--query", QUERY) == 2
    one_line(capsys.readouterr().err, reason)


def test_a_closed_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert status_of("patch", "embedded", "--context", "-", "--query", QUERY) == 2
    one_line(capsys.readouterr().err, "standard input: it is closed")


# ------------------------------------------------------------------------------------------------------------- --device


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there(capsys, tmp_path, monkeypatch, saved, device):
    (tmp_path / "q").write_text(QUERY)
    for arguments in (
        PATCH, ("demo",), ("verify", "embedded", saved), ("generate", "embedded", "--prompt", "Mia"),
        ("export", saved, "--out", tmp_path / "o", "--model", "embedded"),
        ("compile", "embedded", *TEXTS[:2], "--queries", tmp_path / "q", "--out", tmp_path / "o"),
    ):  # fmt: skip
        assert status_of(*arguments, "--device", device) == 2
        one_line(capsys.readouterr().err, f"device {device!r} cannot be used", "cpu always can")
    assert not (tmp_path / "o").exists()


def test_the_device_is_where_model_and_inputs_go(capsys, monkeypatch):
    """There is one device here: what is asked of it is seen, and "cpu:0" is it by another name."""
    import torch

    seen = []
    real = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: seen.append(a) or real(self, *a, **k))
    assert result(capsys, *PATCH, "--device", "cpu:0") == result(capsys, *PATCH)
    assert ("cpu:0",) in seen
    with pytest.raises(ct.BadInput, match="device 'meta' cannot be used"):
        load_model("embedded", device="meta")
    moved = on_device({"input_ids": torch.ones(1, 2), "use_cache": False}, "meta")
    assert (moved["input_ids"].device.type, moved["use_cache"]) == ("meta", False)


# ----------------------------------------------------------------------------------------------- models and their patches


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
    ('{"model_type": "mamba"}', 1, "no feed-forward half"), ('{"model_type": "nonsense"}', 2, "unknown architecture"),
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
def test_verify_and_export_with_another_model(capsys, tmp_path, saved, vocabulary):
    model = other_model(tmp_path / "other", vocabulary)
    assert status_of("verify", model, saved) == 2
    one_line(capsys.readouterr().err, "made for other weights")
    assert status_of("export", saved, "--model", model, "--out", tmp_path / "adapter") == 2
    one_line(capsys.readouterr().err, "made for other weights")
    assert not (tmp_path / "adapter").exists()


def forged(saved, directory, change):
    """The saved patch with its tensors changed and the checksums made to fit."""
    import hashlib

    from safetensors.torch import load_file, save_file

    from controllability.models.files.patch_files import _digest

    shutil.copytree(saved, directory)
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
def test_a_forged_patch_is_damaged_and_no_internal_error(capsys, tmp_path, saved, how):
    patch = forged(saved, tmp_path / "forged", FORGED[how])
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
def test_a_report_that_cannot_be_shown_is_damaged(tmp_path, saved, how):
    from controllability.models.files.patch_files import _digest

    shutil.copytree(saved, tmp_path / "forged")
    described = json.loads((tmp_path / "forged" / "patch.json").read_text())
    described.pop("sha256")
    REPORTS[how](described["report"])
    (tmp_path / "forged" / "patch.json").write_text(json.dumps(described | {"sha256": _digest(described)}))
    with pytest.raises(ct.PatchError, match="is corrupt"):
        ct.load_patch(tmp_path / "forged")


TWICE = [
    ["prove", "llama", "--via", "output", "--via", "output"],
    ["patch", "embedded", "--context", "a", "--context", "b", "--query", "c"],
    ["patch", "embedded", "--context-file", "a", "--context-file", "b", "--query", "c"],
    ["demo", "--seed", "0", "--seed", "0"],
    ["protocol", "embedded", "--dtypes", "float32", "--dtypes", "float64"],
    ["list", "--out", "a", "--out", "b"],
]


@pytest.mark.parametrize("arguments", TWICE, ids=" ".join)
def test_an_option_that_is_given_twice_is_refused(capsys, arguments):
    assert status_of(*arguments) == 2
    one_line(capsys.readouterr().err, "it is given twice, and takes one value")


def test_prompts_and_switches_may_be_given_twice(capsys):
    assert status_of("list", "llama", "--json", "--json") == 0
    assert (
        status_of("generate", "embedded", "--prompt", "Mia", "--prompt", "Leo", "--tokens", "1", "--skip-sensitivity")
        == 0
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


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
