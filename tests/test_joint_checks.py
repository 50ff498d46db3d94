"""Joint proofs at every level: symbols, fractions and 50 digits; a wrong rule fails its own check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from joint_blocks import BLOCKS, FAMILIES, down, joint, joint_steps, up

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.checks import symbolic_joint_block
from controllability.checks.numeric_block import residuals_of
from controllability.checks.symbolic_rules import rule_check
from controllability.components import Activation, joint_updates as ways, residual
from controllability.deltas import ExpertLowRank
from controllability.interfaces import JointOptions
from controllability.rules import RULES, mixture as mixture_rules, normalised_jointly as joint_rules
from controllability.solvers import least_norm as span

# ------------------------------------------------------------------------------------------- level symbolic

SLOW = ("experts", "experts, 1b", "normalised, through")  # sums over experts reduce slowly


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BLOCKS])
def test_a_joint_rule_passes_its_own_check(name):
    for step in joint_steps(name):
        status, method = rule_check(step)
        assert status == "passed", f"{step.rule.name}: {method}"
        assert "2 tokens, symbolic entries at size" in method


def test_every_joint_rule_is_among_them():
    used = {(step.rule.name, step.rule.side) for name in BLOCKS for step in joint_steps(name)}
    assert used == {(rule.name, rule.side) for rule in RULES if rule.jointly}


def test_a_check_says_what_was_reduced_and_what_is_refused():
    rows = {row["rule"]: row["method"] for row in ct.prove(BLOCKS["vectors"][0], jointly=True).check("symbolic")}
    assert rows["O-bias jointly"] == (
        "patched output − output − δ reduced to 0 for one token with any targets, and dependent ones with targets that "
        "depend in the same way; other targets of dependent tokens are refused; 2 tokens, symbolic entries at size 2"
    )
    assert "undefined functions" in rows["theorem-1"]  # what composes others acts token by token


def status(name, rule):
    return rule_check(next(step for step in joint_steps(name) if step.rule.name == rule))


def wrong_sign(self):
    return -self.basis / (self.basis * self.basis).sum(-1, keepdims=True)


def unchecked(condition, joint, xp, rest, *_):
    return np.ones((len(rest), 1))


def without_root(self, G):
    xp = ARITHMETICS["sympy"]
    m = self.scale.effective(self.run.params)
    return 2 * m, xp.name(G / (2 * m))


@pytest.mark.parametrize(
    ("block", "rule", "target", "attribute", "wrong", "said"),
    [
        ("theorem 1", "O-linear jointly", span.Span, "right", property(wrong_sign), "leaves"),
        ("theorem 1", "I-linear jointly", ways, "reached", unchecked, "are not refused"),
        ("vectors", "O-bias jointly", ways, "reached", unchecked, "are not refused"),
        ("experts", "I-experts jointly", ways, "reached", unchecked, "are not refused"),
        ("normalised", "O-normalised jointly", joint_rules.OneScale, "_enlarged", without_root, "leaves"),
    ],
)
def test_a_wrong_joint_rule_fails_its_own_check(monkeypatch, block, rule, target, attribute, wrong, said):
    assert status(block, rule)[0] == "passed"
    monkeypatch.setattr(target, attribute, wrong)
    found, method = status(block, rule)
    assert found == "failed"
    assert said in method


STACKED = ways.one_sum_of_experts


def shares_ignored(condition, joint, x, shares, *rest):
    return STACKED(condition, joint, x, shares * 0 + 1, *rest)


def planes_swapped(*given):
    solved = STACKED(*given)
    return replace(solved, delta=replace(solved.delta, right=solved.delta.right[::-1]))


def a_part_to_every_expert(condition, joint, x, shares, index, gap, raw, transposed, experts, known=None):
    """[G]: δ/S to every chosen expert, for each token its own rank-1 term: they meet in the expert that both have."""
    solved = STACKED(condition, joint, x, shares, index, gap, raw, transposed, experts, known)
    left, right = np.zeros((2, experts, len(gap), 1), dtype=object)
    left = np.broadcast_to(left, (experts, len(gap), gap.shape[1])).copy()
    for t, j in np.ndindex(*index.shape):
        left[index[t, j], t] = gap[t] / shares[t].sum()
        right[index[t, j], t] = x[t, j] / (x[t, j] * x[t, j]).sum()
    return replace(solved, delta=ExpertLowRank(left, right, transposed, np.arange(experts), experts))


def what_they_give_now_forgotten(condition, joint, x, shares, index, gap, raw, *rest):
    return STACKED(condition, joint, x, shares, index, gap + raw, raw, *rest)


@pytest.mark.parametrize(
    ("target", "attribute", "wrong", "said"),
    [
        # these two are found in the whole block as well (below)
        pytest.param(
            mixture_rules, "one_sum_of_experts", shares_ignored, "the conclusion leaves", marks=pytest.mark.slow
        ),
        pytest.param(
            mixture_rules, "one_sum_of_experts", planes_swapped, "the conclusion leaves", marks=pytest.mark.slow
        ),
        (mixture_rules, "one_sum_of_experts", a_part_to_every_expert, "the conclusion leaves"),
        (mixture_rules, "one_sum_of_experts", what_they_give_now_forgotten, "the conclusion leaves"),
        pytest.param(ways, "reached", unchecked, "are not refused", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("block", ["experts", pytest.param("experts, 1b", marks=pytest.mark.slow)])
def test_a_wrong_sum_of_experts_fails_its_own_check(monkeypatch, block, target, attribute, wrong, said):
    rule = "T-mixture jointly" if block == "experts" else "O-mixture jointly"
    monkeypatch.setattr(target, attribute, wrong)
    found, method = status(block, rule)
    assert found == "failed"
    assert said in method


@pytest.mark.slow
def test_a_check_of_a_mixture_says_that_dependent_tokens_were_tried():
    found, method = status("experts, 1b", "O-mixture jointly")
    assert found == "passed"
    assert (
        "of three, each two of which share one) with targets that depend in the same way; other targets of those are refused"
        in method
    )


def test_the_whole_block_for_two_tokens_of_symbols():
    for name, via in (("olmo2", "input-output"), ("llama", "output")):
        row = joint(name, via).check("symbolic")[-1]
        assert (row["rule"], row["status"]) == ("whole block", "passed"), row
        assert "residual reduced to 0 for 2 tokens with one patch, at d = 2, h = 3" in row["method"]


@pytest.mark.slow
@pytest.mark.parametrize("via", ["input-output", "output"])
def test_the_whole_block_with_experts_for_two_tokens_of_symbols(via):
    found, method = symbolic_joint_block.whole_block(joint("mixtral", via))
    assert found == "passed", method
    assert method == (
        "residual reduced to 0 for 2 tokens with one patch, at E = 3, d = 2 (h = 1 in an expert), of which {1, 2} and {2, 3} "
        "serve the tokens: every entry, ε, share and activation a symbol"
    )


def test_a_shared_expert_beside_others_for_two_tokens_of_symbols():
    found, method = symbolic_joint_block.whole_block(joint("deepseek_v3"))
    assert found == "passed", method


@pytest.mark.parametrize("wrong", [shares_ignored, planes_swapped])
def test_a_wrong_sum_of_experts_leaves_something_of_the_whole_block(monkeypatch, wrong):
    monkeypatch.setattr(mixture_rules, "one_sum_of_experts", wrong)
    proof = joint("mixtral", "output")
    assert symbolic_joint_block.whole_block(proof)[0] == "failed"
    assert proof.check("exact")[0]["status"] == "failed"


def test_what_is_not_run_is_skipped():
    found, method = symbolic_joint_block.whole_block(joint("flex_olmo", "output"))
    assert found == "skipped"
    assert method.startswith("not run: roots of what two tokens' experts add up to")


# ---------------------------------------------------------------------------------- levels exact and numeric


@pytest.mark.parametrize("via", [pytest.param("input-output", marks=pytest.mark.slow), "output"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_block_on_fractions(name, via):
    (row,) = joint(name, via).check("exact")
    assert row["status"] == "passed", row
    assert "residual exactly 0" in row["method"]
    assert "one patch for 2 tokens" in row["method"]


def test_a_patch_for_one_token_fails_the_exact_level(monkeypatch):
    """A negative control: what serves the first token only leaves a residual at the second."""

    def first(self, gap, ridge=0.0):
        return solve(self, np.concatenate([gap[:1]] + [gap[:1] * 0] * (len(gap) - 1)), ridge)

    solve = span.Span.solve
    monkeypatch.setattr(span.Span, "solve", first)
    for name in ("bert", "mixtral"):
        assert joint(name, "output").check("exact")[0]["status"] == "failed"


@pytest.mark.parametrize("via", ["input-output", "output"])
def test_experts_in_fractions_serve_three_tokens_some_of_them_repeated(via):
    (row,) = joint("mixtral", via).check("exact")
    assert "for 3, one of them repeated or not; two targets of one state are refused" in row["method"]


def test_two_targets_of_one_state_are_noticed_in_fractions(monkeypatch):
    monkeypatch.setattr(ways, "reached", unchecked)
    (row,) = joint("mixtral", "output").check("exact")
    assert row["status"] == "failed"
    assert "two targets of one state are not refused" in row["method"] or "NotVerified" in row["method"]


def test_residuals_fall_to_fifty_digits():
    for name in FAMILIES:
        residuals, _, unpatched = residuals_of(joint(name), 0)
        assert residuals["50 digits"] < 1e-40, name
        assert residuals["float64"] < 1e-12
        assert unpatched > 0.1
        assert joint(name).check("numeric")[0]["status"] == "passed"


def test_many_digits_do_not_go_through_the_linear_program(monkeypatch):
    def program(*_):
        raise AssertionError("many digits in a float64 program")

    proof = joint("gemma3")
    numbers = ct.sample(proof.block, "mpmath", tokens=(2,))
    monkeypatch.setattr(joint_rules.OneScale, "_programmed", program)
    patch = proof.construct(*numbers)
    assert [r.route for r in patch.journal.routes] == ["enlarged"]
    with pytest.raises(ct.NotExact, match="keep_rms is decided by linear programming"):
        proof.construct(*numbers, joint=JointOptions(keep_rms=True))


def test_the_exact_level_in_fractions_has_a_residual_without_a_patch():
    assert "in fractions" in joint("mixtral", "output").check("exact")[0]["method"]
    assert "roots as algebraic numbers" in joint("llama").check("exact")[0]["method"]
    params, v, v_target = ct.sample(BLOCKS["theorem 1"][0], "rational", tokens=(2,), d=2, h=3)
    block = residual(up >> Activation("cubic", coefficients=(0, 1, 0, 1)) >> down)
    patch = ct.prove(block, jointly=True).construct(params, v, v_target)
    assert (block(patch.applied_to(params), v) == block(params, v_target)).all()
    assert (block(params, v) != block(params, v_target)).any()
