"""Soundness and, as far as possible, completeness of the prover on random component trees (see ``judging``).

100 trees in the suite, 300 with ``-m slow``; ``python tests/test_random_trees.py 20000 --jobs 2`` runs more (docs/incompleteness.md).
"""

from __future__ import annotations

import argparse
import inspect
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
from helpers import error
from judging import (
    AFFINE,
    AGREES,
    BENT,
    CONDITION,
    DIGITS,
    KINDS,
    TOGETHER,
    WRONG,
    YES,
    Affine,
    counted,
    executed,
    judge,
    outcome,
    table,
    used_twice,
)
from trees import DEEPEST, Case, D, Grower, grown, nodes

import controllability as ct
from controllability import components
from controllability.arrays import ARITHMETICS
from controllability.components import (
    Activation,
    Bias,
    ExpertLinear,
    Fixed,
    Gate,
    Identity,
    Linear,
    Mixture,
    Normalize,
    Routing,
    Scale,
    Times,
    updates,
)
from controllability.interfaces import Component, Param

SEEDS = range(300)


@pytest.mark.parametrize("seeds", [range(100), pytest.param(SEEDS, marks=pytest.mark.slow)], ids=len)
def test_random_trees(capsys, seeds):
    counts = Counter(outcome(seed) for seed in seeds)
    with capsys.disabled():
        print(f"\n{table(counts)}")
    found = Counter(kind for kind, _ in counts.elements())
    assert not found[WRONG], [text for kind, text in counts if kind == WRONG]
    assert found[YES] >= len(seeds) / 3
    assert found[CONDITION] >= len(seeds) / 60
    assert counts[AFFINE, AGREES] >= len(seeds) / 10
    assert found[BENT] >= len(seeds) / 10


def test_every_component_occurs_among_the_300():
    public = {c for _, c in inspect.getmembers(components, inspect.isclass) if issubclass(c, Component)}
    grown_here = {type(part) for seed in SEEDS for _, part in nodes(grown(seed).block)}
    assert public <= grown_here, public - grown_here


def test_the_trees_are_as_promised():
    cases = [grown(seed) for seed in SEEDS]
    assert max(len(path) for case in cases for path, _ in nodes(case.block)) >= DEEPEST
    assert any(used_twice(case, p) for case in cases for p in case.params)
    assert any(p.index for case in cases for p in case.params)
    assert any(not value.any() for case in cases for value in case.values.values())
    assert any(not case.frozen for case in cases)


def caught(seeds: Iterable[int]) -> list[str]:
    return [text for kind, text in map(outcome, seeds) if kind == WRONG]


def test_the_judge_notices_a_wrong_rule(monkeypatch):
    """A mutated construction must not pass: the rank-1 patch with the norm instead of its square."""
    from controllability.deltas import LowRank

    def wrong(x, gap, transposed):
        right = x / ARITHMETICS["mpmath"].sqrt((x * x).sum(-1, keepdims=True))
        return LowRank(gap[..., None, :], right[..., None, :], transposed)

    monkeypatch.setattr(updates, "rank_one_change", wrong)
    assert len(caught(range(40))) >= 5


def test_numbers_that_50_digits_do_not_hold_are_judged_with_more():
    """1 + tanh of a large negative number is 0 with 50 digits, and the patch is refused; the proof is right all the same."""
    case = grown(4631)
    proof = ct.prove(case.block, frozen=case.frozen, **case.options)
    with pytest.raises(ct.NotVerified, match="magnify rounding too much"):
        executed(proof, case, DIGITS)
    assert judge(case)[0] == YES


def test_the_judge_notices_a_missing_rule(monkeypatch):
    """A prover that no longer knows that a bias reaches everything: its refusals are contradicted."""
    monkeypatch.setattr(Bias, "updates", lambda self: ())
    texts = caught([*range(30, 40), *range(70, 80)])
    assert len(texts) >= 2
    assert all("the Jacobian has full row rank" in text for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_needs_every_kind(kind, monkeypatch):
    """Without a kind of the list the refusals that it explains are contradicted: none of them is idle."""
    case = EXAMPLES[kind]
    assert judge(case) == (AFFINE, f"full rank, known: {kind}")
    monkeypatch.delitem(KINDS, kind)
    with pytest.raises(AssertionError, match="full row rank"):
        judge(case)


def test_several_parameters_together():
    assert judge(EXAMPLES[TOGETHER]) == (AFFINE, f"full rank, known: {TOGETHER}")


def test_the_list_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "incompleteness.md").read_text()
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == [*KINDS, TOGETHER]


W, V, b = Linear(Param("W", (D, D))), Linear(Param("V", (D, D))), Bias(Param("b", (D,)))
relu, E = Activation("relu"), Param("E", (D, D, D))


def gate(name: str) -> Gate:
    return Gate(Param(name, (1,)))


EXPERTS = Mixture(V, Routing(2), Identity(), ExpertLinear(E))


def asked(block: Component, *free: str, state: Any = (1.0, 2.0, -3.0), **values: Any) -> Case:
    """A case by hand: everything else is frozen, and its numbers are drawn unless they are given."""
    numbers = np.random.default_rng(0)
    drawn = {
        p.name: np.array(values.get(p.name, numbers.normal(size=[int(n) for n in p.shape]))) for p in block.parameters()
    }
    frozen = sorted({p.name for p in block.parameters()} - set(free))
    states = np.stack([np.tile(state, (1, 2, 1)), numbers.normal(size=(1, 2, D))])
    return Case(0, block, drawn, frozen, {"via": "output", "route": "auto"}, states)


