"""What ``recheck`` lets through to Coq, and what of Coq's answers counts: files from elsewhere, another coqc, exit status 0."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test_kernel import SMALL, needs_coq

import controllability as ct
from controllability.cli.main import main
from controllability.rocq import check as kernel
from controllability.rocq.vocabulary import check_vocabulary


def altered(text: str, what: str) -> str:
    """A certificate with something in it that certificates do not have."""
    before, end = text.split("End certificate.")
    inside = {
        "loads": "Load anything.", "extracts": 'Extraction "f" tree.', "redirects": 'Redirect "f" Print tree.',
        "declares a plug-in": 'Declare ML Module "m".', "assumes": "Axiom a : False.", "parameter": "Parameter a : R.",
        "variable that is a statement": "Variable a : forall r : R, r = 0.", "hypothesis": "Hypothesis a : v = v'.",
        "conjecture": "Conjecture a : True.", "loops": "Fixpoint f (n : nat) : nat := f n.", "tactic": "Ltac f := idtac.",
        "eats memory": "Eval compute in (2 ^ 100).", "big number": f"Definition big := {'9' * 60}.",
        "requires more": "Require Import Extraction.", "notation": "Notation p := tt.", "attribute": "#[bypass_check] Definition p := tt.",
        "options": "Unset Guard Checking.", "text": 'Definition p := "a".', "own name": "Definition apply := tt.",
        "unknown name": "Definition p := nowhere.", "quotes": "(* \" *) Definition p := tt.", "deep": f"Definition p := {'(' * 300}tt{')' * 300}.",
    }  # fmt: skip
    if what == "admits":
        return text.replace("Qed.", "Admitted.", 1)
    if what == "another end":
        return text.replace("Print Assumptions perfect.", "")
    if what == "tactics":
        return text.replace("exact (", "assumption (", 1)
    if what == "another beginning":
        return "Require Import ZArith.\n" + text
    if what == "no theorem":
        return text[: text.index("Theorem perfect")] + "End certificate." + end
    return f"{before}{inside[what]}\nEnd certificate.{end}"


ALTERED = """loads, extracts, redirects, declares a plug-in, assumes, parameter, variable that is a statement, hypothesis, conjecture,
loops, tactic, eats memory, big number, requires more, notation, attribute, options, text, own name, unknown name, quotes, deep,
admits, another end, tactics, another beginning, no theorem""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("what", [one.strip() for one in ALTERED])
def test_nothing_but_certificates_reaches_coq(what, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernel, "_coqc", lambda *given: pytest.fail("Coq was asked"))
    text = ct.prove(SMALL).to_rocq()
    check_vocabulary(text)
    file = tmp_path / "c.v"
    file.write_text(altered(text, what))
    assert main(["recheck", str(file)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2


@needs_coq
def test_a_certificate_is_written_and_rechecked(tmp_path, capsys):
    assert main(["prove", "llama", "--format", "rocq", "--out", str(tmp_path / "p.v")]) == 0
    capsys.readouterr()
    assert main(["recheck", str(tmp_path / "p.v"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], set(found["axioms"])) == ("accepted", set(kernel.AXIOMS))
    assert "Theorem patch" in found["theorem"]
    (tmp_path / "q.v").write_text((tmp_path / "p.v").read_text().replace("(sub goal", "(add goal", 1))
    assert main(["recheck", str(tmp_path / "q.v")]) == 1
    assert "refused" in capsys.readouterr().out
    assert main(["recheck", str(tmp_path / "p.v"), "--level", "exact"]) == 2
    assert main(["recheck", str(tmp_path / "nowhere.v")]) == 2


def fake(folder: Path, says: str) -> None:
    program = folder / "coqc"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("echo 8.4.0 4.02", "certificates need 8.16"),
        ("exit 1", "certificates need 8.16"),
        ('[ "$2" = --print-version ] && echo 8.16.1 4.13 || exit 1', "does not compile the theory"),
    ],
)
def test_another_coqc(says, told, tmp_path, monkeypatch):
    fake(tmp_path, says)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (row,) = ct.prove(SMALL).check("machine")
    assert row["status"] == "skipped"
    assert told in row["method"]
    assert not [*tmp_path.rglob("Theory.vo")]


@needs_coq
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (row,) = ct.prove(SMALL).check("machine")
    assert row["status"] == "skipped"
    assert "XDG_CACHE_HOME" in row["method"]


def done(status: int, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], status, out, err)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "more than"),
        (done(1, err="File x\nError: no\n such thing"), "no such thing"),
        (done(0), "did not say"),
        (done(0, "Axioms:\ncheat : False\n"), "cheat"),
        (
            done(0, "Axioms:\nClassicalDedekindReals.sig_not_dec : x\n  y\nCoq.Logic.Classical_Prop.classic : z\n"),
            "classic",
        ),
    ],
)
def test_exit_status_0_is_not_enough(given, reason):
    verdict = kernel._verdict(given, "Coq", 0.0)
    assert not verdict.accepted
    assert reason in verdict.reason
