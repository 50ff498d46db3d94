"""Routes to a normalised output: which scale m' to take so that m' ∘ n(y*) = G.  (theory: RMSNorm, precisely)

All functions work on (..., d) arrays, one token a row.  ``G`` is what the normalised branch must
output, ``m`` the effective scale, ``y`` what enters the normalisation before its own patch.

Which route is the best conditioned: noise of relative size η in y* reaches the output as m'∘δn, E‖m'∘δn‖² = η²·Σ m'².  Every
route that keeps the mean square has mean(u²) = q with u = G/m', so by Cauchy–Schwarz mean(m'²) ≥ mean(|G|)²/q, with equality
exactly at m'² ∝ |G|.  ``balanced`` stays below (1 + 1/(ρ·mean|G|/RMS(G))) times that.  (new)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from controllability.arrays import Arithmetic, Array, arithmetic
from controllability.errors import BadInput, NotExact
from controllability.solvers.secular import secular
from controllability.solvers.stored_scale import Stored, stored_scale

ROUTES = ("auto", "balanced", "scale", "secular", "uniform", "ball")
RHO = 1  # balanced: how much the target counts beside the scale that is there


@dataclass(frozen=True)
class Candidate:
    """One route's answer: scale m', unit-ball point u, pre-norm target y*, and where it holds.

    ``open`` (..., 1) says for which tokens the route exists; ``tame`` for which it leaves every channel alive.
    """

    route: str
    scale: Array
    unit: Array
    before: Array
    open: Array
    tame: Array


def check_route(route: str) -> None:
    """Raise ``BadInput`` unless ``route`` is known."""
    if route not in ROUTES:
        raise BadInput(f"unknown route {route!r}: choose one of {', '.join(ROUTES)}")


def candidate(route: str, G: Array, m: Array, y: Array, eps: Any, stored: Stored) -> Candidate:
    """The answer of one route (not ``auto``) for every token.

    ``stored(scale)`` is what the parameter can hold next to a scale; u = G/m' is taken of that.
    Source: scale [G, Thm 1]; secular [G, App. B] with Δm = −μ/m (new); balanced, uniform, ball (new).
    """
    xp = arithmetic(G, m, y)
    eps = xp.number(eps)
    if route == "scale":
        return _scale(xp, G, m, y, eps, stored)
    live = revived(xp, G, m)
    if route == "ball":
        return _ball(xp, G, m, live, eps)
    r2 = usable_mean_square(xp, y, eps)
    q = r2 / (r2 + eps)
    if route == "secular":
        scale, unit = secular(xp, G, live, q)
        tame = _alive(xp, scale, live)
    else:
        scale, unit = (_balanced if route == "balanced" else _uniform)(xp, G, live, q), G * 0
        tame = xp.is_zero(q * 0)
    scale, u = settled(xp, G, m, scale, unit, lambda wanted: stored_scale(xp, G, wanted, stored))
    before = u * xp.sqrt(r2 + eps)
    finite = xp.is_zero(q * 0) if xp.exact else xp.is_zero(xp.sum((scale + before) * 0))
    return Candidate(route, scale, u, before, finite, tame)


def _balanced(xp: Arithmetic, G: Array, m: Array, q: Array) -> Array:
    """m'² = κ²·(m² + ρ·|G|·mean(m²)/RMS(G)) with κ² from mean((G/m')²) = q, and the signs of m."""
    weight = balanced_weights(xp, G, m)
    kappa = xp.sqrt(xp.mean(G * G / weight) / q)
    return kappa * xp.sqrt(weight) * m / xp.magnitude(m)


def balanced_weights(xp: Arithmetic, G: Array, m: Array) -> Array:
    """w = m² + ρ·|G|·mean(m²)/RMS(G)."""
    usual = xp.name(xp.mean(m * m) / xp.or_one(xp.sqrt(xp.mean(G * G))))
    return xp.name(m * m + RHO * xp.magnitude(G) * usual)


def _uniform(xp: Arithmetic, G: Array, m: Array, q: Array) -> Array:
    """m' = c·m with c = RMS(G/m)/√q."""
    ratio = G / m
    return xp.sqrt(xp.mean(ratio * ratio)) / xp.sqrt(q) * m


