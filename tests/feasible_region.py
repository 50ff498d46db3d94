"""The picture of docs/joint-patches.md: which scales let two tokens in d = 3 keep their RMS, and what shows that none does.

In s = 1/m'² each token is one equation: a plane.  ``python tests/feasible_region.py docs/feasible-region.png``
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from controllability.rendering.figure import drawn, legend_below, two_plots
from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.joint_scale import joint_scale

EPS = 1e-2  # of the norm; both tokens enter it with RMS 1
FEASIBLE = ((2.0, 1.0, 1.0), (1.0, 1.5, 2.0))  # G: what each token must give behind the norm
EMPTY = ((1.0, 1.0, 1.5), (1.5, 2.0, 2.0))
BLUE, ORANGE, DARK, GREY = "#2a6fbb", "#bb5a2a", "#1c2128", "#8a929b"
SLANT = np.array([[-0.45, -0.35], [1.0, -0.14], [0.0, 1.0]])  # where the three axes of s point on the page


def equations(G: Any, eps: float = EPS) -> tuple[np.ndarray, np.ndarray]:
    """(A (T, d), q (T,)) of "every token keeps its RMS, which is 1": A_ti = G_ti²/d, q_t = 1/(1 + eps)."""
    G = np.asarray(G, dtype=float)
    return G**2 / G.shape[1], np.full(len(G), 1 / (1 + eps))


def segment(A: np.ndarray, q: np.ndarray) -> np.ndarray | None:
    """The ends (2, 3) of {s ≥ 0: A s = q} for A (2, 3) with positive entries; None where it is empty.

    >>> segment(np.array([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]), np.array([1.0, 1.0])).round(3) + 0.0
    array([[0.   , 1.   , 0.   ],
           [0.333, 0.   , 0.333]])
    >>> segment(np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 3.0]]), np.array([1.0, 1.0])) is None
    True
    """
    ends = []
    for i, j in combinations(range(3), 2):  # where the line leaves the octant, one entry of s is 0
        if abs(np.linalg.det(A[:, (i, j)])) > 1e-12:
            s = np.zeros(3)
            s[[i, j]] = np.linalg.solve(A[:, (i, j)], q)
            if s.min() > -1e-12 and not any(np.allclose(s, end) for end in ends):
                ends.append(s)
    return np.array(sorted(map(list, ends))) if len(ends) == 2 else None


def feasible_picture(path: Path) -> Path:
    """Draw both cases to ``path`` (PNG, written atomically); returns the path.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     feasible_picture(Path(folder) / "picture.png").read_bytes()[1:4]
    b'PNG'
    """
    figure, axes = two_plots(2, (8, 8))
    for column, G in enumerate((FEASIBLE, EMPTY)):
        _octant(axes[0, column], G)
        _tokens(axes[1, column], G)
    return drawn(figure, path, 90, pil_kwargs={"optimize": True})


def _octant(axes: Any, G: Any) -> None:
    """The two planes A_t·s = q_t where s ≥ 0, as triangles, and what they share."""
    A, q = equations(G)
    for i, along in enumerate(SLANT):
        axes.annotate("", 3.3 * along, (0, 0), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.text(*(3.55 * along), f"$s_{i + 1}$", ha="center", va="center")
    for t, colour in enumerate((BLUE, ORANGE)):
        corners = (q[t] / A[t])[:, None] * SLANT
        label = f"token {t + 1}: $A_{t + 1}\\cdot s=q_{t + 1}$"
        axes.fill(*corners.T, facecolor=colour, alpha=0.25, edgecolor=colour, label=label)
    ends = segment(A, q)
    if ends is not None:
        axes.plot(*(ends @ SLANT).T, color=DARK, linewidth=3, solid_capstyle="round", label="both")
        taken = 1 / joint_scale(np.array(G), np.ones(3), np.ones(2), EPS).scale ** 2
        axes.plot(*(taken @ SLANT), "o", color="white", markeredgecolor=DARK, markersize=9, label="taken: least noise")
    axes.set_title("s > 0: they meet in a segment" if ends is not None else "s > 0: they do not meet")
    axes.set(xlim=(-1.9, 3.9), ylim=(-1.2, 3.8), aspect="equal")
    axes.axis("off")
    legend_below(axes, 0.0)


def _tokens(axes: Any, G: Any) -> None:
    """One axis a token: q is a mixture of A's columns with weights s > 0, or a line (its normal is λ) keeps it apart."""
    A, q = equations(G)
    order = np.argsort(np.arctan2(A[1], A[0]))
    reach = 3 * A[:, order[[0, -1]]]
    axes.fill([0, *reach[0]], [0, *reach[1]], color="#e3f3e8", label="A s for all s > 0")
    for i, column in enumerate(A.T):
        axes.annotate("", column, (0, 0), arrowprops={"arrowstyle": "->", "color": "#17603a", "linewidth": 1.8})
        axes.text(*(1.06 * column + [0, 0.02]), str(i + 1), ha="center", va="center", color="#17603a")
    axes.plot([], color="#17603a", linewidth=1.8, label="columns of A")
    axes.plot(*q, "o", color="#a80020", label="q")
    title = "q is a mixture of the columns"
    found = _farkas(G)
    if found is not None:
        normal = 0.5 * found / np.linalg.norm(found)
        along = np.array([normal[1], -normal[0]])
        axes.plot(*(np.array([-1, 4])[:, None] * along).T, "--", color=DARK, label="line with normal λ")
        axes.annotate("", normal, (0, 0), arrowprops={"arrowstyle": "->", "color": DARK, "linewidth": 2.2})
        axes.text(*(1.1 * normal), "λ", ha="right", va="bottom", fontsize="large")
        title = "λ keeps q apart from every mixture"
    size = 1.15 * max(A.max(), q.max())
    labels = {"title": title, "xlabel": "equation of token 1", "ylabel": "equation of token 2"}
    axes.set(xlim=(-0.6, size), ylim=(-0.3, size), aspect="equal", **labels)
    legend_below(axes)


def _farkas(G: Any) -> np.ndarray | None:
    try:
        joint_scale(np.array(G), np.ones(3), np.ones(2), EPS, keep_rms=True)
    except Infeasible as refused:
        assert refused.certificate is not None and refused.certificate.holds()
        return np.array([float(weight) for weight in refused.certificate.weights])
    return None


if __name__ == "__main__":
    feasible_picture(Path(sys.argv[1] if sys.argv[1:] else "feasible-region.png"))
