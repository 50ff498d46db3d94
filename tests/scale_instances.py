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


def cost(s, m):
    """What a scale m' = 1/√s costs: its noise in units of |m|, and a little for a channel that is shut down."""
    return float(np.sum((1 / s + 0.01 * m**4 * s) / np.abs(m)))


def least_cost(G, m, r2, s, eps=EPS):
    """A bound below the cost of every s > 0 that keeps the RMS: the dual 2·Σ √((0.01·m⁴/|m| + Aᵀλ)/|m|) − q·λ, at the λ that fits ``s`` best."""
    A, q, size = G**2 / G.shape[1], r2 / (r2 + eps), np.abs(m)
    pull = 1 / s**2 / size - 0.01 * size**3  # = Aᵀλ at the optimum
    weight = s**1.5 * np.sqrt(size)
    factor = np.linalg.lstsq((A * weight).T, pull * weight, rcond=None)[0]
    inside = (0.01 * size**3 + factor @ A) / size
    assert (inside > 0).all()
    return float(2 * np.sqrt(inside).sum() - q @ factor)


def solvable(G, r2, eps=EPS):
    """Whether some s > 0 has A s = q, by a linear program of HiGHS (the boundary never occurs here)."""
    A, q = G**2 / G.shape[1], r2 / (r2 + eps)
    return linprog(np.zeros(G.shape[1]), A_eq=A, b_eq=q, bounds=(0, None), method="highs").status == 0
