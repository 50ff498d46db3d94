"""A level is said in the same words everywhere, and what the code cites is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import controllability as ct
from controllability import checks
from controllability.checks import LEVELS, SAID
from controllability.cli.main import main
from controllability.rules import RULES
from controllability.rules.references import PAPERS, references

ROOT = Path(__file__).parent.parent


def partly(status):
    return [{"rule": "a", "status": "passed", "method": "m"}, {"rule": "whole block", "status": status, "method": "m"}]


@pytest.mark.parametrize("status", ["passed", "skipped", "failed"])
def test_text_html_and_json_say_the_same_of_a_level(capsys, monkeypatch, status):
    monkeypatch.setattr(ct.Proof, "check", lambda self, level: partly(status))
    said = []
    for form in (["--format", "text"], ["--format", "html"], ["--json"]):
        assert main(["prove", "llama", "--level", "exact", *form]) == (status == "failed")
        said.append(capsys.readouterr().out)
    data = json.loads(said[2])
    assert data["level"] == ("exact" if status == "passed" else "derived")
    assert all(data["summary"] in " ".join(text.split()) for text in said[:2])
    assert (SAID["exact"] == data["summary"]) == (status == "passed")
    assert f"patchable ({data['level']})" in said[0]
    for text in said:
        assert "othing was computed" not in text
    if status != "passed":
        assert f"1 passed, 1 {status}" in data["summary"]


def test_a_level_is_reached_when_every_row_passed():
    assert tuple(SAID) == LEVELS
    for level in LEVELS:
        assert checks.reached(level, partly("passed")) == level
        assert checks.reached(level, partly("skipped")) == "derived"


def test_every_citation_of_the_code_resolves():
    theory = (ROOT / "docs" / "theory.md").read_text()
    sections = set(re.findall(r"^## (\d+)\. ", theory, re.M))
    for key in "GDIM":
        assert f"[{key}] " in theory
    for rule in RULES:
        text = f"{rule.source} {rule.when}"
        asked = {*re.findall(r"\[([A-Z])[],]", text), *re.findall(r"theory (\d+)", text)}
        assert {re.sub(r"\W|theory", "", key) for key in references(text)} == asked, rule.name
        assert asked <= {*PAPERS, *sections}
    for path in (*ROOT.glob("controllability/**/*.py"), *ROOT.glob("docs/*.md")):
        text = path.read_text()
        assert set(re.findall(r"theory,? (?:section )?(\d+)", text)) <= sections, path
        assert set(re.findall(r"\[([A-Z]), (?:Thm|App|Def|Alg|section)", text)) <= set("GDIM"), path
    assert not re.search(r"/work|shared/|house/|issues?/", theory)


@pytest.mark.parametrize("form", ["text", "html", "latex", "json"])
def test_every_output_has_its_references(capsys, form):
    assert main(["prove", "gemma3", "--format", form]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\n    ", " ").split())
    assert "arXiv 2511.17864" in shown and "docs/theory.md" in shown
    assert re.search("theory 4.*section 4", shown)
    if form == "json":
        assert set(json.loads(shown)["references"]) == {"[G]", "[D]", "theory 2", "theory 4"}
