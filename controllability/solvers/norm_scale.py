"""Routes to a normalised output: which scale m' to take so that m' ∘ n(y*) = G.  (theory: RMSNorm, precisely)

All functions work on (..., d) arrays, one token a row.  ``G`` is what the normalised branch must
output, ``m`` the effective scale, ``y`` what enters the normalisation before its own patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controllability.arrays import Arithmetic, Array, arithmetic
from controllability.errors import BadInput, NotExact
from controllability.solvers.secular import secular

ROUTES = ("auto", "scale", "secular", "uniform", "ball")
INFINITE = float("inf")
GOOD, MILD = 30.0, 3.0  # amplification (no route has less than 1) and change at which `auto` takes uniform at once
CALM = 1e3  # amplification up to which `auto` looks no further than uniform and secular
NEAR = 10.0  # `auto`: amplifications within this factor of the best count as equally good
SHUT = 1e6  # added to the amplification of a route that shuts a channel down
COARSE = 1e-12  # machine epsilon above which `ball` loses too many digits to 1/√ε


@dataclass(frozen=True)
class Candidate:
    """One route's answer: scale m', unit-ball point u, pre-norm target y*, and where it holds.

    ``open`` (..., 1) says for which tokens the route exists; ``tame`` for which it leaves every
    channel alive.  Where tokens took different routes, ``winner`` (..., 1) says which of ``options`` each took.
    """

    route: str
    scale: Array
    unit: Array
    before: Array
    open: Array
    tame: Array
    options: tuple[str, ...] = ()
    winner: Array | None = None
    amplified: Array | None = None


def check_route(route: str) -> None:
    """Raise ``BadInput`` unless ``route`` is known."""
    if route not in ROUTES:
        raise BadInput(f"unknown route {route!r}: choose one of {', '.join(ROUTES)}")


def candidate(route: str, G: Array, m: Array, y: Array, eps: Any, stored: Any) -> Candidate:
    """The answer of one route (not ``auto``) for every token.

    ``stored(scale)`` rounds a scale to what the parameter can hold; u = G/m' is taken of that.
    Source: scale [G, Thm 1]; secular [G, App. B] with Δm = −μ/m (new); uniform, ball (new).
    """
    xp = arithmetic(G, m, y)
    eps = xp.number(eps)
    if route == "scale":
        return _scale(xp, G, m, y, eps, stored)
    live = _revived(xp, G, m)
    r2 = _usable_mean_square(xp, y, eps)
    q = r2 / (r2 + eps)
    everywhere = xp.is_zero(q * 0)
    if route == "ball":
        return _ball(xp, G, m, live, eps, stored)
    if route == "uniform":
        ratio = G / live
        scale, unit = xp.sqrt(xp.mean(ratio * ratio)) / xp.sqrt(q) * live, G * 0
        tame = everywhere
    else:
        scale, unit = secular(xp, G, live, q)
        tame = _alive(xp, scale, live)
    scale, u = _settled(xp, G, m, scale, unit, stored)
    return Candidate(route, scale, u, u * xp.sqrt(r2 + eps), everywhere, tame)


def _settled(xp: Arithmetic, G: Array, m: Array, scale: Array, unit: Array, stored: Any) -> tuple[Array, Array]:
    """(m' as stored, u = G/m'): where m'_i = 0 u comes from the solver; where G = 0 nothing moves and u = 0."""
    nothing = xp.is_zero(G).all(-1, keepdims=True)
    if xp.any(nothing):
        scale = xp.where(nothing, m + xp.zeros_like(G), scale)
        unit = xp.where(nothing, xp.zeros_like(unit), unit)
    scale = stored(scale)
    dead = xp.is_zero(scale)
    if not xp.any(dead):
        return scale, G / scale
    return scale, xp.where(dead, unit, G / xp.where(dead, scale + 1, scale))


def _ball(xp: Arithmetic, G: Array, m: Array, live: Array, eps: Any, stored: Any) -> Candidate:
    scale, u = _settled(xp, G, m, live + xp.zeros_like(G), G * 0, stored)
    room = 1 - xp.mean(u * u)
    open_ = xp.is_zero(room * 0) if xp.symbolic else room > 0
    open_ = open_ & ~(xp.is_zero(room * 0) & (eps == 0))  # without ε the image is the sphere, not the ball
    before = u * xp.sqrt(eps / xp.where(open_, room, xp.zeros_like(room) + 1))
    return Candidate("ball", scale, u, before, open_, xp.is_zero(room * 0))


def room(answer: Candidate) -> Array | None:
    """The margin of the ball route for every token, (..., 1): 1 − mean(u²); None in symbols."""
    xp = arithmetic(answer.unit)
    return None if xp.symbolic else 1 - xp.mean(answer.unit * answer.unit)


def _revived(xp: Arithmetic, G: Array, m: Array) -> Array:
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


def _usable_mean_square(xp: Arithmetic, y: Array, eps: Any) -> Array:
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


