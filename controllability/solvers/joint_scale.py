"""One scale m' for all tokens of a normalised output: m'∘n(y*_t) = G_t.  (theory: one patch for many tokens; new)

In s = 1/m'² "every token keeps its RMS" is linear: A s = q with A_ti = G_ti²/d, q_t = r_t²/(r_t²+ε).
The unknowns here are σ = s·m², so that σ = 1 is the present scale.  Of all solutions the one is taken with the least

    Σ_i (m'_i² + τ·m_i⁴/m'_i²)/|m_i|  =  Σ_i |m_i|·(1/σ_i + τ·σ_i),    τ = ``programs.STAY`` = 0.01,

which is convex in s.  m'_i² is the noise that channel i passes on.  It counts in units of |m_i|, halfway between noise as it is
(which the few channels with huge m decide) and noise relative to what the channel has now (which those with tiny m
decide); τ keeps a channel alive that no token needs.  One token: m'⁴ = τ·m⁴ + λ·|m|·G² with one number λ, for τ = 0 in closed
form m'² = |G|·√|m| · mean(|G|/√|m|)/q.  Decided on a trained model: see the page on joint patches.  (new)
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from controllability.arrays.lazy import np
from controllability.errors import BadInput
from controllability.solvers import convex_programs as programs
from controllability.solvers.farkas_certificate import Farkas, Infeasible, find_farkas
from controllability.solvers.nearest_scale import largest_change, to_keep
from controllability.solvers.resorts import Resort

Vector = np.ndarray
ROUNDING = 32 * sys.float_info.epsilon  # differences of mean(u²) from q that count as none
TINY = 1e-6  # entries of m below this part of the mean |m| count as this large
GROWTH = 2.0  # "moved rms": no token's pre-norm target grows by more than this factor


@dataclass(frozen=True, eq=False)
class JointScale:
    """One scale for T tokens and where each has to enter the normalisation.

    ``scale`` (d,) is m' as the parameter holds it; ``unit`` (T, d) u_t = G_t/m'; ``before`` (T, d)
    y*_t = u_t·√(r_t²+ε) with mean(u_t²) = r_t²/(r_t²+ε), so that m'∘n(y*_t) = G_t.  ``resort`` says
    which order of resort it took, ``change`` is max over channels of m'/m and m/m' (1: unchanged), ``noise`` the worst
    token's ``Targets.noise``, ``shrinkage`` the largest factor by which a token's √(r_t²+ε) fell (1: kept), ``residual`` is
    max |m'∘n(y*_t) − G_t| / max |G_t| of the worst token (rounding, and what rounding m' leaves), and
    ``certificate`` proves "kept rms" impossible where another resort was taken.
    """

    scale: Vector
    unit: Vector
    before: Vector
    resort: Resort
    change: float
    noise: float
    shrinkage: float
    residual: float
    certificate: Farkas | None


def joint_scale(
    G: Vector, m: Vector, r2: Vector, eps: float,
    stored: Callable[[Vector], Vector] = lambda scale: scale, keep_rms: bool = False,
) -> JointScale:  # fmt: skip
    """One scale m' (d,) that lets all T tokens reach G (T, d) behind the normalisation, by the first resort open.

    ``m`` (d,) is the effective scale, ``r2`` (T,) mean(y_t²) of what enters the normalisation now (where
    it is next to nothing it counts as ε: there is no RMS to keep), ``stored`` rounds a scale to what the parameter can hold.
    Orders of resort: "kept rms" and "moved rms" with the least noise,
    "enlarged" (m' = c·m).  The last two need ε > 0.

    Raises ``Infeasible`` with the certificate where no scale keeps every RMS and ``keep_rms`` or ε = 0;
    ``BadInput`` for shapes and values that cannot be used.  Source: new (theory: one patch for many tokens).

    >>> import numpy as np
    >>> G = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0]])
    >>> answer = joint_scale(G, np.ones(3), r2=np.ones(2), eps=1e-6)
    >>> y = answer.before
    >>> n = y / np.sqrt(np.mean(y * y, -1, keepdims=True) + 1e-6)
    >>> answer.resort, np.allclose(answer.scale * n, G, rtol=1e-12), bool(np.allclose(np.mean(y * y, -1), 1))
    ('kept rms', True, True)
    """
    G, r2, m = (np.asarray(value, dtype=float) for value in (G, r2, m))
    task = _Task(G, r2, m, float(eps), stored)
    if not task.live.any():
        return task.finished(np.ones(task.d), Resort.KEPT, None)
    kept, hopeless = _keeping(task)
    if kept is not None:
        return kept
    certificate = find_farkas(task.A, task.q, hopeless)
    if keep_rms or eps == 0:
        raise Infeasible(certificate)
    return _moved(task, certificate) or _enlarged(task, certificate)


@dataclass(frozen=True, eq=False)
class Targets:
    """What one scale is chosen from: targets G (T, d), mean squares (T,) before the norm, the scale m (d,), ε.

    ``stored`` rounds a scale to what the parameter can hold.
    """

    G: Vector
    square: Vector
    m: Vector
    eps: float
    stored: Callable[[Vector], Vector]

    @cached_property
    def q(self) -> Vector:
        """mean(u²) of a token that keeps its RMS, (T,)."""
        kept = to_keep(self.square, self.eps)
        return kept / (kept + self.eps)

    @cached_property
    def root(self) -> Vector:
        """√(r²+ε) of a token that keeps its RMS, (T,)."""
        return np.sqrt(to_keep(self.square, self.eps) + self.eps)

    def noise(self, scale: Vector, before: Vector) -> Vector:
        """By how much noise in W y, relative to the RMS of y, is magnified in m'∘n(y*), relative to G's, (T,); 0 where G = 0.

        Where one token alone keeps its RMS the least is mean|G|/(RMS(G)·√q), about 1.
        """
        size, root = np.sqrt(np.mean(self.G**2, -1)), np.sqrt(np.mean(before**2, -1) + self.eps)
        there = (size > 0) & (root > 0)
        part = np.divide(self.root, root * size, out=np.zeros_like(root), where=there)
        return np.sqrt(np.mean(scale**2)) * part


@dataclass(frozen=True, eq=False)
class _Task(Targets):
    """Targets that can be used, with what is the same for every resort."""

    def __post_init__(self) -> None:
        G, m, r2, eps = self.G, self.m, self.square, self.eps
        if G.ndim != 2 or 0 in G.shape or m.shape != G.shape[1:] or r2.shape != G.shape[:1]:
            raise BadInput(f"joint_scale: G (T, d), m (d,) and r2 (T,) do not fit: {G.shape}, {m.shape}, {r2.shape}")
        finite = np.isfinite(self.A).all() and np.isfinite(m).all() and np.isfinite(r2).all() and np.isfinite(eps)
        if not finite or (r2 < 0).any() or eps < 0:
            raise BadInput("joint_scale: G², m, r2 ≥ 0 and eps ≥ 0 must be finite")

    @cached_property
    def A(self) -> Vector:  # noqa: N802 (the theory's name)
        """(T, d): mean(u²) as a function of s."""
        with np.errstate(over="ignore"):
            return self.G * self.G / self.d

    @cached_property
    def live(self) -> Vector:
        """(T,) tokens with G_t ≠ 0: the others take no part."""
        return np.any(self.A, axis=1).astype(bool)

    @cached_property
    def usual(self) -> Vector:
        """|m|, with the mean |m| where m_i = 0."""
        size = np.abs(self.m)
        typical = size[size > 0].mean() if size.any() else 1.0
        usual = np.where(size > 0, np.maximum(size, TINY * typical), typical)
        spread = np.sqrt(np.mean((self.G / usual) ** 2, -1).max())
        far = spread > 0 and not TINY < spread < 1 / TINY  # so far from now that the change is counted from c·m
        return usual * spread if far else usual

    @property
    def d(self) -> int:
        return len(self.m)

    def rows(self) -> Vector:
        """The live tokens' mean(u²) as a function of σ: (T', d)."""
        return (self.G[self.live] / self.usual) ** 2 / self.d

    def hold(self, sigma: Vector) -> Vector:
        """The scale of σ as the parameter holds it; no channel that is needed is rounded to nothing."""
        needed = self.G.any(0)
        scale = np.where(self.m < 0, -1.0, 1.0) * self.usual / np.sqrt(sigma)
        scale = np.where(needed, scale, self.m)
        held = np.asarray(self.stored(scale), dtype=float)
        for _ in range(60):
            lost = needed & (held == 0)
            if not lost.any():
                break
            scale = np.where(lost, 2 * scale, scale)
            held = np.asarray(self.stored(scale), dtype=float)
        return held

    def finished(self, sigma: Vector, resort: Resort, certificate: Farkas | None) -> JointScale:
        """The answer of σ: u of the scale as stored, and the RMS that belongs to it."""
        scale = self.hold(sigma)
        unit = np.divide(self.G, scale, out=np.zeros_like(self.G), where=scale != 0)
        root = self._roots(np.mean(unit * unit, -1), resort is Resort.KEPT)
        before = unit * root[:, None]
        return JointScale(
            scale, unit, before, resort,
            change=largest_change(scale, self.m),
            noise=float(self.noise(scale, before).max(initial=0)),
            shrinkage=float((self.root / root)[self.live].max(initial=1)),
            residual=self._residual(scale, before), certificate=certificate,
        )  # fmt: skip

    def _residual(self, scale: Vector, before: Vector) -> float:
        """max |m'∘n(y*_t) − G_t| / max |G_t|, worst token."""
        G, y = self.G[self.live], before[self.live]
        reached = scale * y / np.sqrt(np.mean(y * y, -1, keepdims=True) + self.eps)
        error = np.abs(reached - G).max(1, initial=0) / np.abs(G).max(1, initial=0)
        return float(error.max(initial=0))

    def _roots(self, p: Vector, kept: bool) -> Vector:
        """√(r_t²+ε) with p_t = r_t²/(r_t²+ε): ε/(1 − p_t), except where that is only rounding.

        The output feels an error of this root (1 − p_t)-fold only, so the cancellation in 1 − p_t is harmless.
        """
        open_ = self.live & (1 - p > ROUNDING / 2) & (self.eps > 0)
        root = np.sqrt(np.divide(self.eps, 1 - p, out=self.root**2, where=open_))
        if not kept:
            return root
        factor = root / self.root
        as_given = (np.abs(p - self.q) <= ROUNDING) | (factor > 2) | (factor < 0.5)
        return np.where(as_given, self.root, root)