EXAMPLES = {
    "inside a weighted sum of streams": grown(30853),  # what writes into the streams is frozen, a part beside it is not
    "used twice": asked(W + W, "W"),
    "no rule moves it": asked(Identity() + Mixture(V, Routing(D, per_expert=Param("s", (D,))), Identity(), ExpertLinear(E)), "s"),
    "inside a mixture": asked(Identity() + Mixture(V, Routing(2), Identity(), ExpertLinear(E) >> b), "b"),
    "a fixed part after it": asked(Identity() + (b >> V), "b"),
    TOGETHER: asked(Identity() + (W >> gate("f")) + (V >> gate("g")) + gate("h"), "f", "g", "h"),
}  # fmt: skip

# what the oracle must say: None for "not affine", else the rank; and whether fractions could be used
ORACLE = {
    "linear": (asked(W, "W"), 3, True),
    "linear at zero": (asked(W, "W", state=(0.0, 0.0, 0.0)), 0, True),
    "scale with a dead coordinate": (asked(Scale(Param("m", (D,))), "m", state=(1.0, 0.0, 2.0)), 2, True),
    "projected afterwards": (asked(W >> V, "W", V=np.diag([1.0, 2.0, 0.0])), 2, True),
    "one number": (asked(Gate(Param("g", (1,))), "g"), 1, True),
    "nothing free": (asked(W), 0, True),
    "only a fixed use": (asked(Fixed(W), "W"), 0, True),
    "W + W": (asked(W + W, "W"), 3, True),
    "W − W": (asked(W + (W >> Times(-1.0)), "W"), 0, True),
    "rational here only": (asked(Activation("tanh") >> b, "b", state=(0.0, 0.0, 0.0)), 3, True),
    "rational at the stored parameters only": (
        asked(b + (b >> Activation("tanh") >> V), "b", state=(0.0, 0.0, 0.0), b=np.zeros(D), V=np.zeros((D, D))), 3, False,
    ),
    "irrational before": (asked(Normalize("rms") >> W, "W"), 3, False),
    "chosen experts": (asked(EXPERTS, "E"), 3, False),
    "their router": (asked(EXPERTS, "V"), None, None),
    "two factors": (asked(W >> V, "V", "W"), None, None),
    "W squared": (asked(W * W, "W"), None, None),
    "tanh": (asked(Gate(Param("g", (1,)), "tanh"), "g"), None, None),
    "a kink far away": (asked(b >> relu, "b", b=np.array([300.0, 300.0, 300.0])), None, None),
    "a kink far away of one": (asked((b >> relu) + Identity(), "b", b=np.array([-300.0, -300.0, -300.0])), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLE)
def test_the_oracle_is_right_where_the_answer_is_known(name):
    case, rank, exact = ORACLE[name]
    judged = Affine.of(case)
    if rank is None:
        assert judged is None
        return
    assert judged is not None
    assert [judged.rank(token, case.masks) for token in range(2)] == [rank, rank]
    assert judged.numbers.exact == exact


@pytest.mark.parametrize(("difference", "rank"), [("0", 1), ("1e-40", 1), ("1e-20", 2), ("1", 2)])
def test_a_rank_is_counted_to_30_digits(difference, rank):
    with mpmath.workdps(50):
        one = mpmath.mpf(1)
        matrix = np.array([[one, one], [one, one + mpmath.mpf(difference)]], dtype=object)
    assert oracles.rank(matrix, oracles.MANY_DIGITS) == rank


def test_a_rank_of_fractions_is_exact():
    tiny = oracles.RATIONAL.array([[1.0, 1.0], [1.0, 1.0]])
    assert oracles.rank(tiny, oracles.RATIONAL) == 1
    tiny[1, 1] += Fraction(1, 10**60)
    assert oracles.rank(tiny, oracles.RATIONAL) == 2


@pytest.mark.parametrize(("target", "reached"), [(0.5, True), (0.9, True), (1.5, False)])
def test_the_solver_reaches_what_can_be_reached(target, reached):
    case = asked(W >> Activation("silu") >> V >> Activation("tanh"), "W", "V")
    found = oracles.solver_reaches(case.function(), case.values, case.masks, np.full((2, D), target), 0)
    assert found == reached
    assert not oracles.solver_reaches(case.function(), case.values, {}, np.full((2, D), target), 0)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rounding_does_not_choose_experts_after_what_is_steered(weight):
    """Where W v' = 0 all experts are as good: which of them a reproduced 0 ± 1e-17 goes to would be chance."""
    case = asked(W >> EXPERTS, "W", W=weight * np.eye(D))
    proof = ct.prove(case.block, frozen=case.frozen)
    if weight:
        patch = proof.construct(case.values, case.state(0), case.state(1))
        assert (
            error(case.block(patch.applied_to(case.values), case.state(0)), case.block(case.values, case.state(1)))
            < 1e-12
        )
        return
    with pytest.raises(ct.SideConditionFailed, match="choice of experts is no near-tie"):
        proof.construct(case.values, case.state(0), case.state(1))


def test_float64_agrees_with_50_digits_on_the_same_tree():
    agreed = 0
    for seed in range(100):
        rng = random.Random(seed)
        grower = Grower(rng, sharing=0)
        block = grower.tree(3)
        v, v_target = np.random.default_rng(seed).normal(size=(2, 2, D))
        try:
            patch = ct.prove(block).construct(grower.values, v, v_target)
        except ct.ControllabilityError:
            continue
        assert error(block(patch.applied_to(grower.values), v) + 1, block(grower.values, v_target) + 1) < 1e-6
        agreed += 1
    assert agreed >= 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", type=int, nargs="?", default=300)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    asked = parser.parse_args()
    counts = counted(range(asked.first, asked.first + asked.trees), asked.jobs)
    print(table(counts))
    return int(any(kind == WRONG for kind, _ in counts))


if __name__ == "__main__":
    sys.exit(main())
