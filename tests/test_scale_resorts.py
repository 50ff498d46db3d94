"""Where not every RMS can be kept: it moves, little more than it must; then an enlarged scale; then a refusal."""

from __future__ import annotations

import numpy as np
import pytest
from scale_instances import EPS, cost, error, instance, mean_square
from scipy.optimize import linprog, minimize

from controllability.solvers import convex_programs as programs
from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.joint_scale import joint_scale


@pytest.mark.parametrize(("tokens", "d"), [(3, 3), (52, 96), (64, 96), (150, 96)])
@pytest.mark.parametrize("eps", [1e-2, 1e-6, 1e-12])
def test_where_the_rms_has_to_move_the_target_is_reached_all_the_same(tokens, d, eps):
    G, m, r2 = instance(tokens, d, 1)
    answer = joint_scale(G, m, r2, eps)
    assert answer.resort == "moved rms"
    assert error(answer, G, eps) < 1e-14
    p = mean_square(answer.unit)
    assert (p < 1).all()
    assert np.allclose(mean_square(answer.before), eps * p / (1 - p), rtol=1e-6)
    assert answer.certificate is not None
    assert answer.certificate.holds()
    fell = np.sqrt((r2 + eps) / (mean_square(answer.before) + eps))
    assert answer.shrinkage == pytest.approx(max(1, fell.max()), rel=1e-6)
    assert np.abs(fell - 1).max() > 0.01  # it did have to move


@pytest.mark.parametrize(("tokens", "d", "seed"), [(52, 96, 0), (52, 96, 1), (64, 96, 0), (40, 32, 2)])
def test_no_scale_of_that_change_shrinks_much_less(tokens, d, seed):
    """HiGHS on the same question: the least h with 1 − h·w ≤ A s < 1 within the change that was made."""
    G, m, r2 = instance(tokens, d, seed)
    answer = joint_scale(G, m, r2, EPS)
    w = EPS / (r2 + EPS)
    A = (G / m) ** 2 / d
    bounds = [(answer.change**-2, answer.change**2)] * d + [(0, None)]
    system = np.vstack([np.hstack([-A, -w[:, None] * 1e6]), np.hstack([A, np.zeros((tokens, 1))])])
    right = np.concatenate([-np.ones(tokens), 1 - w / 4])
    least = linprog(np.append(np.zeros(d), 1), A_ub=system, b_ub=right, bounds=bounds, method="highs")
    assert least.status == 0
    best = np.sqrt(1e6 * least.x[-1])
    assert best * 0.999 < answer.shrinkage < 1.15 * best
    # m' = c·m, which always works, shrinks more
    room = 1 - 0.999 * A.sum(1) / A.sum(1).max()
    assert answer.shrinkage < np.sqrt((room / w).max())


@pytest.mark.parametrize("seed", range(3))
def test_channels_of_many_sizes_hold_no_rms_back(seed):
    """HiGHS without any bound on the change of m: a uniform scale would be far off, and the answer is not."""
    G, m, r2 = instance(64, 96, seed)
    m = m * np.exp(2 * np.random.default_rng(seed).normal(size=96))
    A, w = (G / m) ** 2 / 96, EPS / (r2 + EPS)
    unit = A.sum(0).mean() / A.sum(0)
    system = np.vstack([np.hstack([-A * unit, -w[:, None] * 1e6]), np.hstack([A * unit, np.zeros((64, 1))])])
    least = linprog(np.append(np.zeros(96), 1), A_ub=system, b_ub=np.append(-np.ones(64), 1 - w / 4), method="highs")
    assert least.status == 0
    answer = joint_scale(G, m, r2, EPS)
    assert error(answer, G) < 1e-14
    assert answer.shrinkage < 1.15 * np.sqrt(1e6 * least.x[-1])


@pytest.mark.parametrize(("tokens", "d", "seed"), [(3, 3, 1), (6, 5, 0), (9, 8, 2)])
def test_of_the_scales_that_shrink_no_more_none_costs_less(tokens, d, seed):
    G, m, r2 = instance(tokens, d, seed)
    answer = joint_scale(G, m, r2, 1e-2)
    assert answer.resort == "moved rms"
    A, w, s = G**2 / d, 1e-2 / (r2 + 1e-2), 1 / answer.scale**2
    most = 1.001 * ((1 - A @ s) / w).max()
    ends = {"type": "ineq", "fun": lambda x: np.append(most * w - 1 + A @ np.exp(x), 1 - w / 4 - A @ np.exp(x))}
    options = {"maxiter": 2000, "ftol": 1e-12}
    found = minimize(lambda x: cost(np.exp(x), m), np.log(s), method="SLSQP", constraints=ends, options=options)
    assert cost(s, m) < 1.01 * found.fun


def test_a_solver_that_fails_leaves_the_enlarged_scale(monkeypatch):
    monkeypatch.setattr(programs, "least_shrinkage", lambda *_: None)
    G, m, r2 = instance(64, 96)
    answer = joint_scale(G, m, r2, EPS)
    assert answer.resort == "enlarged"
    assert np.allclose(answer.scale / m, (answer.scale / m)[0])
    assert (answer.scale / m)[0] > np.sqrt(mean_square(G / m).max())
    assert error(answer, G) < 1e-14


def test_without_epsilon_there_is_no_other_resort():
    G, m, r2 = instance(64, 96)
    with pytest.raises(Infeasible) as caught:
        joint_scale(G, m, r2, 0.0)
    assert caught.value.certificate is not None
    assert caught.value.certificate.holds()
    answer = joint_scale(G[:30], m, r2[:30], 0.0)
    assert error(answer, G[:30], 0.0) < 1e-14
