"""What one norm scale for many tokens is chosen from, in plain numbers, and the scales that can be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from controllability.arrays.lazy import np
from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.joint_scale import Targets, joint_scale
from controllability.solvers.nearest_scale import STAY, nearest_scale
from controllability.solvers.resorts import Resort

MAGNIFIED = 5e-6  # noise, times machine epsilon, above which a block had better do something else
CALM = 10.0  # noise up to which it need not in any precision
AFFINE = 1e-6  # differences of mean(u²) from q that count as none
FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
SHRUNK = 0.1  # no output is made smaller than this part of its size


class Chosen(NamedTuple):
    """A scale m' (d,), what must enter the norm (T, d), the order of resort, and what else there is to say of it."""

    scale: np.ndarray
    before: np.ndarray
    resort: Resort
    remark: str = ""


class ScaleTask(Targets):
    """The scales that can be had for these targets."""

    def exact(self, tolerance: float, keep_rms: bool) -> Chosen:
        """The scale with which every token reaches its target; tokens that differ by less than ``tolerance`` count as one.

        Raises ``Infeasible`` with a certificate about all tokens.
        """
        kept, like = distinct(np.column_stack([self.G, np.sqrt(self.square)]), tolerance)
        try:
            found = joint_scale(self.G[kept], self.m, self.square[kept], self.eps, self.stored, keep_rms)
        except Infeasible as refused:
            proof = refused.certificate
            raise Infeasible(None if proof is None else proof.among(kept, like)) from None
        remark = f"; {found.certificate}" if found.certificate is not None else ""
        return Chosen(found.scale, self._repeated(found.scale, found.before, like), found.resort, remark)

    def _repeated(self, scale: np.ndarray, before: np.ndarray, like: np.ndarray) -> np.ndarray:
        """What must enter the norm for every token: one that repeats another enters with the same RMS."""
        if len(before) == len(self.G):
            return before
        unit = np.divide(self.G, scale, out=np.zeros_like(self.G), where=self.G != 0)
        p, root = (unit**2).mean(-1), np.sqrt((before**2).mean(-1))[like]
        return unit * (root / np.sqrt(np.where(p == 0, 1.0, p)))[:, None]

    def nearest(self, resort: Resort, ridge: float = 0.0) -> Chosen:
        """Every token keeps its RMS and comes as near to its target as one scale allows."""
        found = nearest_scale(self.G, self.m, self.q, ridge or STAY, self.stored)
        return Chosen(found.scale, found.unit * self.root[:, None], resort)

    def fitted(self, ridge: float) -> Chosen:
        """The scale of a fit: it weighs its own change as the matrix before it does; without a weight an exact one will do."""
        if not ridge:
            try:
                found = joint_scale(self.G, self.m, self.square, self.eps, self.stored, keep_rms=True)
                return Chosen(found.scale, found.before, found.resort)
            except Infeasible:
                pass
        return self.nearest(Resort.FITTED, ridge)

    def sized(self, output: np.ndarray) -> Sized | None:
        """A scale with which every token keeps its RMS, where each (T, d) ``output`` may change its size; None if there is none."""
        return sized_scale(self.G, output, self.q, (self.m, self.nearest(Resort.SIZED).scale), self.stored)

    def resized(self, found: Sized, G: np.ndarray) -> Chosen | None:
        """That scale for the targets ``G`` of the new sizes; None where they are not what the sizes promised."""
        unit = G / found.scale
        if np.abs((unit**2).mean(-1) - self.q).max() > AFFINE:  # a bend between the norm and the block's output
            return None
        remark = f"; outputs change their sizes by factors {found.sizes.min():.3f} to {found.sizes.max():.3f}"
        return Chosen(found.scale, unit * self.root[:, None], Resort.SIZED, remark)

    def amplification(self, chosen: Chosen) -> np.ndarray:
        """How much a rounding error of W y, relative to its largest entry, is magnified in m'∘n(y*), relative to G's, (T, 1)."""
        now, then = self.square + self.eps, (chosen.before**2).mean(-1) + self.eps
        then = np.where(then == 0, 1.0, then)
        size = np.abs(self.G).max(-1)
        peak = np.abs(chosen.before).max(-1) / np.sqrt(then) * np.maximum(1.0, np.sqrt(now / then))
        return np.maximum(1.0, np.abs(chosen.scale).max() * peak / np.where(size == 0, 1.0, size))[:, None]

    def is_calm(self, chosen: Chosen, epsilon: float) -> bool:
        """Whether the rounding of a computation with machine ``epsilon`` is magnified little enough."""
        return bool(self.noise(chosen.scale, chosen.before).max() <= max(CALM, MAGNIFIED / epsilon))

    def told(self, chosen: Chosen) -> str:
        """What a report says of it."""
        noise = self.noise(chosen.scale, chosen.before).max()
        return f"noise before the norm is magnified by {noise:.3g}{chosen.remark}"


def distinct(rows: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that differ, (K,); which of them each token repeats but for rounding, (T,)).

    A prefix that several sequences share is computed several times, and rounded differently: it is one equation, not many.
    """
    kept: list[int] = []
    like = np.zeros(len(rows), dtype=int)
    sizes = np.abs(rows).max(-1)
    for t, row in enumerate(rows):
        apart = np.abs(rows[kept] - row).max(-1) if kept else np.zeros(0)
        near = np.flatnonzero(apart <= tolerance * sizes[t])
        like[t] = near[0] if len(near) else len(kept)
        if not len(near):
            kept.append(t)
    return np.array(kept), like


class Sized(NamedTuple):
    """The scale m' (d,), and c_t (T,): the factors by which the outputs change their sizes."""

    scale: np.ndarray
    sizes: np.ndarray


def sized_scale(
    G: np.ndarray, output: np.ndarray, q: np.ndarray, scales: Iterable[np.ndarray],
    stored: Callable[[np.ndarray], np.ndarray] = lambda scale: scale,
) -> Sized | None:  # fmt: skip
    """Of ``scales`` (d,) and their multiples, the one whose c_t stay nearest to 1; None if there is none.  (new)

    Where nothing but a normalisation reads a block's output, o_t and c·o_t with c > 0 are the same to it.  The branch in front
    of that sum must then give G_t + (c_t − 1)·o_t, and mean(((G_t + (c_t − 1)·o_t)/m')²) = q_t is a quadratic equation for
    c_t, for any scale m': every token keeps the RMS before the norm, and Theorem 1 holds up to the c_t.

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
