"""The scale behind a centred normalisation without a bias: with t = 1/m', Σ G_i t_i = 0 and mean(G_i² t_i²) = q.  (theory 4; new)

Balanced weights give t⁰ = sign(m)/√w and x = G∘t⁰.  Of the channels with x_i > 0 and x_i < 0 each side is multiplied by a factor, so
that the mean vanishes: u ∝ x∘f with f_i = mean|x| − sign(x_i)·mean(x).  f > 0 exactly when x has both signs, and the signs of m stay.
"""

from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.errors import NotExact
from controllability.solvers.norm_scale import Candidate, balanced_weights, revived, settled, usable_mean_square
from controllability.solvers.stored_scale import Stored, stored_scale


def centred(G: Array, m: Array, y: Array, eps: Any, stored: Stored) -> tuple[Candidate, Array | None]:
    """(m', u and y* for every token, its margin min(f)/mean|x| (..., 1), None in symbols).  Zero entries of m and G = 0 included.

    >>> import numpy as np
    >>> G, m, y = np.array([[2.0, -1.0, 0.5]]), np.array([1.0, 2.0, -1.0]), np.array([[1.0, 0.0, -3.0]])
    >>> answer, margin = centred(G, m, y, 1e-6, lambda scale, side=0: scale)
    >>> bool(abs(answer.before.mean()) < 1e-12), bool(np.allclose(answer.scale * answer.unit, G)), bool(margin > 0)
    (True, True, True)
    """
    xp = arithmetic(G, m, y)
    if xp.exact and not xp.symbolic:
        raise NotExact("the balanced route of a centred normalisation has irrational roots")
    eps = xp.number(eps)
    live = revived(xp, G, m)
    r2 = xp.name(usable_mean_square(xp, y - xp.mean(y), eps))
    q = r2 / (r2 + eps)
    root = xp.sqrt(balanced_weights(xp, G, live))
    sign = live / xp.magnitude(live)
    x = xp.name(G * sign / root)
    size, mean = xp.name(xp.mean(xp.magnitude(x))), xp.name(xp.mean(x))
    moved = xp.name(x * size - xp.magnitude(x) * mean)  # x∘f
    unit = moved * xp.sqrt(q) / xp.sqrt(xp.or_one(xp.name(xp.mean(moved * moved))))
    idle = xp.is_zero(unit)
    scale = xp.where(idle, live + xp.zeros_like(G), G / xp.where(idle, unit + 1, unit))
    nothing = xp.is_zero(G).all(-1, keepdims=True)
    room = None if xp.symbolic else 1 - xp.magnitude(mean) / xp.or_one(size)
    open_ = xp.is_zero(q * 0) if room is None else nothing | (room > 0)
    scale, u = settled(xp, G, m, scale, unit, lambda wanted: stored_scale(xp, G, wanted, stored))
    before = u * xp.sqrt(r2 + eps)
    margin = None if room is None else xp.where(nothing, xp.zeros_like(room) + 1, room)
    return Candidate("balanced", scale, u, before, open_, open_), margin
