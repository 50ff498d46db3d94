"""What a joint solver remembers of the tokens that it has served, so that others can be added."""

from dataclasses import dataclass, field, replace

from controllability.arrays.lazy import np
from controllability.solvers.growing_array import Memory
from controllability.solvers.least_norm import Span


class NotContinued(Exception):
    """Tokens cannot be added to this patch one by one: it has to be solved anew."""


@dataclass(frozen=True, eq=False)
class Known:
    """The tokens of one steered leaf, NumPy arrays with the tokens on axis 0.

    ``x`` what the leaf reads, ``delta`` what was added to its outputs ``raw``; ``index`` their experts.  ``span`` and ``left`` are
    the solution so far, where it can be continued without solving anew.
    """

    x: np.ndarray
    delta: np.ndarray
    raw: np.ndarray
    index: np.ndarray | None = None
    span: Span | None = None
    left: np.ndarray | None = None
    parts: "dict[int, Known]" = field(default_factory=dict)  # expert by expert; their ``index`` are numbers of tokens
    used: np.ndarray | None = None  # the experts whose stacked inputs the span is of, ascending
    memory: Memory = field(default_factory=Memory, repr=False)

    def moved(self, change: np.ndarray) -> "Known":
        """These tokens with other targets: ``change`` (T, m) is added to their δ; the left factor alone is solved anew.

        Where tokens depend on each other and their new targets do not, there is no solution to go on from.
        """
        delta = self.delta + change
        if self.span is None:
            return replace(self, delta=delta)
        left, rest = self.span.solve(delta)
        if self.span.rank < len(delta):
            size = np.maximum(np.abs(self.raw).max(-1), np.abs(delta).max(-1))
            if not bool((np.abs(rest).max(-1) <= self.span.tolerance * np.where(size == 0, 1.0, size)).all()):
                return replace(self, delta=delta, span=None, left=None)
        return replace(self, delta=delta, left=left)

    @staticmethod
    def joined(earlier: "Known | None", later: "Known") -> "Known":
        """The tokens of both, the earlier first; the solution is the later's."""
        if earlier is None:
            return later
        memory = earlier.memory

        def both(name: str) -> np.ndarray:
            rows, more = getattr(earlier, name), getattr(later, name)
            if rows.dtype == object or rows.ndim != 2:  # an empty place would not say of what kind its number is
                return np.concatenate([rows, more])
            return memory.grown(name, rows, more)

        index = both("index") if earlier.index is not None and later.index is not None else None
        return Known(both("x"), both("delta"), both("raw"), index, later.span, later.left, memory=memory)


def among(known: Known, used: np.ndarray) -> Known:
    """These tokens with their stacked inputs laid out for the experts ``used``, among which are their own."""
    if known.span is None or known.used is None or len(used) == len(known.used):
        return known
    places = np.searchsorted(used, known.used)

    def wider(rows: np.ndarray) -> np.ndarray:
        planes = rows.reshape(len(rows), len(places), -1)
        whole = np.zeros((len(rows), len(used), planes.shape[-1]))
        whole[:, places] = planes
        return whole.reshape(len(rows), -1)

    return replace(known, x=wider(known.x), span=replace(known.span, basis=wider(known.span.basis)), used=used)


def continued(known: Known, x: np.ndarray, delta: np.ndarray, raw: np.ndarray) -> tuple[Known, np.ndarray]:
    """(the tokens with ``x`` (N, n) and ``delta`` (N, m) among them, what is left over of the new δ).

    Each new token brings one direction, orthogonal to the earlier tokens' inputs: what they give does not move.  O(rank · width)
    a token.  Raises ``NotContinued`` for a direction of rounding alone, as a token brings that is served already (the beginning
    of another sequence): what it lacks, rounding too, would be divided by it.  Source: theory 5, streaming (new).
    """
    span, left = known.span, known.left
    assert span is not None and left is not None
    rest = np.zeros_like(delta)
    for i, (row, wanted) in enumerate(zip(x, delta, strict=True)):
        span, direction = span.extended(row)
        place = span.coordinates[-1]
        if direction is None:
            rest[i] = wanted - place @ left
        elif place[-1] <= np.sqrt(span.tolerance) * np.linalg.norm(row):
            raise NotContinued("a token differs from earlier ones by little more than rounding")
        else:
            left = known.memory.grown("left", left, ((wanted - place[:-1] @ left) / place[-1])[None])
    return Known.joined(known, Known(x, delta, raw, None, span, left)), rest
