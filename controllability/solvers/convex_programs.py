"""The convex programs behind a joint scale: positive solutions of A σ = 1, of these the one of least cost, and inequalities.

All are solved by Newton's method on T equations: T = 200, d = 1152 takes a third of a second of one core, where HiGHS takes
ten for a positive solution alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Vector = np.ndarray
ROUGH = 0.2  # relative precision of the shrinkage²
CONSISTENT = 1e-9  # equations whose left sides agree must agree this well on the right
HURRY, SLOW = 2.0, 1.02  # growth of the weight per stage, and at least where Newton's method is caught at the boundary
LOST = float("inf")
SETTLED = 1e-10  # part of the cost that a step must gain
STAY = 0.01  # what σ costs beside 1/σ: a channel that no equation needs is not shut down


@dataclass(frozen=True, eq=False)
class Equations:
    """A σ = 1 without the equations that repeat others: rows·σ = right with rows orthonormal in σ/usual.

    ``size`` (T,) are the sums of A's rows and ``usual`` (d,) is a σ in which every channel counts as much as any;
    ``lift`` maps weights of ``rows`` to weights of A's rows over their size; ``apart`` (T,) is what the
    right sides of equal equations disagree by, zero where there is a solution.
    """

    A: Vector
    size: Vector
    usual: Vector
    rows: Vector
    right: Vector
    lift: Vector
    apart: Vector

    @classmethod
    def of(cls, A: Vector, cutoff: float) -> Equations:
        """Directions in which A (rows of sum 1) is below ``cutoff`` of its largest are left out."""
        size = A.sum(1)
        share = (A / size[:, None]).mean(0)
        usual = np.where(share > 0, 1 / np.where(share > 0, share, 1), 1) / A.shape[1]
        usual = usual / np.median(A @ usual)
        U, S, rows = np.linalg.svd(A / size[:, None] * usual, full_matrices=False)
        kept = cutoff * S[0] < S
        U, lift = U[:, kept], U[:, kept] / S[kept]
        right = 1 / size
        return cls(A, size, usual, rows[kept] / usual, right @ lift, lift, right - U @ (right @ U))

    def certificate(self, weights: Vector) -> Vector | None:
        """λ (T,) with Aᵀλ > 0 and Σλ < 0, from weights (T,) of A's rows over their size; None if they do not give it.

        From the weights as much is taken of every row as makes Aᵀ·weights < 0; Σ must stay positive.
        """
        unit = self.A / self.size[:, None]
        needed = ((weights @ unit) / np.maximum(unit.sum(0), 1e-300)).max()
        affordable = weights @ (1 / self.size) / (1 / self.size).sum()
        return ((needed + affordable) / 2 - weights) / self.size if needed < affordable else None


def positive_solution(equations: Equations) -> tuple[Vector | None, Vector | None]:
    """(σ > 0 with A σ = 1, None), or (None, λ with Aᵀλ > 0 and Σλ < 0); (None, None) where neither is found.

    σ/usual = 1/(1 − rowsᵀμ), where μ minimises −Σ log(1 − rowsᵀμ) − right·μ, is the solution of least
    Σ (σ/usual − log σ).  The minimum is attained exactly when a positive solution exists;
    otherwise μ runs off until −μ is a certificate of impossibility.
    """
    if np.abs(equations.apart * equations.size).max() > CONSISTENT:
        return None, equations.certificate(equations.apart)
    rows, right = equations.rows * equations.usual, equations.right
    mu = np.zeros(len(rows))

    def value(mu: Vector) -> float:
        room = 1 - mu @ rows
        return LOST if room.min() <= 0 else -float(np.log(room).sum() + mu @ right)

    for _ in range(500):
        sigma = 1 / (1 - mu @ rows)
        delta = right - rows @ sigma
        if np.abs(equations.A @ (equations.usual * sigma) - 1).max() < CONSISTENT:
            return equations.usual * sigma, None
        certificate = equations.certificate(equations.lift @ mu)
        if certificate is not None:
            return None, certificate
        step = _solve((rows * sigma**2) @ rows.T, delta)
        length = _length(value, mu, step, -float(delta @ step))
        if not length:  # rounding: as good as it gets
            break
        mu = mu + length * step
    return None, None


def _length(value: Callable[[Vector], float], x: Vector, step: Vector, slope: float) -> float:
    """How much of a Newton step to take for the value to fall enough; 0 where it does not."""
    before, length = value(x), 1.0
    if -slope < 1e-8 and value(x + step) < LOST:  # the end: the value itself is only rounding
        return 1.0 if -slope > 1e-22 else 0.0
    while not value(x + length * step) <= before + 0.1 * length * slope:
        length /= 2
        if length < 1e-8:
            return 0.0
    return length


def least_cost(equations: Equations, sigma: Vector, price: Vector) -> Vector:
    """σ with rows·σ = right and the least Σ price·(1/σ + STAY·σ), price (d,) > 0; starts at a solution.

    Newton's method within the equations: every iterate is a solution, and none costs more than the one before.  The curvature
    of the cost spans many orders of magnitude, hence a QR decomposition and not the normal equations.
    """
    from scipy.linalg import qr  # imported where it is needed

    def cost(sigma: Vector) -> float:
        return float(price @ (1 / sigma + STAY * sigma))

    for _ in range(200):
        root = np.sqrt(sigma**3 / (2 * price))  # of the inverse curvature
        across = np.asarray(qr((equations.rows * root).T, mode="economic", pivoting=True)[0])
        downhill = root * price * (1 / sigma**2 - STAY)
        for _ in range(2):  # the second time what rounding left of the first
            downhill = downhill - across @ (across.T @ downhill)
        step, slope = root * downhill, -float(downhill @ downhill)
        before, length = cost(sigma), 0.9 / max(0.9, float((-step / sigma).max()))
        if -slope <= SETTLED * before:  # the last step gains too little to be seen in the cost
            return sigma + length * step
        while cost(sigma + length * step) > before + 0.1 * length * slope:
            length /= 2
            if length < 1e-12:  # rounding: as good as it gets
                return sigma
        sigma = sigma + length * step
    return sigma


def least_shrinkage(A: Vector, w: Vector, margin: Vector, factor: float) -> Vector | None:
    """σ with 1 − h·w ≤ A σ ≤ 1 − margin and the least h, changed at most ``factor`` times as much as uniformly.

    h is the square of the shrinkage of √(r²+ε): 1 − p = ε/(r²+ε).  None where the program does not get there.
    """
    uniform = 0.9 * ((1 - margin) / A.sum(1)).min()
    limit = max(uniform, 1 / uniform) * factor**2
    sigma = np.full(A.shape[1], uniform)
    room = 1 - A @ sigma
    h = 1.5 * (room / w).max()
    start = np.concatenate([sigma, h * w - room, [h]])
    x = _Shrinkage(A, w, margin, limit).follow(start)
    sigma = x[: A.shape[1]]
    return sigma if np.isfinite(sigma).all() and (sigma > 0).all() else None


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


def _solve(matrix: Vector, right: Vector) -> Vector:
    """A solution of a positive semidefinite system whose equations may repeat."""
    from scipy.linalg import cho_factor, cho_solve  # imported where it is needed

    size = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    unit = matrix / size / size[:, None]
    right = (right.T / size).T
    if not (np.isfinite(unit).all() and np.isfinite(right).all()):
        return np.full_like(right, np.nan)
    for shift in (1e-14, 1e-12, 1e-10, 1e-8):
        with suppress(np.linalg.LinAlgError):
            return (cho_solve(cho_factor(unit + shift * np.eye(len(unit))), right).T / size).T
    return (np.linalg.lstsq(unit, right, rcond=1e-8)[0].T / size).T


class _Shrinkage:
    """Minimise h over ((σ, b), h) with A σ + h·w = 1 + b, 0 ≤ b ≤ h·w − margin and 1/limit ≤ σ ≤ limit, along the central path.

    The barrier's Hessian is an arrow: diagonal in (σ, b), coupled to h.  h is eliminated by hand, since near the
    boundary what is left of its corner cannot be found by subtracting.
    """

    def __init__(self, A: Vector, w: Vector, margin: Vector, limit: float) -> None:
        self.rows, self.w = np.hstack([A, -np.eye(len(A))]), w
        self.degree = 2.0 * sum(A.shape)  # the barrier's parameter: the gap at weight t is degree / t
        self.margin, self.limit = margin, limit

    def follow(self, x: Vector) -> Vector:
        """The (σ, b, h) at which the gap is below ``ROUGH`` of h (or h below 1, or rounding stops the way)."""
        t, growth = self.degree / _goal(x) / HURRY, HURRY
        for _ in range(200):
            ahead = self._centre(x, t * growth)
            if ahead is not None:
                x, t, growth = ahead, t * growth, HURRY
            else:
                growth = growth**0.5
            if growth < SLOW or self.degree <= ROUGH * t * _goal(x):
                break
        return x

    def _missing(self, x: Vector) -> Vector:
        return 1 - self.rows @ x[:-1] - self.w * x[-1]

    def _centre(self, x: Vector, t: float) -> Vector | None:
        """The path at weight t; None where Newton's method does not get there, or rounding outgrows what is left to gain."""

        def value(ahead: Vector) -> float:
            room = self._room(ahead)
            inside = ahead[-1] > 0 and (room > 0.1 * slacks).all()
            return float(t * ahead[-1] - np.log(room).sum()) if inside else LOST

        for _ in range(20):
            step, slope = self._direction(x, t)
            slacks = self._room(x)
            if -slope < 0.2:
                return x if np.abs(self._missing(x)).max() <= 0.1 * slacks.min() else None
            length = _length(value, x, step, slope) if np.isfinite(step).all() else 0.0
            if not length:
                return None
            x = x + length * step
        return None

    def _direction(self, x: Vector, t: float) -> tuple[Vector, float]:
        """(Newton step of t·h + barrier within the equations, its slope)."""
        rows, at = self.rows, self._arrow(x)
        weighted = rows / at.diagonal
        across = self.w - weighted @ at.mixed
        nu = _solve(weighted @ rows.T, np.stack([-weighted @ at.gradient - self._missing(x), across], 1))
        dh = -(t + at.last_left + across @ nu[:, 0]) / (at.corner_left + across @ nu[:, 1])
        dx = -(at.gradient + at.mixed * dh + (nu[:, 0] + dh * nu[:, 1]) @ rows) / at.diagonal
        return np.append(dx, dh), float(at.gradient @ dx + (t + at.last) * dh)

    def _slacks(self, x: Vector) -> tuple[Vector, Vector, Vector, Vector]:
        sigma, below = np.split(x[:-1], [-len(self.w)])
        return sigma - 1 / self.limit, self.limit - sigma, below, x[-1] * self.w - self.margin - below

    def _room(self, x: Vector) -> Vector:
        """What must stay positive, h too; the barrier is minus the sum of the logarithms."""
        return np.concatenate(self._slacks(x))

    def _arrow(self, x: Vector) -> _Arrow:
        low, high, below, above = self._slacks(x)
        w, both = self.w, below**2 + above**2
        return _Arrow(
            gradient=np.concatenate([1 / high - 1 / low, 1 / above - 1 / below]),
            diagonal=np.concatenate([1 / low**2 + 1 / high**2, 1 / below**2 + 1 / above**2]),
            mixed=np.concatenate([0 * low, -w / above**2]),
            last=-float((w / above).sum()),
            corner_left=float((w**2 / both).sum()),
            last_left=-float((w * (above + below) / both).sum()),
        )


def _goal(x: Vector) -> float:
    return x[-1] if x[-1] > 1 else LOST


class _Arrow(NamedTuple):
    """Derivatives of a barrier in x = (σ, b) (gradient, diagonal), in h (last) and in both (mixed).

    ``corner_left`` and ``last_left`` are the second and first derivative in h after x is eliminated:
    corner − Σ mixed²/diagonal and last − Σ mixed·gradient/diagonal, in a form that does not cancel.
    """

    gradient: Vector
    diagonal: Vector
    mixed: Vector
    last: float
    corner_left: float
    last_left: float
