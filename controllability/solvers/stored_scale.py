"""A scale as its parameter can hold it, without a loss of what it was solved for.  (new)

A norm's scale m' is solved with mean((G/m')²) = q.  Half precision rounds it, most of all where m' − 1 is stored and m' is small,
and u = G/m' of the rounded scale leaves the sphere that the norm can reach.  Every entry has two stored values beside
it, one that makes the mean larger and one that makes it smaller: which of the two is taken decides the mean to many digits.
"""

from collections.abc import Callable

from controllability.arrays import Arithmetic, Array

# (scale, side): the stored value nearest to it (side 0), or the next below (−1) or above (1)
Stored = Callable[..., Array]
ROUNDINGS = 8.0  # machine epsilons by which a mean of squares may be off: computing it is no better
FLIPS = 200  # entries at most that take the other one of their two values


def stored_scale(xp: Arithmetic, G: Array, scale: Array, stored: Stored) -> Array:
    """The stored scale (..., d) beside ``scale`` with the same mean((G/m')²), as nearly as the parameter allows.

    No entry that G needs becomes 0.  Entries with G_i = 0 are rounded to the nearest value.

    >>> import torch
    >>> from controllability.arrays import ARITHMETICS
    >>> G, scale = torch.ones(1, 64), 0.02 + 1e-3 * torch.arange(64.0)[None]
    >>> def float16(x, side=0):  # holds m − 1
    ...     near = (x - 1).half()
    ...     wrong = (near.float() > x - 1) if side < 0 else (near.float() < x - 1) if side > 0 else near != near
    ...     return torch.where(wrong, near.nextafter(torch.tensor(side * torch.inf).half()), near).float() + 1
    >>> off = lambda m: abs(float(((G / m) ** 2).mean() / ((G / scale) ** 2).mean()) - 1)
    >>> held = stored_scale(ARITHMETICS["torch"], G, scale, float16)
    >>> off(float16(scale)) > 1e-4, off(held) < 1e-5, bool((held == float16(held)).all())
    (True, True, True)
    """
    held = stored(scale)
    if xp.exact:
        return held
    used = ~xp.is_zero(G) & ~xp.is_zero(scale)
    q, near = xp.mean(_squares(xp, G, scale, used)), _squares(xp, G, held, used)
    if not xp.any(used & xp.is_zero(held)) and xp.all(abs(xp.mean(near) - q) <= ROUNDINGS * xp.machine_epsilon(G) * q):
        return held
    low, high = stored(scale, -1), stored(scale, 1)
    low, high = xp.where(xp.is_zero(low), high, low), xp.where(xp.is_zero(high), low, high)
    first = xp.where(xp.magnitude(low - scale) < xp.magnitude(high - scale), low, high)
    second = low + high - first
    a, b = _squares(xp, G, first, used), _squares(xp, G, second, used)
    count = G.shape[-1]
    taken = _flipped(xp, q * count - xp.sum(a), b - a, ROUNDINGS * xp.machine_epsilon(G) * q * count)
    return xp.where(used, xp.where(taken, second, first), held)


def _squares(xp: Arithmetic, G: Array, scale: Array, used: Array) -> Array:
    """(G/m')² where it counts, 0 elsewhere."""
    ratio = G / xp.where(used & ~xp.is_zero(scale), scale, xp.zeros_like(scale) + 1)
    return xp.where(used, ratio * ratio, xp.zeros_like(ratio))


def _flipped(xp: Arithmetic, missing: Array, gain: Array, enough: Array) -> Array:
    """Which of the entries are to add their ``gain`` (..., n), so that the sum comes near ``missing`` (..., 1).

    Again and again the entry is taken, or given back, that comes nearest; what is below ``enough`` counts as nothing.
    """
    ones = xp.zeros_like(gain) + 1
    sign = ones  # −1 where the entry has been taken
    for _ in range(min(FLIPS, gain.shape[-1])):
        after = xp.magnitude(missing - sign * gain)
        nearest = xp.top(-after, 1)
        better = (xp.take(after, nearest) < xp.magnitude(missing)) & (xp.magnitude(missing) > enough)
        if not xp.any(better):
            break
        turned = xp.where(better, xp.only(ones, nearest, 0), xp.zeros_like(ones))
        missing, sign = missing - xp.sum(turned * sign * gain), sign * (1 - 2 * turned)
    return sign < 0
