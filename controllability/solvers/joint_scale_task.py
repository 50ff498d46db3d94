"""What one norm scale for many tokens is chosen from, in plain numbers, and the scales that can be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.free_sizes import Sized, sized_scale
from controllability.solvers.joint_scale import joint_scale
from controllability.solvers.nearest_scale import STAY, largest_change, nearest_scale, to_keep
from controllability.solvers.resorts import Resort

MAGNIFIED = 5e-6  # amplification, times machine epsilon, above which a block had better do something else
CALM = 10.0  # amplification up to which it need not in any precision
AFFINE = 1e-6  # differences of mean(u²) from q that count as none


class Chosen(NamedTuple):
    """A scale m' (d,), what must enter the norm (T, d), the order of resort, and what else there is to say of it."""

    scale: np.ndarray
    before: np.ndarray
    resort: Resort
    remark: str = ""


@dataclass(frozen=True, eq=False)
class ScaleTask:
    """What one scale is chosen from: targets G (T, d), mean squares (T,) before the norm, the scale m (d,), ε.

    ``stored`` rounds a scale to what the parameter can hold.
    """

    G: np.ndarray
    square: np.ndarray
    m: np.ndarray
    eps: float
    stored: Callable[[np.ndarray], np.ndarray]

    @property
    def usual(self) -> np.ndarray:
        """The mean squares, where there is an RMS to keep."""
        return to_keep(self.square, self.eps)

    @property
    def q(self) -> np.ndarray:
        """mean(u²) of a token that keeps its RMS, (T,)."""
        return self.usual / (self.usual + self.eps)

    @property
    def root(self) -> np.ndarray:
        """√(r²+ε) of a token that keeps its RMS, (T, 1)."""
        return np.sqrt(self.usual + self.eps)[:, None]

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
        return Chosen(found.scale, found.unit * self.root, resort)

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
        return Chosen(found.scale, unit * self.root, Resort.SIZED, remark)

    def amplification(self, chosen: Chosen) -> np.ndarray:
        """How much a rounding error of W y, relative to its largest entry, is magnified in m'∘n(y*), relative to G's, (T, 1)."""
        now, then = self.square + self.eps, (chosen.before**2).mean(-1) + self.eps
        then = np.where(then == 0, 1.0, then)
        size = np.abs(self.G).max(-1)
        peak = np.abs(chosen.before).max(-1) / np.sqrt(then) * np.maximum(1.0, np.sqrt(now / then))
        return np.maximum(1.0, np.abs(chosen.scale).max() * peak / np.where(size == 0, 1.0, size))[:, None]

    def is_calm(self, chosen: Chosen, epsilon: float) -> bool:
        """Whether the rounding of a computation with machine ``epsilon`` is magnified little enough."""
        return bool(self.amplification(chosen).max() <= max(CALM, MAGNIFIED / epsilon))

    def change(self, chosen: Chosen) -> float:
        """The largest m'/m or m/m' of a channel."""
        return largest_change(chosen.scale, self.m)


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
