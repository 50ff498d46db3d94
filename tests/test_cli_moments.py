"""``controllability moments``: made once, gone on with after an interrupt, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from commands import one_line, outcome, status_of

import controllability as ct
from controllability.cli.output import Output
from controllability.compiling.unrelated_texts import ordinary_moments
from controllability.models.loading import load_model

CONTEXT = "Mia lives in Oslo . Leo lives in Rome . Ana lives in Paris ."
WORDS = ["Mia", "Leo", "Ana", "Tom", "Eva"], ["Oslo", "Rome", "Paris"]
LINES = "\n\n".join(f"{name} lives in {city} ." for name in WORDS[0] for city in WORDS[1]) * 30


def test_it_is_made_once_and_read_by_compile(capsys, tmp_path):
    file = tmp_path / "moments.safetensors"
    status, data, _, err = outcome(capsys, "moments", "embedded", "--out", file, "--json")
    assert (status, err) == (0, "") and data["tokens"] > 10_000 and data["matrices"] == 9
    model, tokenizer = load_model("embedded")
    found = ct.load_moments(file, model)
    conditions = found.condition.values()
    assert data["condition"] == pytest.approx([min(conditions), max(conditions)])
    assert found.tokens == ordinary_moments(model, tokenizer, 256, lambda *_: None).tokens
    before = file.read_bytes()
    assert status_of("moments", "embedded", "--out", file) == 0
    assert "condition numbers" in capsys.readouterr().out and file.read_bytes() == before
    (tmp_path / "q").write_text("Where does Mia live ?")
    given = ["compile", "embedded", "--context", CONTEXT, "--queries", tmp_path / "q"]
    assert status_of(*given, "--out", tmp_path / "a", "--moments", file) == 0
    once = "controllability moments embedded --out FILE makes them once"
    assert once not in capsys.readouterr().out
    assert status_of(*given, "--out", tmp_path / "b") == 0
    assert once in capsys.readouterr().out


def test_an_interrupted_command_goes_on(capsys, tmp_path, monkeypatch):
    (tmp_path / "texts").write_text(LINES)
    whole, file = tmp_path / "whole", tmp_path / "file"
    given = ["moments", "embedded", "--texts", tmp_path / "texts", "--out"]
    assert status_of(*given, whole) == 0

    class Stopping:
        def __enter__(self):
            return self.report

        def __exit__(self, *_):
            pass

        def report(self, stage, done, total):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Output, "progress", lambda self: Stopping())
        assert status_of(*given, file) == 130
    assert "holds what was read so far: the same command goes on" in capsys.readouterr().err
    (tmp_path / "q").write_text("Where does Mia live ?")
    compiling = ["compile", "embedded", "--context", CONTEXT, "--queries", tmp_path / "q", "--out", tmp_path / "c"]
    assert status_of(*compiling, "--moments", file) == 2
    one_line(capsys.readouterr().err, "are unfinished", "the same texts and file")
    assert status_of(*given, file) == 0
    model = load_model("embedded")[0]
    one, other = ct.load_moments(file, model), ct.load_moments(whole, model)
    assert all(torch.equal(m.second, other.metrics[name].second) for name, m in one.metrics.items())


def test_what_is_refused(capsys, tmp_path):
    (tmp_path / "texts").write_text(f"Tom lives in Lima .\n{CONTEXT}\n")
    (tmp_path / "few").write_text("Tom lives in Lima .\n")
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "context").write_text(CONTEXT)
    file = tmp_path / "out"
    given = ["moments", "embedded", "--out", file]
    for options, message in (
        (["--texts", tmp_path / "none"], "cannot read the texts"),
        (["--texts", tmp_path / "empty"], "write one text a line"),
        (["--texts", "-", "--context-file", "-"], "named twice"),
        (["--texts", tmp_path / "texts", "--context-file", tmp_path / "context"], "text 2 has 8 words in a row"),
    ):
        assert status_of(*given, *options) == 2
        one_line(capsys.readouterr().err, message)
        assert not file.exists()
    for out, message in ((" ", "--out is empty"), (tmp_path / "few", "corrupt"), (tmp_path, "a directory")):
        assert status_of("moments", "embedded", "--out", out, "--texts", tmp_path / "few") == 2
        one_line(capsys.readouterr().err, message)
    assert status_of(*given, "--texts", tmp_path / "few") == 0
    assert "second moments of 6 tokens" in capsys.readouterr().err
