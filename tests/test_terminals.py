"""What a terminal shows: the list, tables, spellings without UTF-8, tokens as text, warnings, what was verified."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from catalogued import every_row
from helpers import tiny_gemma

import architectures
import controllability as ct
from controllability.cli import catalogue
from controllability.cli.main import main

CONTEXT, QUERY = "Mia lives in Oslo . Leo lives in Rome .", "Where does Leo live ?"


def in_encoding(monkeypatch, encoding, *arguments):
    """What a command prints on a stdout of this encoding."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main([*arguments]) == 0
    return sys.stdout.buffer.getvalue().decode(encoding)


def test_the_list_has_a_filter_and_a_line_for_each_family_when_piped(capsys):
    def shown(*arguments):
        status = main(["list", *arguments])
        return status, *capsys.readouterr()

    piped = shown()[1].splitlines()
    assert [line.split("\t")[0] for line in piped] == architectures.names()
    assert any("gemma3_text" in line for line in piped)  # model types are found too
    some = [line.split("\t")[0] for line in shown("gpt_neo")[1].splitlines()]
    assert some == ["gpt_neo", "gpt_neox", "gpt_neox_japanese"]
    status, out, err = shown("no-such-family")
    assert (status, out) == (2, "")
    assert "no architecture has 'no-such-family' in its name" in err


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_stay_whole_in_every_table(capsys, monkeypatch, width):
    monkeypatch.setattr(catalogue, "rows", lambda having: every_row())
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["list"]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    words = set(re.findall(r"[\w.-]+", shown))
    assert set(architectures.names()) <= words
    assert max(map(len, shown.splitlines())) <= width
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["prove", "gpt_neox_japanese", "--level", "symbolic"]) == 0
    shown = capsys.readouterr().out
    for rule in ct.prove(architectures.block("gpt_neox_japanese")).rules:
        assert rule in re.findall(r"[\w-]+", shown[shown.index("level symbolic") :])


@pytest.mark.parametrize("arguments", [("prove", "gemma3", "--level", "symbolic"), ("list", "gemma")])
def test_a_terminal_without_utf_8_gets_spellings_not_codes(capsys, monkeypatch, arguments):
    shown = in_encoding(monkeypatch, "ascii", *arguments)
    assert capsys.readouterr().err == ""
    assert shown.isascii() and "\\u" not in shown and "\\x" not in shown
    if arguments[0] == "prove":
        assert "Delta W = delta y^T/||y||^2" in shown and "|- I-before" in shown
        table = [line for line in shown.splitlines() if line.startswith("|") and line.endswith("|")]
        assert len({len(line) for line in table}) == 1  # the borders are in line
        assert "ΔW" in in_encoding(monkeypatch, "utf-8", "prove", "gemma3")


def test_tokens_are_text(capsys, tmp_path):
    """A tokenizer whose pieces begin with Ġ: nowhere in what is said or written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["Mia", "Ġlives", "Ġin", "ĠOslo", "Ġ.", "ĠWhere", "Ġ?", "Ċ", *(f"Ġw{i}" for i in range(52))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "Ġ?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="Ġ?").save_pretrained(tmp_path / "model")
    tiny_gemma(layers=2, vocab=60).save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    capsys.readouterr()
    (tmp_path / "queries").write_text("Mia Where\n")
    for given in (
        ["patch", name, "--context", "Mia lives in Oslo .", "--query", " Where Mia"], ["generate", name, "--prompt", "Mia lives in"],
        ["compile", name, "--context", "Mia lives in Oslo .", "--queries", str(tmp_path / "queries"), "--out", str(tmp_path / "out")],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            if (tmp_path / "out").exists():
                (tmp_path / "out").rename(tmp_path / "before")
            assert main([*given, *more]) == 0
            out, err = capsys.readouterr()
            assert "Ġ" not in json.dumps(json.loads(out), ensure_ascii=False) if more else "Ġ" not in out
            assert err == "" and "Ċ" not in out


def test_other_libraries_are_quiet_and_our_warnings_are_a_line(capsys, monkeypatch):
    import logging
    import warnings

    def noisy(having):
        logging.getLogger("bitsandbytes.backends").warning("kernels are missing")
        warnings.warn("something will change in version 6", FutureWarning, stacklevel=1)
        warnings.warn("fragile,\nthat is", ct.ControllabilityWarning, stacklevel=1)
        return []

    monkeypatch.setattr(catalogue, "rows", noisy)
    assert main(["list", "--json"]) == 0
    assert capsys.readouterr().err == "controllability: fragile, that is\n"


def test_verified_is_said_of_what_was(capsys, tmp_path):
    """A fit that was written and read again is the compiled model, and no more."""
    (tmp_path / "queries").write_text(f"{QUERY}\nWhere does Mia live ?\n")
    given = ["compile", "embedded", "--context", CONTEXT, "--queries", str(tmp_path / "queries")]
    assert main([*given, "--ridge", "0.1", "--out", str(tmp_path / "fit")]) == 0
    fit = capsys.readouterr().out
    assert "not exact" in fit and "verified to be the compiled model, no more" in fit
    assert main([*given, "--strength", "exact", "--out", str(tmp_path / "exact")]) == 0
    assert "verified: the patch, read from its files, has a largest logit error of" in capsys.readouterr().out
