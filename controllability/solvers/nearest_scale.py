"""One scale that comes as near to all targets as one can, every token keeping its RMS.  (theory 4 and 5; new)

Where no scale m' has m'∘u_t = G_t for all tokens, or none that rounding survives, the nearest is
min Σ_t ‖m'∘u_t − G_t‖²/‖G_t‖² + λ ‖m' − m‖²/mean(|m|)² over m' and u_t with mean(u_t²) = q_t.  For a given m' every u_t is
the secular route's, so the gradient is that of the sum at those u_t; SciPy's L-BFGS-B goes down along log |m'|.
"""

from collections.abc import Callable
from typing import NamedTuple

from controllability.arrays import arithmetic
from controllability.arrays.lazy import np, optimize
from controllability.solvers.secular import secular

NOTHING = 1e-12  # mean(y²) below this part of ε is no RMS to keep
ROUNDS = 100  # of L-BFGS-B
SETTLED = 1e-5  # what a round must gain at least, for λ from 1e-4 on
FIXED = 1e9  # λ from which on a scale does not move
SMALLEST = 1e-3  # part of the mean |m| below which no channel is scaled that was not there before
STAY = 1e-4  # λ where none is given: a scale that strays far for the last bit of nearness costs more than it brings


def to_keep(r2: np.ndarray, eps: float) -> np.ndarray:
    """The mean squares r_t² (T,) before the norm; ε (1 without one) where they are next to nothing, and there is no RMS to keep."""
    return np.where(r2 <= NOTHING * eps, eps, r2) if eps > 0 else np.where(r2 < 1e-30, 1.0, r2)


def largest_change(scale: np.ndarray, m: np.ndarray) -> float:
    """The largest m'/m or m/m' of a channel that neither scale shuts down (1: unchanged)."""
    alive = (m != 0) & (scale != 0)
    ratio = np.abs(scale[alive] / m[alive])
    return float(max(ratio.max(), 1 / ratio.min())) if ratio.size else 1.0


class Nearest(NamedTuple):
    """The scale m' (d,) as the parameter holds it, and u_t (T, d): m'∘u_t is what comes out."""

    scale: np.ndarray
    unit: np.ndarray


def nearest_scale(
    G: np.ndarray, m: np.ndarray, q: np.ndarray, ridge: float = STAY,
    stored: Callable[[np.ndarray], np.ndarray] = lambda scale: scale,
) -> Nearest:  # fmt: skip
    """The nearest that one scale comes to G (T, d), from the effective scale ``m`` (d,), with mean(u_t²) = ``q`` (T,).

    A token with G_t = 0 has u_t = 0.  ``ridge`` is λ; ``stored`` rounds a scale to what the parameter holds.

    >>> import numpy as np
    >>> G = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0], [2.0, 2.0, 0.5]])
    >>> found = nearest_scale(G, np.ones(3), np.ones(3))
    >>> off = np.abs(found.scale * found.unit - G).max()
    >>> bool(off < 0.3 < np.abs(G / np.sqrt(np.mean(G * G, -1, keepdims=True)) - G).max())
    True
    """
    live = G.any(-1)
    unit = np.zeros_like(G)
    if not live.any():
        return Nearest(m, unit)
    size = np.abs(m)
    ridge = min(ridge, FIXED)
    typical = float(size[size > 0].mean()) if size.any() else 1.0
    least = np.where(size > 0, np.minimum(size, SMALLEST * typical), SMALLEST * typical)
    sign = np.where(m < 0, -1.0, 1.0)
    wanted, radius = G[live], q[live, None]
    weight = 1 / (wanted * wanted).sum(-1, keepdims=True)
    xp = arithmetic(wanted)

    def objective(logarithm: np.ndarray) -> tuple[float, np.ndarray]:
        scale = sign * np.exp(logarithm)
        u = secular(xp, wanted, scale, radius)[1]
        rest, change = scale * u - wanted, (scale - m) * ridge / typical**2
        value = float((weight * rest * rest).sum() + (change * (scale - m)).sum())
        return value, 2 * ((weight * rest * u).sum(0) + change) * scale

    start = np.log(np.maximum(np.where(size > 0, size, typical), least))
    options = {"maxiter": ROUNDS, "maxfun": 2 * ROUNDS, "ftol": min(SETTLED, 0.1 * ridge)}
    bounds = [(low, None) for low in np.log(least)]
    found = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    scale = stored(sign * np.exp(found.x))
    scale = np.where(scale == 0, sign * least, scale)
    unit[live] = secular(xp, wanted, scale, radius)[1]
    return Nearest(scale, unit)
