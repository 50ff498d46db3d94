"""What a joint solver remembers of the tokens that it has served, so that others can be added."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from controllability.jointly.span import Span


@dataclass(frozen=True, eq=False)
class Known:
    """The tokens of one steered leaf, NumPy arrays with the tokens on axis 0.

    ``x`` what the leaf reads, ``gap`` what was added to its outputs ``raw``; ``index`` their experts.  ``span`` and ``left`` are
    the solution so far, where it can be continued without solving anew.
    """

    x: np.ndarray
    gap: np.ndarray
    raw: np.ndarray
    index: np.ndarray | None = None
    span: Span | None = None
    left: np.ndarray | None = None
    parts: dict[int, Known] = field(default_factory=dict)  # expert by expert; their ``index`` are numbers of tokens
    used: np.ndarray | None = None  # the experts whose stacked inputs the span is of, ascending

    def moved(self, change: np.ndarray) -> Known:
        """The same tokens with other targets: ``change`` (T, m) is added to the gaps; the left factor alone is solved anew."""
        gap = self.gap + change
        left = None if self.span is None else self.span.solve(gap)[0]
        return replace(self, gap=gap, left=left)

    @staticmethod
    def joined(earlier: Known | None, later: Known) -> Known:
        """The tokens of both, the earlier first; the solution is the later's."""
        if earlier is None:
            return later
        x, gap, raw = (np.concatenate([getattr(k, n) for k in (earlier, later)]) for n in ("x", "gap", "raw"))
        index = None
        if earlier.index is not None and later.index is not None:
            index = np.concatenate([earlier.index, later.index])
        return Known(x, gap, raw, index, later.span, later.left)


def among(known: Known, used: np.ndarray) -> Known:
    """The same with its stacked inputs among those of ``used``, experts that contain its own."""
    if known.span is None or known.used is None or len(used) == len(known.used):
        return known
    places = np.searchsorted(used, known.used)

    def wider(rows: np.ndarray) -> np.ndarray:
        planes = rows.reshape(len(rows), len(places), -1)
        whole = np.zeros((len(rows), len(used), planes.shape[-1]))
        whole[:, places] = planes
        return whole.reshape(len(rows), -1)

    return replace(known, x=wider(known.x), span=replace(known.span, basis=wider(known.span.basis)), used=used)


def continued(known: Known, x: np.ndarray, gap: np.ndarray, raw: np.ndarray) -> tuple[Known, np.ndarray]:
    """(the tokens with ``x`` (N, n) and ``gap`` (N, m) among them, what is left over of the new gaps).

    Each new token brings one direction, orthogonal to the earlier tokens' inputs: what they give does not move.  O(rank · width)
    a token.  Source: theory 5, streaming (new).
    """
    span, left = known.span, known.left
    assert span is not None and left is not None
    rest = np.zeros_like(gap)
    for i, (row, wanted) in enumerate(zip(x, gap, strict=True)):
        span, direction = span.extended(row)
        place = span.coordinates[-1]
        if direction is None:
            rest[i] = wanted - place @ left
        else:
            left = np.vstack([left, (wanted - place[:-1] @ left) / place[-1]])
    return Known.joined(known, Known(x, gap, raw, None, span, left)), rest
