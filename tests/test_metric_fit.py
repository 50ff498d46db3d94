"""One formula in the metric of ordinary text: from ROME's edit over the ridge to the exact patch, with hard rows and rows that stay.  (theory 7)"""

import json

import numpy as np
import pytest

from controllability.interfaces import FitRows, JointOptions
from controllability.solvers.metric_fit import FLOOR, Drift, metric_fit


def instance(seed, tokens=7, width=12, out=5):
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(3 * width, width)) * np.geomspace(1, 0.1, width)
    share = rng.uniform(0.5, 2, tokens)
    return rng.normal(size=(tokens, width)), rng.normal(size=(tokens, out)), share / share.sum(), spread.T @ spread


def objective(change, x, delta, share, second, ridge):
    """What theory 7 says is minimised, written down anew."""
    sizes, n = np.linalg.norm(x, axis=1), x.shape[1]
    metric = ridge * second / np.trace(second) + FLOOR * np.eye(n) / n
    missed = ((x @ change.T - delta) ** 2).sum(1) / sizes**2
    return (share * missed).sum() + np.trace(change @ metric @ change.T)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_the_fit_is_the_least_of_its_objective(ridge):
    x, delta, share, second = instance(0)
    left, right = metric_fit(x, delta, share, Drift(second), ridge)
    change, rng = left.T @ right, np.random.default_rng(1)
    least = objective(change, x, delta, share, second, ridge)
    assert least < objective(0 * change, x, delta, share, second, ridge)
    for size in (1e-3, 1e-1):
        other = change + size * rng.normal(size=change.shape)
        assert objective(other, x, delta, share, second, ridge) > least


@pytest.mark.parametrize("rank", [1, 3])
def test_a_smaller_rank_is_the_best_of_that_rank(rank):
    x, delta, share, second = instance(2)
    left, right = metric_fit(x, delta, share, Drift(second), 0.1, rank)
    assert left.shape[0] == right.shape[0] == rank
    change, rng = left.T @ right, np.random.default_rng(3)
    least = objective(change, x, delta, share, second, 0.1)
    whole = np.linalg.svd((lambda a, b: a.T @ b)(*metric_fit(x, delta, share, Drift(second), 0.1)))
    plain = (whole[0][:, :rank] * whole[1][:rank]) @ whole[2][:rank]
    assert least < objective(plain, x, delta, share, second, 0.1)  # truncated in the wrong metric
    for _ in range(20):
        other = (left + 0.01 * rng.normal(size=left.shape)).T @ (right + 0.01 * rng.normal(size=right.shape))
        assert objective(other, x, delta, share, second, 0.1) > least


def test_as_the_metric_counts_less_it_becomes_the_exact_patch_of_least_drift():
    """Weights that are a thousand million times as large are a metric that counts as much less."""
    x, delta, share, second = instance(4)
    left, right = metric_fit(x, delta, 1e9 * share, Drift(second), 10.0)
    change, metric = left.T @ right, 10.0 * second / np.trace(second) + FLOOR * np.eye(12) / 12
    assert np.abs(x @ change.T - delta).max() < 1e-5 * np.abs(delta).max()
    L = np.linalg.cholesky(metric)
    least = np.linalg.pinv(np.linalg.solve(L, x.T).T) @ delta  # theory 7: V (L⁻¹K)⁺ L⁻¹
    assert np.allclose(change, np.linalg.solve(L.T, least).T, atol=1e-4 * np.abs(change).max())
    drift = lambda D: np.trace(D @ metric @ D.T)  # noqa: E731
    plain = (np.linalg.pinv(x) @ delta).T  # exact too, of least norm
    assert np.abs(x @ plain.T - delta).max() < 1e-9 and drift(change) < 0.99 * drift(plain)


def test_hard_rows_are_exact_and_the_others_the_best_beside_them():
    x, delta, share, second = instance(7)
    hard = np.arange(7) < 3
    left, right = metric_fit(x, delta, share, Drift(second), 0.1, hard=hard)
    change, rng = left.T @ right, np.random.default_rng(8)
    missed = np.abs(x @ change.T - delta).max(1)
    soft = (lambda a, b: a.T @ b)(*metric_fit(x, delta, share, Drift(second), 0.1))
    assert missed[:3].max() < 1e-12 * np.abs(delta).max() < 1e-3 * np.abs(x @ soft.T - delta)[:3].max()
    assert missed[3:].min() > 1e-3
    least = objective(change, x, delta, share, second, 0.1)
    free = np.eye(12) - np.linalg.pinv(x[:3]) @ x[:3]  # what the hard rows do not read
    for size in (1e-3, 1e-1):
        assert objective(change + size * rng.normal(size=change.shape) @ free, x, delta, share, second, 0.1) > least


def test_hard_rows_that_say_the_same_twice_are_solved():
    x, delta, share, second = instance(9)
    x[1], delta[1] = 2 * x[0], 2 * delta[0]
    left, right = metric_fit(x, delta, share, Drift(second), 0.1, hard=np.ones(7, bool))
    assert np.abs(x @ (left.T @ right).T - delta).max() < 1e-9 * np.abs(delta).max()


def test_rows_of_a_fit_stay_only_where_they_are_told_to_and_inside_a_mixture_too():
    rows = FitRows((1.0, 3.0), stay=(False, True), hard=(True, False))
    shares, stay, hard = rows.arrays(4)
    assert shares.tolist() == [0.125, 0.125, 0.375, 0.375]
    assert stay.tolist() == [False, False, True, True] and hard.tolist() == [True, True, False, False]
    assert rows.among(np.array([False, True, True, False])).stay == (False, True)
    joint = JointOptions(damping=0.1, rows=rows, layers=((0, 1.0, 0.1), (3, 0.1, 0.1)))
    assert joint.at(1) is None and joint.at(0).rows.hard is None and joint.at(3).rows == rows
    assert JointOptions.from_dict(json.loads(json.dumps(joint.to_dict()))) == joint


def test_one_token_gets_romes_edit():
    x, delta, _, second = instance(5, tokens=1)
    left, right = metric_fit(x, delta, np.ones(1), Drift(second), 1e6)
    key = np.linalg.solve(second, x[0])
    found = right[0] / np.linalg.norm(right[0])
    assert abs(found @ key / np.linalg.norm(key)) > 1 - 1e-5  # the direction Σ⁻¹z
    assert np.abs(np.outer(left[0], right[0])).max() > 0


def test_without_moments_the_identity_is_the_metric():
    x, delta, share, _ = instance(6)
    plain, given = metric_fit(x, delta, share, Drift(None), 0.3), metric_fit(x, delta, share, Drift(np.eye(12)), 0.3)
    assert np.allclose(plain[0].T @ plain[1], given[0].T @ given[1], rtol=1e-10)
