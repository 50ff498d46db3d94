"""``controllability recheck``: a written proof as a script holds it against the rules."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from commands import status_of
from jsonschema import Draft202012Validator
from proof_schema import SCHEMA

import controllability as ct


def run(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    return status_of(*arguments), *capsys.readouterr()


@pytest.fixture
def written(capsys, tmp_path):
    status, out, _ = run(capsys, "prove", "gemma3", "--format", "json")
    assert status == 0
    path = tmp_path / "p.json"
    path.write_text(out)
    return path


def test_recheck(capsys, written):
    status, out, err = run(capsys, "recheck", written, "--level", "numeric", "--json")
    data = json.loads(out)
    assert (status, err) == (0, "")
    assert (data["name"], data["verdict"], data["level"]) == ("gemma3", "patchable", "numeric")
    assert [c["status"] for c in data["checks"]] == ["passed"]
    assert data["nodes"] >= 8
    status, out, _ = run(capsys, "recheck", written)
    assert status == 0
    assert f"gemma3: each of the {data['nodes']} nodes follows from its premises" in out
    assert "theorem-1" in out
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(json.loads(written.read_text()))


def test_recheck_of_a_wrong_proof(capsys, written):
    written.write_text(written.read_text().replace('"moved": [', '"moved": ["a", ', 1))
    status, out, err = run(capsys, "recheck", written, "--json")
    data = json.loads(out)
    assert status == 1
    assert (data["verdict"], data["name"]) == ("wrong", "gemma3")
    assert data["reason"] in err
    assert re.match(r"controllability: tree \(theorem-1 at .*\): moved is \['a', [^\n]*\n$", err)
    assert run(capsys, "recheck", written)[:2] == (1, "")


def test_recheck_of_a_level_that_fails(capsys, written, monkeypatch):
    monkeypatch.setattr(
        ct.Proof,
        "check",
        lambda self, level, seed=0: [{"rule": "whole block", "status": "failed", "method": "made up"}],
    )
    status, out, _ = run(capsys, "recheck", written, "--level", "numeric", "--json")
    assert status == 1
    assert json.loads(out)["level"] == "derived"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected one JSON object, got list"),
        ('{"verdict": "patchable", "verdict": "refused"}', "names a key twice"),
        ('{"cost": NaN}', "NaN is no JSON number"),
        ('{"cost": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff\xfe", "is not UTF-8: byte 0 is 0xff"),
        ("{}", "format: expected, and it is missing"),
        ('{"verdict": "refused", "culprit": "tanh"}', "a refusal holds no proof"),
    ],
)  # fmt: skip
def test_bad_files(capsys, tmp_path, content, said):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = run(capsys, "recheck", path, "--json")
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("controllability: ")
    assert err.count("\n") == 1


def test_files_that_are_none(capsys, tmp_path, monkeypatch):
    for path, said in (
        (tmp_path, "not a file"),
        ("/dev/null", "not a file"),
        (tmp_path / "x" / "p.json", "no such file"),
    ):
        status, _, err = run(capsys, "recheck", path)
        assert status == 2
        assert said in err
    monkeypatch.setattr("controllability.proof_files.read.LARGEST", 0)
    (tmp_path / "p.json").write_text("{}")
    assert "larger than 0 MiB" in run(capsys, "recheck", tmp_path / "p.json")[2]


def test_help(capsys):
    status, out, _ = run(capsys, "recheck", "--help")
    assert status == 0
    assert "controllability recheck p.json --level numeric" in out
