"""One scale for many tokens whose sizes afterwards do not count.  (new)

Where nothing but a normalisation reads a block's output, o_t and c·o_t with c > 0 are the same to it.  The branch in front of
that sum must then give G_t + (c_t − 1)·o_t, and mean(((G_t + (c_t − 1)·o_t)/m')²) = q_t is a quadratic equation for
c_t, for any scale m': every token keeps the RMS before the norm, and Theorem 1 holds up to the c_t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
SHRUNK = 0.1  # no output is made smaller than this part of its size


class Sized(NamedTuple):
    """The scale m' (d,), and c_t (T,): the factors by which the outputs change their sizes."""

    scale: np.ndarray
    sizes: np.ndarray


def sized_scale(
    G: np.ndarray, output: np.ndarray, q: np.ndarray, scales: Iterable[np.ndarray],
    stored: Callable[[np.ndarray], np.ndarray] = lambda scale: scale,
) -> Sized | None:  # fmt: skip
    """Of ``scales`` (d,) and their multiples, the one whose c_t stay nearest to 1; None if there is none.

    ``G`` (T, d) is what the normalised branch must give for ``output`` (T, d), the block's, and ``q`` (T,) = r²/(r²+ε).

    >>> import numpy as np
    >>> G, output = np.array([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([[4.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    >>> found = sized_scale(G, output, np.ones(3), [np.ones(2)])
    >>> unit = (G + (found.sizes - 1)[:, None] * output) / found.scale
    >>> bool(np.allclose((unit**2).mean(-1), 1) and (found.sizes > 0).all())
    True
    """
    best: tuple[float, Sized] | None = None
    for scale in scales:
        for factor in FACTORS:
            held = stored(scale * factor)
            if (held == 0).any():
                continue
            sizes = _sizes(G / held, output / held, q)
            if sizes is None:
                continue
            worst = float(np.abs(np.log(sizes)).max())
            if best is None or worst < best[0]:
                best = worst, Sized(held, sizes)
    return None if best is None else best[1]


def _sizes(branch: np.ndarray, output: np.ndarray, q: np.ndarray) -> np.ndarray | None:
    """c_t with mean((branch_t + (c_t − 1)·output_t)²) = q_t, the root next to 1; None where a token has none."""
    a, b, p = (output**2).mean(-1), (branch * output).mean(-1), (branch**2).mean(-1) - q
    inside = b * b - a * p
    if (inside < 0).any() or (a == 0).any():
        return None
    far = -(b + np.where(b < 0, -1.0, 1.0) * np.sqrt(inside))  # without cancellation; the other root follows from it
    roots = np.stack([np.divide(p, far, out=np.zeros_like(p), where=far != 0), far / a])
    roots = np.where(1 + roots > SHRUNK, roots, np.inf)
    sizes = 1 + np.take_along_axis(roots, np.abs(roots).argmin(0)[None], 0)[0]
    return sizes if np.isfinite(sizes).all() else None