def settled(
    xp: Arithmetic, G: Array, m: Array, scale: Array, unit: Array, hold: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """(m' as held, u = G/m'): where m'_i = 0 u comes from the solver; where nothing is asked for nothing moves."""
    nothing = xp.is_zero(G).all(-1, keepdims=True) | (xp.is_zero(G) & xp.is_zero(m))
    if xp.any(nothing):
        scale, unit = xp.where(nothing, m + xp.zeros_like(G), scale), xp.where(nothing, xp.zeros_like(unit), unit)
    scale = hold(scale)
    dead = xp.is_zero(scale)
    if not xp.any(dead):
        return scale, G / scale
    return scale, xp.where(dead, unit, G / xp.where(dead, scale + 1, scale))


def _ball(xp: Arithmetic, G: Array, m: Array, live: Array, eps: Any) -> Candidate:
    scale, u = settled(xp, G, m, live + xp.zeros_like(G), G * 0, lambda scale: scale)
    room = 1 - xp.mean(u * u)
    open_ = xp.is_zero(room * 0) if xp.symbolic else room > 0
    open_ = open_ & ~(xp.is_zero(room * 0) & (eps == 0))  # without ε the image is the sphere, not the ball
    before = u * xp.sqrt(eps / xp.where(open_, room, xp.zeros_like(room) + 1))
    return Candidate("ball", scale, u, before, open_, xp.is_zero(room * 0))


def room(answer: Candidate) -> Array | None:
    """The margin of the ball route for every token, (..., 1): 1 − mean(u²); None in symbols."""
    xp = arithmetic(answer.unit)
    return None if xp.symbolic else 1 - xp.mean(answer.unit * answer.unit)


def revived(xp: Arithmetic, G: Array, m: Array) -> Array:
    """m with a usable value where m_i = 0 but G_i ≠ 0: no route can leave those entries alone."""
    dead = xp.is_zero(m)
    if not xp.any(dead):
        return m
    stuck, idle = dead & ~xp.is_zero(G), dead & xp.is_zero(G)
    m = m + xp.zeros_like(G)
    count = xp.sum(xp.where(xp.is_zero(m), xp.zeros_like(m), xp.zeros_like(m) + 1))
    usual = xp.sum(xp.magnitude(m)) / xp.where(xp.is_zero(count), count + 1, count)
    usual = xp.where(xp.is_zero(usual), usual + 1, usual)
    revived = xp.where(stuck, usual + xp.zeros_like(m), m)
    # where both are zero the quotient G/m is not needed: any non-zero value gives 0
    return xp.where(idle, xp.zeros_like(m) + 1, revived)


def usable_mean_square(xp: Arithmetic, y: Array, eps: Any) -> Array:
    """mean(y²), or a value of the order of ε (1 if ε = 0) where y is too small to keep its size."""
    r2 = xp.mean(y * y)
    floor = eps if eps != 0 else xp.number(1)
    small = xp.is_zero(r2) if xp.exact else r2 < (eps if eps != 0 else 1e-30)
    return xp.where(small, xp.zeros_like(r2) + floor, r2) if xp.any(small) else r2


def enlarged(G: Array, m: Array, eps: Any) -> tuple[Array, Array]:
    """(m', y* (T, d)) for all tokens at once: m' = c·m (c alone where m is 0) with a rational c ≥ every RMS(G_t/m); ε > 0.

    In closed form, for every arithmetic.
    """
    xp = arithmetic(G)
    m, eps = xp.or_one(m), xp.number(eps)
    ratio = G / m
    c = xp.mean(ratio * ratio).sum() + 1
    u = xp.name(ratio / c)
    return c * m, xp.name(u * xp.sqrt(eps / (1 - xp.mean(u * u))))


def _scale(xp: Arithmetic, G: Array, m: Array, y: Array, eps: Any, stored: Stored) -> Candidate:
    r2 = xp.mean(y * y)
    total = r2 + eps
    total = xp.where(xp.is_zero(total), total + 1, total)
    n = y / xp.sqrt(total)
    idle = xp.is_zero(n)
    delta = G - m * n
    open_ = (~idle | xp.is_zero(delta)).all(-1, keepdims=True)
    scale = xp.where(idle, m + xp.zeros_like(G), G / xp.where(idle, n + 1, n))
    return Candidate("scale", stored(scale), n, y, open_, _alive(xp, scale, m))


def _alive(xp: Arithmetic, scale: Array, m: Array) -> Array:
    """For which tokens no channel with m_i ≠ 0 is shut down (scaled to nothing); assumed of symbols."""
    if xp.symbolic:
        return xp.is_zero(xp.sum(scale) * 0)
    shut = xp.magnitude(scale) <= math.sqrt(xp.machine_epsilon(scale)) * xp.magnitude(m)
    return ~(shut & ~xp.is_zero(m + xp.zeros_like(scale))).any(-1, keepdims=True)


def amplification(chosen: Candidate, G: Array, y: Array, eps: Any) -> Array:
    """How much a rounding error of W y is magnified in the output, relative to max |G|: (..., 1)."""
    xp = arithmetic(G, y)
    size = xp.largest(y) + xp.largest(chosen.before)
    r = xp.or_one(xp.sqrt(xp.mean(chosen.before * chosen.before) + xp.number(eps)))
    return xp.largest(chosen.scale) * size / r / xp.or_one(xp.largest(G))


def choose(G: Array, m: Array, y: Array, eps: Any, stored: Stored) -> Candidate:
    """``auto``: balanced, which is next to the least amplification of noise on every target; nothing has to be compared.

    Fractions, in which it has irrational roots, take uniform, or scale where that has some too.
    """
    for route in ("balanced", "uniform"):
        try:
            return candidate(route, G, m, y, eps, stored)
        except NotExact:
            continue
    return candidate("scale", G, m, y, eps, stored)
