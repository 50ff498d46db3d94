"""The normalised output: m'∘n(y*) = G for every route, with an oracle in plain NumPy."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import Linear, layer_norm, residual, rms_norm
from controllability.interfaces import Param
from controllability.solvers import norm_scale as routes

EPS = 1e-6


def normalised(y, eps=EPS):
    return y / np.sqrt(np.mean(y * y, -1, keepdims=True) + eps)


def instance(seed=0, tokens=7, d=16, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, d)), rng.normal(size=d), spread * rng.normal(size=(tokens, d))


def reached(answer, eps=EPS):
    return answer.scale * normalised(answer.before, eps)


@pytest.mark.parametrize("route", ["scale", "secular", "uniform"])
@pytest.mark.parametrize("seed", range(10))
def test_every_route_reaches_the_target(route, seed):
    G, m, y = instance(seed)
    answer = routes.candidate(route, G, m, y, EPS, lambda s: s)
    assert answer.open.all()
    assert np.allclose(reached(answer), G, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("route", ["secular", "uniform"])
def test_the_mean_square_before_the_norm_is_kept(route):
    G, m, y = instance()
    answer = routes.candidate(route, G, m, y, EPS, lambda s: s)
    assert np.allclose(np.mean(answer.before**2, -1), np.mean(y**2, -1), rtol=1e-10)


def test_ball_is_open_exactly_inside_the_ball():
    G, m, y = instance()
    m = 1 + abs(m)
    G[0] *= 0.3
    G[1] *= 30
    answer = routes.candidate("ball", G, m, y, EPS, lambda s: s)
    inside = np.mean((G / m) ** 2, -1) < 1
    assert (answer.open[:, 0] == inside).all()
    assert inside.any()
    assert not inside.all()
    assert np.allclose(reached(answer)[inside], G[inside], rtol=1e-7)
    assert np.array_equal(answer.scale[inside], np.broadcast_to(m, G.shape)[inside])


def test_secular_minimises_the_distance_to_the_goal():
    """Against projected gradient descent on the sphere, which knows no secular equation."""
    rng = np.random.default_rng(1)
    G, m = rng.normal(size=6), 0.5 + rng.random(6)
    q = np.array([0.9])
    _, u = routes.secular(ARITHMETICS["numpy"], G[None], m[None], q[None])
    best = np.inf
    for _ in range(20):
        w = rng.normal(size=6)
        for _ in range(4000):
            w -= 0.05 * m * (m * w - G)
            w *= np.sqrt(6 * q[0]) / np.linalg.norm(w)
        best = min(best, np.sum((m * w - G) ** 2))
    assert np.sum((m * u[0] - G) ** 2) <= best + 1e-9


def test_secular_closed_form_is_the_papers_correction():
    """[G, App. B] divides the remaining error by n(y)_i; that quotient is −μ/m."""
    G, m, y = instance(3)
    answer = routes.candidate("secular", G, m, y, EPS, lambda s: s)
    u = normalised(answer.before)
    papers = m + (G - m * u) / u
    assert np.allclose(answer.scale, papers, rtol=1e-6)
    mu = m * (m - answer.scale)
    assert np.allclose(mu, mu[:, :1], rtol=1e-9)
    assert (mu < np.min(m**2) * (1 + 1e-12)).all()


def test_secular_hard_case_puts_the_missing_norm_where_the_scale_is_smallest():
    m = np.array([0.1, 1.0, 2.0, 3.0])
    G = np.array([[0.0, 0.2, 0.1, 0.3]])
    y = np.ones((1, 4))
    answer = routes.candidate("secular", G, m, y, EPS, lambda s: s)
    assert answer.scale[0, 0] == 0
    assert not answer.tame.any()
    assert np.allclose(reached(answer), G, atol=1e-12)
    assert np.isclose(np.mean(answer.unit**2), 1 / (1 + EPS))
    chosen, used, _ = routes.choose(G, m, y, EPS, lambda s: s)
    assert used == "uniform"
    assert (chosen.scale != 0).all()


@pytest.mark.parametrize("route", ["secular", "uniform", "auto"])
def test_zero_scales_are_revived_where_the_target_needs_them(route):
    G, m, y = instance(5)
    m[2] = m[7] = 0
    G[:, 7] = 0
    pick = (
        routes.choose(G, m, y, EPS, lambda s: s)[0]
        if route == "auto"
        else routes.candidate(route, G, m, y, EPS, lambda s: s)
    )
    assert np.allclose(reached(pick), G, atol=1e-9)
    assert (pick.scale[:, 2] != 0).all()


def test_all_scales_zero():
    G, m, y = instance(6)
    answer = routes.candidate("uniform", G, m * 0, y, EPS, lambda s: s)
    assert np.allclose(reached(answer), G, atol=1e-10)


@pytest.mark.parametrize("route", ["secular", "uniform", "auto"])
def test_a_zero_target_keeps_the_scale(route):
    G, m, y = instance(7)
    G[3] = 0
    pick = (
        routes.choose(G, m, y, EPS, lambda s: s)[0]
        if route == "auto"
        else routes.candidate(route, G, m, y, EPS, lambda s: s)
    )
    assert np.array_equal(pick.scale[3], m)
    assert not pick.before[3].any()
    assert np.allclose(reached(pick), G, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_no_activation_and_no_epsilon(eps):
    G, m, y = instance(8)
    y[2] = 0
    answer = routes.candidate("uniform", G, m, y, eps, lambda s: s)
    assert np.allclose(reached(answer, eps), G, atol=1e-9)


def test_auto_takes_the_small_change_and_says_why():
    changes = []
    for seed in range(20):
        G, m, y = instance(seed, d=64)
        m = 1 + 0.3 * m
        chosen, used, why = routes.choose(G, m, y, EPS, lambda s: s)
        naive = routes.candidate("scale", G, m, y, EPS, lambda s: s)
        changes.append(np.max(routes.relative_change(naive.scale, m)) / np.max(routes.relative_change(chosen.scale, m)))
        assert set(used.split("+")) <= {"uniform", "secular", "ball", "scale"}
        assert "uniform: amplification" in why()
        assert "scale change" in why()
    assert np.median(changes) > 100


def test_auto_takes_ball_below_float64_only_as_a_last_resort():
    rng = np.random.default_rng(0)
    d = 8
    m, y = np.ones(d), rng.normal(size=(1, d))
    G = 0.999999999 * normalised(y)  # inside the ball, close to the sphere
    _, used32, _ = routes.choose(G.astype(np.float32), m.astype(np.float32), y.astype(np.float32), EPS, lambda s: s)
    assert used32 != "ball"


def test_rounding_the_scale_is_made_good_before_the_norm():
    """u is taken of the scale as stored: the error is second order in the rounding, not first."""
    G, m, y = instance(9, d=256)
    m = 1 + 0.3 * abs(m)

    def rounded(scale):
        return scale.astype(np.float16).astype(float)

    stored = routes.candidate("uniform", G, m, y, EPS, rounded)
    blind = routes.candidate("uniform", G, m, y, EPS, lambda s: s)
    with_care = np.max(abs(reached(stored) - G))
    without = np.max(abs(rounded(blind.scale) * normalised(blind.before) - G))
    assert with_care < without / 3


def test_kernels_agree_between_arithmetics():
    G, m, y = instance(11, tokens=3, d=8)
    found = {}
    with mpmath.workdps(50):
        for kind in ("numpy", "torch", "mpmath"):
            xp = ARITHMETICS[kind]
            arrays = [xp.array(a) for a in (G, m, y)]
            found[kind] = np.array(routes.candidate("secular", *arrays, EPS, lambda s: s).scale, dtype=float)
    assert np.allclose(found["numpy"], found["mpmath"], rtol=1e-10)
    assert np.allclose(found["torch"], found["mpmath"], rtol=1e-10)


def test_layer_norm_with_a_bias_needs_no_condition():
    W = Linear(Param("W", ("d", "d")))
    block = residual(rms_norm("pre") >> W >> layer_norm("post"))
    proof = ct.prove(block, frozen=("post.weight",))
    params, v, v_target = ct.sample(block, d=5)
    patch = proof.construct(params, v, v_target)
    assert "post.bias" in patch
    assert ct.verify(block, params, patch, v, v_target).residual < 1e-13


def test_layer_norm_without_a_bias_has_the_scale_route_only():
    W = Linear(Param("W", ("d", "d")))
    block = residual(rms_norm("pre") >> W >> layer_norm("post", bias=False))
    params, v, v_target = ct.sample(block, d=5)
    patch = ct.prove(block).construct(params, v, v_target)
    assert "post.weight" in patch
    assert ct.verify(block, params, patch, v, v_target).residual < 1e-12
    with pytest.raises(ct.NotControllable):
        ct.prove(block, route="uniform")
