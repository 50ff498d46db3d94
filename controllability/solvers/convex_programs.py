"""The convex programs behind a joint scale, in the form that Clarabel solves: an interior-point method for cones.

T = 200 equations in d = 1152 unknowns take it a second of one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Vector = np.ndarray
STAY = 0.01  # what σ costs beside 1/σ: a channel that no equation needs is not shut down
CUTOFFS = (1e-10, 1e-13)  # equations that differ by less are taken for one, unless that breaks them
ACCEPTED = 1e-9  # relative error that nearly equal equations may leave
PRECISION = 1e-12  # of the solver
ROUGH = 1.2  # times the least shrinkage² is little enough
NO_ROOM = np.zeros(0)


def least_cost(rows: Vector, price: Vector) -> tuple[Vector | None, Vector | None]:
    """(σ > 0 with rows·σ = 1 and the least Σ price·(1/σ + STAY·σ), None), or (None, λ with rowsᵀλ ≥ 0 and Σλ < 0 to rounding).

    ``rows`` (T, d) are not negative, ``price`` (d,) is positive; (None, None) where neither is found.
    """
    size, usual = rows.sum(1, keepdims=True), _usual(rows, price)
    for equations, back in _alike(rows / size * usual):
        back = back / size
        x, weights = _cheapest(equations, back.sum(0), price, usual)
        weights = back @ weights
        if (weights @ rows).min() >= 0 > weights.sum():
            return None, weights
        sigma = polished(rows, usual * x)
        if sigma.min() > 0 and np.abs(rows @ sigma - 1).max() <= ACCEPTED:
            return sigma, None
    return None, None


def least_shrinkage(A: Vector, w: Vector, margin: Vector, price: Vector) -> Vector | None:
    """σ > 0 with 1 − h·w ≤ A σ ≤ 1 − margin and, with h at most ``ROUGH`` times the least (or 1), the least cost as above.

    h is the square of the shrinkage of √(r²+ε): 1 − p = ε/(r²+ε).  None where the program does not get there.
    """
    h, best = ROUGH * max(1.0, _least_room(A, w, margin)), None
    size, usual = A.sum(1, keepdims=True), _usual(A, price)
    for equations, back in reversed([*_alike(np.hstack([A * usual, np.diag(h * w)]) / size)]):
        sigma = usual * _cheapest(equations, (back / size).sum(0), price, usual, margin / w / h)[0]
        if np.isfinite(sigma).all() and sigma.min() > 0:
            sigma = sigma * min(1.0, float(((1 - margin) / (A @ sigma)).min()))
            needed = float(((1 - A @ sigma) / w).max())
            best = min(best or (needed, sigma), (needed, sigma), key=lambda found: found[0])
        if best is not None and best[0] < 1.01 * h:
            break
    return None if best is None else best[1]


def _usual(rows: Vector, price: Vector) -> Vector:
    """About what σ will be, so that the solver's unknowns are near 1: the cheapest for the mean of the equations."""
    share = (rows / rows.sum(1, keepdims=True)).mean(0)
    usual = np.sqrt(price / np.where(share > 0, share, price))
    return usual / np.median(rows @ usual)


def _alike(unit: Vector) -> Iterator[tuple[Vector, Vector]]:
    """(backᵀ·unit, back): equations with the same solutions, orthonormal, which tells apart those that are nearly one.

    At last those as they are: equal ones that contradict each other are seen in no other form.
    """
    U, S, across = np.linalg.svd(unit, full_matrices=False)
    for cutoff in CUTOFFS:
        kept = cutoff * S[0] < S
        yield across[kept], U[:, kept] / S[kept]
    yield unit, np.eye(len(unit))


def _cheapest(rows: Vector, right: Vector, price: Vector, usual: Vector, lowest: Vector = NO_ROOM) -> tuple[Vector, Vector]:
    """x = σ/usual of least cost with rows·(x, room) = right and lowest ≤ room ≤ 1, and the weights of the equations (duals).

    1/x is a variable y of its own: x·y ≥ 1 is the cone ‖(x − y, 2)‖ ≤ x + y.
    """
    from scipy import sparse  # imported where it is needed

    d, T, R = len(usual), len(right), len(lowest)
    x, y, room = sparse.eye_array(d), sparse.eye_array(d), sparse.eye_array(R)
    plus, minus = np.array([[-1.0], [-1.0], [0.0]]), np.array([[-1.0], [1.0], [0.0]])
    parts = [[rows[:, :d], np.zeros((T, d)), rows[:, d:]], [None, None, -room], [None, None, room]]
    matrix = sparse.block_array([*parts[: 3 if R else 1], [sparse.kron(x, plus), sparse.kron(y, minus), None]])
    right = np.concatenate([right, -lowest, np.ones(R), np.tile([0.0, 0.0, 2.0], d)])
    stay, noise = STAY * price * usual, price / usual
    scale = np.median(noise)
    found, dual = _conic(np.concatenate([stay, noise, 0 * lowest]) / scale, matrix, right, (T, 2 * R, d))
    slope = stay + scale * dual[:T] @ rows[:, :d]  # = noise/x² at the optimum, and nearer to it than x is
    return np.where(slope > 0, np.sqrt(noise / np.where(slope > 0, slope, 1)), found[:d]), dual[:T]


def _least_room(A: Vector, w: Vector, margin: Vector) -> float:
    """The least h for which some σ ≥ 0 has 1 − h·w ≤ A σ ≤ 1 − margin: a linear program."""
    from scipy.optimize import linprog  # imported where it is needed

    usual, (T, d) = 1 / A.sum(1).max(), A.shape
    system = np.block([[-A * usual, -w[:, None] / w.max()], [A * usual, np.zeros((T, 1))]])
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    right, goal = np.concatenate([-np.ones(T), 1 - margin]), np.append(np.zeros(d), 1.0)
    found = linprog(goal, A_ub=system, b_ub=right, method="highs-ipm", options=options)
    return found.fun / w.max() if found.status == 0 else 0.0


def _conic(goal: Vector, matrix: Any, right: Vector, rows: tuple[int, int, int]) -> tuple[Vector, Vector]:
    """(x of the least goal·x, its duals), as near as Clarabel comes.

    ``rows``: in so many right − matrix·x is 0, in so many it is not negative, and so many cones of three follow.
    """
    import clarabel  # imported where it is needed
    from scipy import sparse

    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads = False, 1
    settings.tol_gap_rel, settings.tol_gap_abs, settings.tol_feas = PRECISION, PRECISION**2, PRECISION
    cones = [clarabel.ZeroConeT(rows[0]), clarabel.NonnegativeConeT(rows[1]), *[clarabel.SecondOrderConeT(3)] * rows[2]]
    nothing = sparse.csc_array((len(goal), len(goal)))
    found = clarabel.DefaultSolver(nothing, goal, sparse.csc_array(matrix), right, cones, settings).solve()
    return np.array(found.x), np.array(found.z)


def polished(A: Vector, sigma: Vector) -> Vector:
    """σ moved by least relative steps until A σ = 1 holds to rounding; all entries stay positive.

    Directions in which the equations nearly repeat are left out as long as the residual allows.
    """
    error = np.abs(A @ sigma - 1).max()
    for cutoff in (1e-6, 1e-9, 1e-13):
        for _ in range(5):
            if error <= 4e-15:
                return sigma
            step = np.linalg.lstsq(A * sigma, 1 - A @ sigma, rcond=cutoff)[0]
            moved = sigma * (1 + step)
            now = np.abs(A @ moved - 1).max()
            if step.min() <= -0.9 or step.max() > 10 or now >= error:
                break
            sigma, error = moved, now
    return sigma
