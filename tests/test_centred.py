"""m∘n(g) with n the centred normalisation and no bias: the scale that keeps the mean at 0, and where there is none.  (theory 4)"""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import controllability as ct
from controllability.components import Activation, Linear, Normalize, Scale, layer_norm, residual
from controllability.interfaces import Param
from controllability.solvers.centred_scale import centred

EPS = 1e-5
UP, DOWN = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
BLOCK = residual(UP >> Activation("gelu_tanh") >> DOWN >> layer_norm("post", bias=False))


def stored(scale, side=0):
    return scale


def reached(answer):
    y = answer.before - answer.before.mean(-1, keepdims=True)
    return answer.scale * y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS)


def instance(seed, rows=6, d=16):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, d)), rng.normal(size=d), 3 + rng.normal(size=(rows, d))


@pytest.mark.parametrize("seed", range(20))
def test_the_target_is_reached_with_mean_zero_the_spread_kept_and_the_signs(seed):
    G, m, y = instance(seed)
    answer, margin = centred(G, m, y, EPS, stored)
    assert (margin > 0).all() and (answer.scale * m > 0).all()
    assert_allclose(reached(answer), G, atol=1e-12)
    assert_allclose(answer.before.mean(-1), 0, atol=1e-12)
    assert_allclose(answer.before.std(-1), y.std(-1))


def test_zero_entries_of_the_scale_and_of_the_target():
    G, m, y = instance(1)
    m[3], m[5], G[:, 5], G[2], G[1, 7] = 0, 0, 0, 0, 0
    answer, margin = centred(G, m, y, EPS, stored)
    assert_allclose(reached(answer), G, atol=1e-12)
    assert (answer.scale[:, 5] == 0).all() and (answer.scale[2] == m).all() and (margin > 0).all()


def test_one_sign_has_no_solution_and_is_refused_with_the_reason():
    """With the signs of m kept Σ G_i/m'_i is a sum of terms of one sign: not 0, whatever the sizes are."""
    G, m, y = instance(2)
    G[4] = abs(G[4]) * np.sign(m)
    answer, margin = centred(G, m, y, EPS, stored)
    assert list(answer.open[:, 0]) == [True, True, True, True, False, True] and abs(margin[4]) < 1e-12
    block = residual(DOWN >> layer_norm("post", bias=False))
    proof = ct.prove(block, via="output", route="balanced")
    params, v, v_target = ct.sample(block, d=8, h=8)
    v = block(params, v_target) - (1 + abs(v)) * np.sign(params["post.weight"])  # the branch must give one sign, over m
    with pytest.raises(ct.SideConditionFailed, match="both signs") as refused:
        proof.construct(params, v, v_target)
    assert "add a bias after the norm" in str(refused.value)


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize(
    "inside", [layer_norm("post", bias=False), Normalize("layer", 1e-2) >> Scale(Param("m", ("d",)))]
)
def test_a_block_is_patched_exactly(via, inside):
    block = residual(UP >> Activation("silu") >> DOWN >> inside)
    proof = ct.prove(block, via=via)
    assert "O-centred" in proof.rules
    done = 0
    for seed in range(10):
        params, v, v_target = ct.sample(block, d=12, h=20, seed=seed)
        try:
            patch = proof.construct(params, v, v_target)
        except ct.SideConditionFailed:
            continue
        found = ct.verify(block, params, patch, v, v_target)
        assert found.residual < 1e-12 < 1e-2 < found.unpatched
        done += 1
    assert done >= 5


@pytest.mark.parametrize("level", ["symbolic", pytest.param("exact", marks=pytest.mark.slow), "numeric"])
def test_the_rule_is_checked_like_the_others(level):
    rows = ct.prove(BLOCK).check(level)
    assert {row["status"] for row in rows} == {"passed"}


@pytest.mark.parametrize("route", ["uniform", "secular", "ball"])
def test_the_routes_that_keep_no_mean_are_refused(route):
    with pytest.raises(ct.NotControllable, match="may move alone on route scale only"):
        ct.prove(BLOCK, route=route)


def test_verify_names_the_rule_that_a_wrong_scale_breaks():
    proof = ct.prove(BLOCK)
    params, v, v_target = ct.sample(BLOCK)
    patch = dict(proof.construct(params, v, v_target))
    name = next(p for p in patch if str(p) == "post.weight")
    patch[name] = type(patch[name])(-patch[name].value)
    found = ct.verify(BLOCK, params, ct.Patch(patch), v, v_target)
    assert "O-centred at scale post.weight" in str(found) and "the sign is flipped" in str(found)