def _keeping(task: _Task) -> tuple[JointScale | None, Vector | None]:
    """("kept rms" with the least noise, None), or (None, what the search saw of an obstacle)."""
    q = task.q[task.live]
    rows = task.rows() / q[:, None]
    sigma: Vector | None = np.ones(task.d)
    if np.abs(rows.sum(1) - 1).max() > ROUNDING:
        sigma, weights = programs.least_cost(rows, task.usual)
        if sigma is None:
            hopeless = np.zeros(len(task.q))
            hopeless[task.live] = 0 if weights is None else weights / q
            return None, hopeless
    return task.finished(sigma, Resort.KEPT, None), None


def _moved(task: _Task, certificate: Farkas | None) -> JointScale | None:
    """ "moved rms": about the least shrinkage, and of the scales that have it the one of least noise."""
    rows, w = task.rows(), task.eps / task.root[task.live] ** 2
    margin = np.maximum(w / GROWTH**2, 2 * ROUNDING)
    for _ in range(4):  # a coarse parameter needs more room: seen only after rounding
        sigma = programs.least_shrinkage(rows, w, margin, task.usual)
        if sigma is None:
            return None
        answer = task.finished(sigma, Resort.MOVED, certificate)
        if answer.residual <= programs.ACCEPTED:
            return answer
        held = np.mean(answer.unit[task.live] ** 2, -1)  # rounding the scale moved it from rows·σ
        margin = np.maximum(margin, 2 * np.abs(held - rows @ sigma).max())
    return None


def _enlarged(task: _Task, certificate: Farkas | None) -> JointScale:
    """ "enlarged", m' = c·m with growing c until the scale as stored has every token inside the ball."""
    rows = task.rows()
    for power in range(8):
        sigma = np.full(task.d, 0.5 * 0.25**power / rows.sum(1).max())
        answer = task.finished(sigma, Resort.ENLARGED, certificate)
        if answer.residual <= programs.ACCEPTED:
            break
    return answer
