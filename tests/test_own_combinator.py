"""A combinator and a rule from outside: proved, checked, drawn, written and read, and refused where they are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

import controllability as ct
from controllability.arrays import arithmetic
from controllability.components import Activation, Linear, residual
from controllability.interfaces import Combinator, Component, Param
from controllability.rendering.html import proof_html
from controllability.rules import Attempt, Rule, Step, construct, register, unregister
from controllability.rules.base import disturbs
from controllability.rules.schema import Assumed, schema


def half(x, index):
    middle = x.shape[-1] // 2
    return x[..., middle:] if index else x[..., :middle]


@dataclass(frozen=True)
class Halves(Combinator):
    """(f(x₁), g(x₂))."""

    first: Component
    second: Component

    def children(self):
        return (self.first, self.second)

    def child_input(self, index, x, output):
        return half(x, index)

    def assemble(self, params, output):
        return arithmetic(output(0)).concatenate([output(0), output(1)], -1)

    def describe(self):
        return f"halves ({self.first.describe()} | {self.second.describe()})"

    @property
    def width(self):
        return f"2{self.first.width}"

    def output_width(self, width):
        return width


class HalvesRule(Rule):
    """Each part takes its half of the target."""

    about, side, name = Halves, "through", "T-halves"
    statement = when = patch = source = "each part takes its half"

    def derive(self, place, prover):
        found, (f, g) = Attempt(), place.parts()
        for steps in product(*(prover.attempt(part, self.side).steps for part in (f, g))):
            if not disturbs(steps[0].moved, g) + disturbs(steps[1].moved, f):
                found.steps.append(Step(self, place, steps, steps[0].moved | steps[1].moved))
        return found

    def schema(self, step):
        return schema(Halves(Assumed("f", side=self.side), Assumed("g", side=self.side)), (0,), (1,))

    def construct(self, step, run, wanted):
        for i, premise in enumerate(step.premises):
            construct(premise, run, lambda i=i: half(wanted(), i))


class WrongRule(HalvesRule):
    """Both parts are asked for the first half."""

    def construct(self, step, run, wanted):
        for premise in step.premises:
            construct(premise, run, lambda: half(wanted(), 0))


def plain(name):
    return Linear(Param(f"{name}.up", ("l", "h"))) >> Activation("silu") >> Linear(Param(f"{name}.down", ("h", "l")))


BLOCK = residual(Halves(plain("low"), plain("high")))


@pytest.fixture
def rule():
    added = register(HalvesRule())
    yield added
    unregister(added)


def test_it_computes_what_its_parts_say():
    params, v, _ = ct.sample(BLOCK)
    low, high = plain("low")(params, half(v, 0)), plain("high")(params, half(v, 1))
    assert np.array_equal(BLOCK(params, v), v + np.concatenate([low, high]))


def test_without_its_rule_it_is_refused_by_name():
    with pytest.raises(ct.NotControllable) as refused:
        ct.prove(BLOCK)
    assert "halves" in refused.value.culprit or "linear" in refused.value.culprit


def test_with_its_rule_it_is_proved_checked_and_patched(rule):
    proof = ct.prove(BLOCK)
    assert "T-halves" in proof.rules
    for level in ("symbolic", "exact", "numeric"):
        assert {row["status"] for row in proof.check(level)} == {"passed"}
    params, v, v_target = ct.sample(BLOCK, tokens=(3,))
    patch = proof.construct(params, v, v_target)
    assert ct.verify(BLOCK, params, patch, v, v_target).residual < 1e-12
    assert np.abs(BLOCK(params, v) - BLOCK(params, v_target)).max() > 0.1


def test_it_is_drawn_written_and_read(rule):
    proof = ct.prove(BLOCK)
    assert "T-halves" in proof_html(proof, "halves") and "T-halves" in str(proof) and "T-halves" in proof.to_latex()
    assert ct.Proof.from_dict(proof.to_dict(), components=[Halves]).rules == proof.rules
    with pytest.raises(ct.BadInput):
        ct.Proof.from_dict(proof.to_dict())


def test_a_wrong_rule_fails_its_check_and_the_block():
    wrong = register(WrongRule())
    try:
        failed = {row["rule"] for row in ct.prove(BLOCK).check("symbolic") if row["status"] == "failed"}
    finally:
        unregister(wrong)
    assert failed == {"T-halves", "whole block"}


def test_what_cannot_be_registered(rule):
    with pytest.raises(ct.BadInput, match=r"T-halves .through side. is registered already"):
        register(HalvesRule())
    nameless = HalvesRule()
    nameless.when = ""
    nameless.name = "T-other"
    with pytest.raises(ct.BadInput, match="the rule T-other has no when"):
        register(nameless)
    with pytest.raises(ct.BadInput, match="takes a rule"):
        register(HalvesRule)
    with pytest.raises(ct.BadInput, match="is not registered"):
        unregister(nameless)


def test_a_part_is_exchanged_without_a_word_of_the_combinator():
    changed = BLOCK.map_children(lambda i, part: part if i == 0 else part.map_children(lambda j, p: plain(f"new{j}")))
    assert {p.name for p in changed.parameters()} == {"new0.up", "new0.down", "new1.up", "new1.down"}


def test_a_part_that_reads_itself_or_a_later_one_is_refused():
    class Looped(Halves):
        def source_of(self, index):
            return index

    with pytest.raises(ct.BadInput, match="part 0 reads part 0; a part can read only one before it"):
        ct.prove(residual(Looped(plain("low"), plain("high"))))
