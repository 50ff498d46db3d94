"""The convex programs behind a joint scale, in the form that Clarabel solves: an interior-point method for cones.

T = 200 equations in d = 1152 unknowns take it a second of one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from controllability.arrays.lazy import np, sparse

Vector = np.ndarray
STAY = 0.01  # what σ costs beside 1/σ: a channel that no equation needs is not shut down
CUTOFFS = (1e-10, 1e-13)  # equations that differ by less are taken for one, unless that breaks them
ACCEPTED = 1e-9  # relative error that nearly equal equations may leave
PRECISION, COARSE = 1e-12, 1e-9  # of the solver; where inequalities are all there is
ROUGH = 1.2  # times the least shrinkage² is little enough


def least_cost(rows: Vector, price: Vector) -> tuple[Vector | None, Vector | None]:
    """(σ > 0 with rows·σ = 1 and the least Σ price·(1/σ + STAY·σ), None), or (None, λ with rowsᵀλ ≥ 0 > Σλ in floats).

    ``rows`` (T, d) are not negative, ``price`` (d,) is positive; (None, None) where neither is found.
    """
    size, usual = rows.sum(1, keepdims=True), _usual(rows, price)
    for equations, back in _alike(rows / size * usual):
        back = back / size
        x, weights = _cheapest(equations, back.sum(0), price, usual)
        weights = back @ weights
        if (weights @ rows).min() >= 0 > weights.sum():
            return None, weights
        if not np.isfinite(x).all():
            continue
        for _ in range(3):  # to rounding, by least relative steps
            x = x * (1 + np.linalg.lstsq(equations * x, back.T @ (1 - rows @ (usual * x)))[0])
        if x.min() > 0 and np.abs(rows @ (usual * x) - 1).max() <= ACCEPTED:
            return usual * x, None
    return None, None


def least_shrinkage(A: Vector, w: Vector, margin: Vector, price: Vector) -> Vector | None:
    """σ > 0 of least cost with 1 − h·w ≤ A σ ≤ 1 − margin, h being ``ROUGH`` times the least (or 1).

    h is the square of the shrinkage of √(r²+ε): 1 − p = ε/(r²+ε).  None where the program does not get there.
    """
    size, usual = A.sum(1, keepdims=True), _usual(A, price)
    h, best = ROUGH * max(1.0, _least_room(A, usual, w, margin)), None
    for equations, back in [*_alike(np.hstack([A * usual, np.diag(h * w)]) / size)][:0:-1]:
        sigma = usual * _cheapest(equations, (back / size).sum(0), price, usual, margin / w / h)[0]
        if np.isfinite(sigma).all() and sigma.min() > 0:
            sigma = sigma * min(1.0, float(((1 - margin) / (A @ sigma)).min()))
            needed = float(((1 - A @ sigma) / w).max())
            best = min(best or (needed, sigma), (needed, sigma), key=lambda found: found[0])
        if best is not None and best[0] < 1.05 * h:
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


def _cheapest(
    rows: Vector, right: Vector, price: Vector, usual: Vector, least: Vector | None = None
) -> tuple[Vector, Vector]:
    """x = σ/usual of least cost with rows·(x, room) = right and least ≤ room ≤ 1, and the equations' weights (duals).

    1/x is a variable y of its own: x·y ≥ 1 is the cone ‖(x − y, 2)‖ ≤ x + y.
    """
    least = np.zeros(0) if least is None else least
    d, T, R = len(usual), len(right), len(least)
    stay, noise, room = STAY * price * usual, price / usual, sparse.eye_array(R)
    cones = [sparse.kron(sparse.eye_array(d), np.array([[-1.0], [sign], [0.0]])) for sign in (-1, 1)]
    blocks = [[rows[:, :d], None, rows[:, d:]], [None, None, -room], [None, None, room], [*cones, None]]
    bounds = np.concatenate([right, -least, np.ones(R), np.tile([0.0, 0.0, 2.0], d)])
    goal, scale = np.concatenate([stay, noise, 0 * least]), np.median(noise)
    found, dual = _conic(goal / scale, blocks, bounds, (T, 2 * R, d), COARSE if R else PRECISION)
    slope = stay + scale * dual[:T] @ rows[:, :d]  # = noise/x² at the optimum, and nearer to it than x is
    return np.where(slope > 0, np.sqrt(noise / np.where(slope > 0, slope, 1)), found[:d]), dual[:T]


def _least_room(A: Vector, usual: Vector, w: Vector, margin: Vector) -> float:
    """The least h for which some σ ≥ 0 has 1 − h·w ≤ A σ ≤ 1 − margin; unknown are σ/usual, 1 − A σ and h·max(w)."""
    T, d = A.shape
    room, size = sparse.eye_array(T), w.max()
    blocks = [
        [A * usual, room, None],
        [None, -room, None],
        [None, room, -w[:, None] / size],
        [-sparse.eye_array(d), None, None],
    ]
    goal, bounds = np.append(np.zeros(d + T), 1.0), np.concatenate([np.ones(T), -margin, np.zeros(T + d)])
    return _conic(goal, blocks, bounds, (T, 2 * T + d, 0), COARSE)[0][-1] / size


def _conic(
    goal: Vector, blocks: Any, right: Vector, rows: tuple[int, int, int], precision: float
) -> tuple[Vector, Vector]:
    """(x of the least goal·x, its duals), as near as Clarabel comes.

    ``rows``: in so many right − blocks·x is 0, in so many it is not negative, and so many cones of three follow.
    """
    clarabel: Any = import_module("clarabel")  # compiled: a type checker does not see into it
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.max_iter = False, 1, 80
    settings.tol_gap_rel, settings.tol_gap_abs, settings.tol_feas = precision, precision**2, precision
    cones = [clarabel.ZeroConeT(rows[0]), clarabel.NonnegativeConeT(rows[1]), *[clarabel.SecondOrderConeT(3)] * rows[2]]
    quadratic, linear = sparse.csc_array((len(goal), len(goal))), sparse.csc_array(sparse.block_array(blocks))
    found = clarabel.DefaultSolver(quadratic, goal, linear, right, cones, settings).solve()
    return np.array(found.x), np.array(found.z)