def _scale(xp: Arithmetic, G: Array, m: Array, y: Array, eps: Any, stored: Any) -> Candidate:
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


def relative_change(scale: Array, m: Array) -> Array:
    """max |m' − m| / |m| over the channels with m ≠ 0: (..., 1)."""
    xp = arithmetic(scale, m)
    change = scale - m
    change = xp.where(xp.is_zero(m), xp.zeros_like(change), change)
    return xp.largest(change / xp.or_one(m))


def choose(G: Array, m: Array, y: Array, eps: Any, stored: Any) -> tuple[Candidate, str, Callable[[], str]]:
    """``auto``: the best-conditioned route for every token.  Returns it, its name, and a function that says why.

    uniform is taken at once where it amplifies rounding at most ``GOOD`` times and changes no scale by more
    than ``MILD`` times itself.  Else secular is compared with it; scale and ball too where one of them
    amplifies more than ``CALM`` times.  Amplifications within a factor 10 of the best count as equal, and among those the
    smallest relative change of the scale wins.  Dead channels are avoided; ``ball`` below float64
    is taken only if nothing else is open.  Exact arithmetics cannot compare sizes: they take
    uniform, or scale where a root would be irrational.
    """
    xp = arithmetic(G, m, y)
    if xp.exact:
        try:
            return candidate("uniform", G, m, y, eps, stored), "uniform", lambda: "exact arithmetic: closed form"
        except NotExact:
            return candidate("scale", G, m, y, eps, stored), "scale", lambda: "exact arithmetic: no root needed"
    options = [_judged(xp, "uniform", G, m, y, eps, stored)]
    if xp.all(options[0].cost <= GOOD) and xp.all(options[0].change <= MILD):
        return options[0].answer, "uniform", _why(xp, options, " (good enough, no other was tried)")
    options.append(_judged(xp, "secular", G, m, y, eps, stored))
    if not all(xp.all(option.cost <= CALM) for option in options):
        options += [_judged(xp, route, G, m, y, eps, stored) for route in ("scale", "ball")]
    best = options[0].cost
    for option in options[1:]:
        best = xp.where(option.cost < best, option.cost, best)
    if xp.any(best == INFINITE):  # nothing is open but, perhaps, the last resort
        best = xp.where(best == INFINITE, options[-1].last_resort, best)
        options[-1].cost = xp.where(options[-1].cost == INFINITE, options[-1].last_resort, options[-1].cost)
    picked, smallest = options[0].answer, best * 0 + INFINITE
    winner = xp.zeros_like(best)
    for index, option in enumerate(options):
        better = (option.cost <= NEAR * best) & (option.change < smallest)
        picked = option.answer if xp.all(better) else _select(xp, better, option.answer, picked)
        smallest = xp.where(better, option.change, smallest)
        winner = xp.where(better, xp.zeros_like(winner) + index, winner)
    names = tuple(option.answer.route for option in options)
    used = "+".join(name for i, name in enumerate(names) if xp.any(winner == i))
    return replace(picked, options=names, winner=winner), used, _why(xp, options)


def _why(xp: Arithmetic, options: list[_Judged], remark: str = "") -> Callable[[], str]:
    """One phrase for each route, of its worst token; written when it is asked for, from two small arrays each."""
    seen = [(option.answer.route, option.cost, option.change) for option in options]

    def told() -> str:
        phrase = "{}: amplification {}, scale change {}".format
        return "; ".join(phrase(r, _worst(xp, cost), _worst(xp, change)) for r, cost, change in seen) + remark

    return told


@dataclass
class _Judged:
    """A candidate with what `auto` compares: cost (∞ where closed) and relative change, (..., 1) each."""

    answer: Candidate
    cost: Array
    change: Array
    last_resort: Array


def _judged(xp: Arithmetic, route: str, G: Array, m: Array, y: Array, eps: Any, stored: Any) -> _Judged:
    answer = candidate(route, G, m, y, eps, stored)
    amplified = amplification(answer, G, y, eps)
    usable = answer.open & (amplified < INFINITE)  # no NaN or infinity in the scale or before it
    kappa = amplified if xp.all(answer.tame) else xp.where(answer.tame, amplified, amplified + SHUT)
    closed = xp.zeros_like(kappa) + INFINITE
    last_resort = xp.where(usable, kappa, closed)
    cost = closed if route == "ball" and xp.machine_epsilon(G) > COARSE else last_resort
    return _Judged(replace(answer, amplified=amplified), cost, relative_change(answer.scale, m), last_resort)


def _select(xp: Arithmetic, mask: Array, a: Candidate, b: Candidate) -> Candidate:
    names = ("scale", "unit", "before", "open", "tame", "amplified")
    return Candidate("mixed", **{name: xp.where(mask, getattr(a, name), getattr(b, name)) for name in names})


def _worst(xp: Arithmetic, values: Array) -> str:
    worst = xp.to_float(xp.max(values.reshape(-1)).reshape(()))
    return "closed" if worst == float("inf") else f"{worst:.2g}"
