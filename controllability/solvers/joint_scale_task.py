"""What one norm scale for many tokens is chosen from, in plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from controllability.solvers.nearest_scale import STAY, nearest_scale, to_keep
from controllability.solvers.resorts import Resort


class Chosen(NamedTuple):
    """A scale m' (d,), what must enter the norm (T, d), the order of resort, and what else there is to say of it."""

    scale: np.ndarray
    before: np.ndarray
    resort: Resort
    remark: str = ""


@dataclass(frozen=True, eq=False)
class _Numbers:
    """What one scale is chosen from: targets G (T, d), mean squares (T,) before the norm, the scale m (d,), ε."""

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

    def nearest(self, resort: Resort, ridge: float = 0.0) -> Chosen:
        """Every token keeps its RMS and comes as near to its target as one scale allows."""
        found = nearest_scale(self.G, self.m, self.q, ridge or STAY, self.stored)
        return Chosen(found.scale, found.unit * self.root, resort)

    def reached(self, scale: np.ndarray, before: np.ndarray, like: np.ndarray) -> np.ndarray:
        """What must enter the norm for every token: one that repeats another enters with the same RMS."""
        if len(before) == len(self.G):
            return before
        unit = np.divide(self.G, scale, out=np.zeros_like(self.G), where=self.G != 0)
        p, root = (unit**2).mean(-1), np.sqrt((before**2).mean(-1))[like]
        return unit * (root / np.sqrt(np.where(p == 0, 1.0, p)))[:, None]

    def amplification(self, chosen: Chosen) -> np.ndarray:
        """How much a rounding error of W y, relative to its largest entry, is magnified in m'∘n(y*), relative to G's, (T, 1)."""
        now, then = self.square + self.eps, (chosen.before**2).mean(-1) + self.eps
        then = np.where(then == 0, 1.0, then)
        size = np.abs(self.G).max(-1)
        peak = np.abs(chosen.before).max(-1) / np.sqrt(then) * np.maximum(1.0, np.sqrt(now / then))
        return np.maximum(1.0, np.abs(chosen.scale).max() * peak / np.where(size == 0, 1.0, size))[:, None]

    def change(self, chosen: Chosen) -> float:
        """The largest m'/m or m/m' of a channel."""
        alive = (self.m != 0) & (chosen.scale != 0)
        ratio = np.abs(chosen.scale[alive] / self.m[alive])
        return float(max(ratio.max(), 1 / ratio.min())) if ratio.size else 1.0


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
