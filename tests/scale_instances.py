"""Random problems of one scale for many tokens, and referees of the answers: NumPy, and HiGHS with formulations of its own."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

EPS = 1e-6


def instance(tokens, d, seed=0):
    rng = np.random.default_rng(seed)
    m = np.exp(0.5 * rng.normal(size=d)) * rng.choice([-1.0, 1.0], d)
    return rng.normal(size=(tokens, d)), m, np.exp(rng.normal(size=tokens))


def normalised(y, eps=EPS):
    return y / np.sqrt(np.mean(y * y, -1, keepdims=True) + eps)


def error(answer, G, eps=EPS):
    return np.abs(answer.scale * normalised(answer.before, eps) - G).max() / np.abs(G).max()


def mean_square(y):
    return np.mean(y * y, -1)


def phase_one(G, m, r2, kappa, eps=EPS):
    """The smallest total violation of "every RMS is kept" with the scale within a factor kappa: HiGHS, own formulation in 1/m'²."""
    T, d = G.shape
    A, q = G**2 / d, r2 / (r2 + eps)
    slack = np.hstack([np.eye(T), -np.eye(T)])
    bounds = [(1 / (mi * kappa) ** 2, (kappa / mi) ** 2) for mi in np.abs(m)] + [(0, None)] * (2 * T)
    cost = np.append(np.zeros(d), np.ones(2 * T))
    answer = linprog(cost, A_eq=np.hstack([A, slack]), b_eq=q, bounds=bounds, method="highs")
    assert answer.status == 0
    return answer.fun


def solvable(G, r2, eps=EPS):
    """Whether some s > 0 has A s = q, by a linear program of HiGHS (the boundary never occurs here)."""
    A, q = G**2 / G.shape[1], r2 / (r2 + eps)
    return linprog(np.zeros(G.shape[1]), A_eq=A, b_eq=q, bounds=(0, None), method="highs").status == 0
