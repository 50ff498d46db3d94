"""A fit of many tokens by one matrix that ordinary text feels little.  (theory 7)

ΔW minimises Σ_t ω_t ‖ΔW x_t − δ_t‖²/‖x_t‖² + tr(ΔW B ΔWᵀ) with Σω = 1 and B = λ·C + μ·(tr C/n)·I, C the second moment of the
directions that the matrix reads on ordinary text.  As B → 0, in whatever proportion, this is the exact patch of least drift in the
metric B; with one token and large λ it is ROME's edit, with C = I a ridge as in theory 5.  Hard rows are reached exactly, the others as
well as can be beside them.  Solved in the tokens' own space: (X B⁻¹ Xᵀ + Ω⁻¹)·left = δ, T × T, where Ω⁻¹ is 0 for a hard row.
"""

from controllability.arrays.lazy import linalg, np
from controllability.errors import BadInput

NO_MOMENTS = "moments: a matrix is not positive, so it is no second moment: make them anew"
EQUAL = 1e-14  # of the largest singular value: what is below it says nothing that is not said already
FLOOR = 0.03  # μ: directions of which the texts say nothing are not free


class Drift:
    """B = λ·C + μ·(tr C/n)·I, factored once for every λ; without C the identity stands for it.

    >>> import numpy as np
    >>> Drift(np.eye(2)).solve(1.0, np.array([[1.03, 0.0]])).round(6).tolist()
    [[1.0, 0.0]]
    """

    def __init__(self, second: np.ndarray | None) -> None:
        self.second = second
        self._factors: dict[float, tuple[np.ndarray, bool]] = {}  # the last one: n³/3 operations

    def _factor(self, ridge: float) -> tuple[np.ndarray, bool]:
        if ridge not in self._factors:
            self._factors = {ridge: self._factored(ridge)}
        return self._factors[ridge]

    def _factored(self, ridge: float) -> tuple[np.ndarray, bool]:
        assert self.second is not None
        scaled = self.second * (len(self.second) / np.trace(self.second))
        try:
            return linalg.cho_factor(ridge * scaled + FLOOR * np.eye(len(scaled)), lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            raise BadInput(NO_MOMENTS) from None

    def solve(self, ridge: float, x: np.ndarray) -> np.ndarray:
        """B⁻¹x for rows x (T, n), in units in which tr C = n."""
        if self.second is None:
            return x / (ridge + FLOOR)
        return linalg.cho_solve(self._factor(ridge), x.T, check_finite=False).T


def metric_fit(
    x: np.ndarray,
    delta: np.ndarray,
    weights: np.ndarray,
    drift: Drift,
    ridge: float,
    rank: int | None = None,
    hard: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(left (r, m), right (r, n)) of ΔW = leftᵀ·right for rows ``x`` (T, n) and ``delta`` (T, m); ``weights`` (T,)
    add up to 1, and rows without any are left out.  ``hard`` (T,): the rows that are reached exactly, where they do not depend on each other.

    With a ``rank`` below T it is the best fit of that rank to the same objective, and no row is hard.

    >>> import numpy as np
    >>> rows, wanted = np.eye(3)[:2], np.array([[2.0], [0.0]])
    >>> left, right = metric_fit(rows, wanted, np.array([0.5, 0.5]), Drift(np.diag([1.0, 1.0, 9.0])), 1e-3)
    >>> (rows @ (left.T @ right).T).round(2).tolist()
    [[1.96], [0.0]]
    """
    used = weights > 0
    x, delta, weights = x[used], delta[used], weights[used]
    sizes = np.linalg.norm(x, axis=-1, keepdims=True)
    share = np.sqrt(weights)[:, None] / np.where(sizes == 0, 1.0, sizes)
    unit = np.sqrt(x.shape[-1])  # in which the second moment of a direction has trace n
    x, delta = x * share * unit, delta * share
    right = drift.solve(ridge, x)
    gram, soft = x @ right.T, np.ones(len(x))
    if hard is not None and rank is None:
        soft[hard[used]] = 0
    if soft.all():
        left = np.linalg.solve(gram + np.eye(len(x)), delta)
    else:  # hard rows that say the same twice leave it singular
        left = np.linalg.lstsq(gram + np.diag(soft), delta, rcond=EQUAL)[0]
    if rank is not None and rank < len(x):
        _, vectors = np.linalg.eigh(left.T @ gram @ delta)  # ΔW M ΔWᵀ: what each output direction adds to the objective
        kept = vectors[:, -rank:]
        left, right = kept.T.copy(), (left @ kept).T @ right
    return left, right * unit
