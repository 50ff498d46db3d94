"""Every rule carries its own check; rules that are wrong on purpose fail it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from mutations import MUTATIONS

import controllability as ct
from controllability.checks import symbolic_rules as rules
from controllability.checks.cache import Cache
from controllability.components import Times


def rows(mutation):
    proof = ct.prove(mutation.block, **dict(mutation.options))
    return {row["rule"]: row for row in rules.rule_checks(proof)}


def first_of_each():
    """Of the mistakes at one construction (what stands before the colon) of one rule the first."""
    found: dict[tuple[str, str], str] = {}
    for name, mutation in MUTATIONS.items():
        found.setdefault((mutation.rule, name.partition(":")[0]), name)
    return set(found.values())


FAST = first_of_each()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MUTATIONS])
def test_a_wrong_rule_fails_its_own_check(name, monkeypatch):
    mutation = MUTATIONS[name]
    before = rows(mutation)
    assert {row["status"] for row in before.values()} == {"passed"}, before
    monkeypatch.setattr(mutation.target, mutation.attribute, mutation.wrong)
    assert rows(mutation)[mutation.rule]["status"] == "failed"


def test_there_are_enough_of_them():
    assert len(MUTATIONS) >= 30
    assert {MUTATIONS[name].rule for name in FAST} == {mutation.rule for mutation in MUTATIONS.values()}


def test_code_that_is_loaded_after_the_first_check_counts_too(monkeypatch):
    """Solvers are imported on first use: one that is changed after that is no longer the one that was checked."""
    memory, answers = Cache(), iter(range(9))

    def ask() -> int:
        return memory.recall("question", Times(2), lambda: next(answers))

    assert ask() == ask() == 0
    later = ModuleType("controllability.solvers.later")
    later.solve = lambda: 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, later.__name__, later)
    assert ask() == ask() == 1
    monkeypatch.setattr(later, "solve", lambda: 2)
    assert ask() == ask() == 2
