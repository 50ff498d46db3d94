"""Every rule carries its own check; rules that are wrong on purpose fail it."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS

import controllability as ct
from controllability.checks import symbolic_rules as rules


def rows(mutation):
    proof = ct.prove(mutation.block, **dict(mutation.options))
    return {row["rule"]: row for row in rules.rule_checks(proof)}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_rule_fails_its_own_check(name, monkeypatch):
    mutation = MUTATIONS[name]
    before = rows(mutation)
    assert {row["status"] for row in before.values()} == {"passed"}, before
    monkeypatch.setattr(mutation.target, mutation.attribute, mutation.wrong)
    assert rows(mutation)[mutation.rule]["status"] == "failed"


def test_there_are_enough_of_them():
    assert len(MUTATIONS) >= 30
