"""The normalised output: m'∘n(y*) = G for every route, with an oracle in plain NumPy."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import Linear, Scale, layer_norm, residual, rms_norm
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


@pytest.mark.parametrize("route", ["balanced", "scale", "secular", "uniform"])
@pytest.mark.parametrize("seed", range(10))
def test_every_route_reaches_the_target(route, seed):
    G, m, y = instance(seed)
    answer = routes.candidate(route, G, m, y, EPS, lambda s: s)
    assert answer.open.all()
    assert np.allclose(reached(answer), G, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("route", ["balanced", "secular", "uniform"])
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
    chosen = routes.choose(G, m, y, EPS, lambda s: s)
    assert chosen.route == "balanced"
    assert (chosen.scale != 0).all()


@pytest.mark.parametrize("route", ["balanced", "secular", "uniform", "auto"])
def test_zero_scales_are_revived_where_the_target_needs_them(route):
    G, m, y = instance(5)
    m[2] = m[7] = 0
    G[:, 7] = 0
    pick = (
        routes.choose(G, m, y, EPS, lambda s: s)
        if route == "auto"
        else routes.candidate(route, G, m, y, EPS, lambda s: s)
    )
    assert np.allclose(reached(pick), G, atol=1e-9)
    assert (pick.scale[:, 2] != 0).all()


def test_all_scales_zero():
    G, m, y = instance(6)
    answer = routes.candidate("uniform", G, m * 0, y, EPS, lambda s: s)
    assert np.allclose(reached(answer), G, atol=1e-10)


@pytest.mark.parametrize("route", ["balanced", "secular", "uniform", "auto"])
def test_a_zero_target_keeps_the_scale(route):
    G, m, y = instance(7)
    G[3] = 0
    pick = (
        routes.choose(G, m, y, EPS, lambda s: s)
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


def amplified(answer, G):
    """RMS of m' over that of G: what noise in n(y*) becomes, relative to the target."""
    return np.sqrt(np.mean(answer.scale**2, -1) / np.mean(G**2, -1))


def least_amplified(G, y, eps=EPS):
    """mean|G| / (RMS(G)·√q), the bound of the proposition (theory 4)."""
    r2 = np.mean(y * y, -1)
    return np.mean(abs(G), -1) / np.sqrt(np.mean(G**2, -1) * r2 / (r2 + eps))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_no_route_amplifies_less_than_the_bound(spread):
    """mean(m'²) ≥ mean(|G|)²/q on every route that keeps the mean square, balanced nearly there, and the others far off."""
    rng = np.random.default_rng(1)
    G, m, y = rng.normal(size=(50, 64)), np.exp(spread * rng.normal(size=64)), rng.normal(size=(50, 64))
    G[:25] *= np.exp(2 * rng.normal(size=(25, 64)))
    bound = least_amplified(G, y)
    far = {}
    for route in ("balanced", "uniform", "secular"):
        ratio = amplified(routes.candidate(route, G, m, y, EPS, lambda s: s), G) / bound
        assert (ratio >= 1 - 1e-9).all()
        far[route] = ratio.max()
    share = np.mean(abs(G), -1) / np.sqrt(np.mean(G**2, -1))
    balanced = amplified(routes.candidate("balanced", G, m, y, EPS, lambda s: s), G) / bound
    assert (balanced <= np.sqrt(1 + 1 / share) + 1e-9).all()
    assert far["uniform"] > 2 * far["balanced"] or spread < 1


def test_the_bound_is_attained_at_scales_like_the_roots_of_the_target(monkeypatch):
    """m'² ∝ |G| attains it, and nothing else does: every other scale of the constraint is above."""
    G, m, y = instance(4, d=32)
    monkeypatch.setattr(routes, "RHO", 1e12)
    limit = routes.candidate("balanced", G, m, y, EPS, lambda s: s)
    assert np.allclose(amplified(limit, G), least_amplified(G, y), rtol=1e-5)
    assert np.allclose(limit.scale**2 / abs(G), (limit.scale**2 / abs(G))[:, :1], rtol=1e-5)
    rng = np.random.default_rng(0)
    for size in (0.01, 0.1, 1.0):
        other = limit.scale * np.exp(size * rng.normal(size=G.shape))
        other *= np.sqrt(np.mean((G / other) ** 2, -1, keepdims=True) / np.mean(limit.unit**2, -1, keepdims=True))
        assert (np.mean(other**2, -1) > np.mean(limit.scale**2, -1)).all()


