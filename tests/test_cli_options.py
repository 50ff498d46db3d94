"""What all commands have in common: --out, --device, texts from files, options that contradict, models by their config."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from commands import PATCH, TEXTS, one_line, status_of

import controllability as ct
from controllability.cli.arguments import COMMANDS
from controllability.cli.main import main
from controllability.models.files import folders
from controllability.models.loading import load_model, on_device

CONTEXT, QUERY = TEXTS[1], TEXTS[3]


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
def test_what_cannot_be_written_to_is_refused_before_the_work(capsys, tmp_path, monkeypatch, saved_patch, name, how):
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
        "export": ("export", saved_patch), "list": ("list",), "verify": ("verify", "embedded", saved_patch),
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
    assert (
        status_of("prove", "jetmoe", "--place", "mixer", "--json", "--out", tmp_path / "r.json") == 1
    )  # a refusal is a result
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
def test_a_device_that_is_not_there(capsys, tmp_path, monkeypatch, saved_patch, device):
    (tmp_path / "q").write_text(QUERY)
    for arguments in (
        PATCH, ("demo",), ("verify", "embedded", saved_patch), ("generate", "embedded", "--prompt", "Mia"),
        ("export", saved_patch, "--out", tmp_path / "o", "--model", "embedded"),
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
