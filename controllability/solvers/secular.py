"""The root of the secular equation.  [G, App. B]"""

from controllability.arrays import Arithmetic, Array
from controllability.errors import NotExact


def secular(xp: Arithmetic, G: Array, m: Array, q: Array) -> tuple[Array, Array]:
    """m' = m − μ/m and u = G∘m/(m²−μ) with mean(u²) = q, μ < min m²; the hard case included.

    With t = min m² − μ > 0 the equation is φ(t) = mean((G∘m/(m² − min m² + t))²) = q; Newton on
    φ^(−1/2), which is concave and nearly linear, climbs to the root from below.  Raises
    ``NotExact`` for symbols and fractions, whose root has no closed form.
    """
    gm = G * m
    if xp.kind == "indexed":  # μ as what it is: the root of its equation
        mu = xp.root("mu", lambda mu: xp.mean((gm / (m * m - mu)) ** 2), q)
        return (m * m - mu) / m, gm / (m * m - mu)
    if xp.exact:
        found = "the secular route needs the root of a polynomial of degree 2d"
        raise NotExact(f"{found}: use uniform or scale in exact arithmetic")
    lowest = xp.min(m * m)
    deltas = m * m - lowest + xp.zeros_like(G)
    bottom = xp.is_zero(deltas)
    quiet = bottom & xp.is_zero(gm)  # coordinates at the bottom without a target: the hard case lives there
    a = gm * gm
    d = G.shape[-1]
    t = xp.max(xp.sqrt(a / (d * q)) - deltas)
    t = xp.where(t > 0, t, xp.zeros_like(t))
    base = xp.where(quiet, deltas + 1, deltas)
    hard = xp.is_zero(t) & (bottom == quiet).all(-1, keepdims=True)
    if xp.any(hard):
        hard = hard & (xp.mean(a / xp.where(xp.is_zero(base), base + 1, base) ** 2) <= q)
    tolerance = 4 * xp.machine_epsilon(G)
    for _ in range(100):
        weights = a / ((base + t) * (base + t))
        phi, slope = xp.mean(weights), xp.mean(weights / (base + t))
        step = phi * (xp.sqrt(phi / q) - 1) / xp.where(xp.is_zero(slope), slope + 1, slope)
        step = xp.where((step > 0) & ~hard, step, t * 0)
        t = t + step
        if xp.all(step <= tolerance * t):
            break
    t = xp.where(hard, t * 0, t)
    spread = deltas + t
    u = gm / xp.where(xp.is_zero(spread), spread + 1, spread)
    if not xp.any(hard):
        return spread / m, u
    missing = q * d - xp.sum(xp.where(quiet, u * 0, u * u))
    missing = xp.where(hard & (missing > 0), missing, missing * 0)
    how_many = xp.sum(xp.where(bottom, a * 0 + 1, a * 0))
    u = xp.where(hard & bottom, xp.sqrt(missing / how_many) + u * 0, u)
    return spread / m, u