def test_noise_reaches_the_output_as_the_scale_says():
    """Against noise: n(y*) disturbed by η has m'∘(…) disturbed by η·RMS(m')."""
    rng = np.random.default_rng(2)
    G, m, y = rng.normal(size=(1, 512)), np.exp(rng.normal(size=512)), rng.normal(size=(1, 512))
    for route in ("balanced", "uniform"):
        answer = routes.candidate(route, G, m, y, EPS, lambda s: s)
        size = np.sqrt(np.mean(answer.before**2))
        noisy = answer.before + 1e-6 * size * rng.normal(size=(200, 512))
        seen = np.sqrt(np.mean((answer.scale * normalised(noisy) - G) ** 2) / np.mean(G**2))
        assert np.isclose(seen / 1e-6, amplified(answer, G)[0], rtol=0.1)


def test_a_channel_that_is_shut_and_not_needed_stays_shut():
    G, m, y = instance(5)
    m[7], G[:, 7] = 0, 0
    for route in ("balanced", "uniform"):
        answer = routes.candidate(route, G, m, y, EPS, lambda s: s)
        assert not answer.scale[:, 7].any()
        assert np.allclose(reached(answer), G, atol=1e-9)


def test_auto_is_balanced_in_numbers_and_a_closed_form_in_fractions():
    G, m, y = instance(3, d=64)
    assert routes.choose(G, m, y, EPS, lambda s: s).route == "balanced"
    xp = ARITHMETICS["rational"]
    exact = [xp.array(values) for values in ([[3, 1]], [1, 1], [[1, 7]])]
    assert routes.choose(*exact, 0, lambda s: s).route in ("uniform", "scale")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("small", [1.0, 0.03])
def test_half_precision_holds_the_scale_that_was_solved_for(dtype, offset, small):
    """m' − 1 in float16 loses most of a small m' (cases r04): what is stored still keeps the mean square."""
    rng = np.random.default_rng(3)
    G, y = (torch.tensor(rng.normal(size=(20, 640)), dtype=torch.float32) for _ in range(2))
    m = small * torch.tensor(np.exp(rng.normal(size=640)), dtype=torch.float32)
    scale = Scale(Param("m"), offset=offset)
    params = {"m": (m - offset).to(getattr(torch, dtype))}

    def stored(wanted, side=0):
        return scale.effective(params) + scale.to_scale(params, wanted, side).value

    def error(answer):
        found = answer.scale.double().numpy() * normalised(answer.before.double().numpy())
        return np.abs(found - small * G.numpy()).max() / np.abs(small * G.numpy()).max()

    answer = routes.candidate("balanced", small * G, scale.effective(params), y, EPS, stored)
    assert torch.equal((answer.scale - offset).to(params["m"].dtype).float() + offset, answer.scale)
    assert error(answer) < 2e-6
    plain = routes.candidate("balanced", small * G, scale.effective(params), y, EPS, lambda s, side=0: s)
    rounded = replace(plain, scale=stored(plain.scale))
    assert error(rounded) > 1e-4


def test_rounding_the_scale_is_made_good_before_the_norm():
    """u is taken of the scale as stored: the error is second order in the rounding, not first."""
    G, m, y = instance(9, d=256)
    m = 1 + 0.3 * abs(m)

    def rounded(scale, side=0):
        near = scale.astype(np.float16)
        beyond = np.nextafter(near, np.float16(side * np.inf)) if side else near
        return np.where((near - scale) * side < 0, beyond, near).astype(float)

    stored = routes.candidate("uniform", G, m, y, EPS, rounded)
    blind = routes.candidate("uniform", G, m, y, EPS, lambda s: s)
    with_care = np.max(abs(reached(stored) - G))
    without = np.max(abs(rounded(blind.scale) * normalised(blind.before) - G))
    assert with_care < without / 100


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
