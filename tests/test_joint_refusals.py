"""What one patch for many tokens cannot be: biases and scales alone, blocks without a proof, tokens that contradict each other."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from helpers import error
from joint_blocks import EXPERTS, silu, square, tanh

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import Bias, ExpertLinear, Linear, Normalize, Scale, SoftCap, residual, rms_norm
from controllability.deltas import LowRank
from controllability.interfaces import JointOptions, Param


def test_a_bias_alone_serves_tokens_with_equal_changes():
    block = residual(tanh >> Bias(Param("b", ("d",))))
    proof = ct.prove(block, via="output", jointly=True)
    assert proof.max_tokens == {"b": 1}
    assert [c.statement for c in proof.conditions] == ["all tokens ask for the same change of b (equal δ_t)"]
    params, v, _ = ct.sample(block, tokens=(2,))
    with pytest.raises(ct.SideConditionFailed, match="all tokens ask for the same change of b") as failed:
        proof.construct(params, v, ct.sample(block, tokens=(2,))[2])
    assert failed.value.certificate is not None
    states = np.stack([v[0], v[0]]), np.stack([v[1], v[1]])
    patch = proof.construct(params, *states)
    assert patch["b"].value.shape == (4,)
    assert error(block(patch.applied_to(params), states[0]), block(params, states[1])) < 1e-14
    assert error(block(params, states[0]), block(params, states[1])) > 0.1


def test_a_scale_alone_serves_tokens_with_equal_ratios():
    block = rms_norm("pre") >> silu >> Scale(Param("m", ("d",)))
    proof = ct.prove(residual(block), via="output", jointly=True, frozen=["pre.weight"])
    assert proof.max_tokens == {"m": 1}
    assert "δ_t/x_t" in proof.conditions[0].statement


def test_a_block_without_a_joint_proof_names_the_culprit_and_what_helps():
    block = residual(square >> SoftCap(30.0) >> rms_norm("post"))
    with pytest.raises(ct.NotControllable) as refused:
        ct.prove(block, via="output", jointly=True, frozen=["W", "post.weight"])
    assert "route auto, jointly, frozen W, post.weight" in str(refused.value)
    assert refused.value.culprit in ("linear W", "scale post.weight")
    remedy = refused.value.remedy
    assert remedy is not None
    assert remedy.jointly
    assert ct.prove(remedy.block, **remedy.options).jointly


def test_a_norm_without_a_scale_is_no_joint_normalised_output():
    bare = residual(square >> Normalize("rms", 1e-2))
    assert ct.prove(bare, via="output").rules  # the ball: each token alone
    with pytest.raises(
        ct.NotControllable, match="one patch for many tokens moves the scale after the normalisation, and none may move"
    ):
        ct.prove(bare, via="output", jointly=True)


# ---------------------------------------------------------------- faults that the checks above have shown


def fractions(*rows):
    return ARITHMETICS["rational"].array([[Fraction(x) for x in row] for row in rows])


def test_a_certificate_is_not_about_tokens_that_agree():
    """Tokens 0 and 1 are the same and agree; token 2 contradicts both."""
    x, gap = fractions((1, 2), (1, 2), (2, 4)), fractions((1, 0), (1, 0), (1, 0))
    leaf = Linear(Param("W"))
    for numbers in ((x, gap), (x.astype(float), gap.astype(float))):
        with pytest.raises(ct.SideConditionFailed) as failed:
            leaf.output_updates()[0].jointly.solve(JointOptions(), {}, *numbers, numbers[1] * 0)
        certificate = failed.value.certificate
        assert 2 in certificate.tokens
        assert certificate.targets > 0.1
        assert certificate.inputs < 1e-15
    assert certificate.exact is False
    with pytest.raises(ct.SideConditionFailed) as failed:
        leaf.output_updates()[0].jointly.solve(JointOptions(), {}, x, gap, gap * 0)
    assert failed.value.certificate.holds()


def test_nothing_to_change_is_a_patch_of_zeros():
    x = ARITHMETICS["mpmath"].array(np.zeros((2, 3)))
    solved = Linear(Param("W")).output_updates()[0].jointly.solve(JointOptions(), {}, x, x, x)
    assert isinstance(solved.delta, LowRank)
    assert (solved.delta.dense() == 0).all()
    assert (solved.delta.effect(x) == 0).all()


def test_one_row_for_each_token_inside_a_mixture():
    """What stands before the experts' own maps reads (T, 1, d): a token is a row there."""
    inner = square >> rms_norm("in") >> ExpertLinear(Param("U", ("E", "h", "d"))) >> silu
    block = residual(replace(EXPERTS, inner=inner))
    for kind, limit in (("numpy", 1e-12), ("mpmath", 1e-12)):
        params, v, v_target = ct.sample(block, kind, seed=3, tokens=(3,))
        patch = ct.prove(block, jointly=True).construct(params, v, v_target)
        wanted = block(params, v_target)
        assert error(*(x.astype(float) for x in (block(patch.applied_to(params), v), wanted))) < limit
        assert error(*(x.astype(float) for x in (block(params, v), wanted))) > 0.1
