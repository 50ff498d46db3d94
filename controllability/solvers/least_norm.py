"""The row space of many tokens: what one matrix must do for all of them, solved with the least norm.

Rows are tokens, X (T, n) and δ (T, m).  ΔW x_t = δ_t for every t is solvable exactly when every dependency among
the rows of X is one among those of δ; the least-norm solution is Σ_k left_k right_kᵀ with ``right`` spanning the rows.
Floats are solved in float64 by a singular value decomposition; fractions, symbols and many-digit numbers by elimination.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.arrays.lazy import linalg, np
from controllability.solvers.growing_array import Memory
from controllability.symbolic.definitions import Definitions, kept

UNIT_ROUNDINGS = 100  # machine epsilons below which a direction of the unit rows counts as rounding


@dataclass(frozen=True, eq=False)
class Block:
    """Equations coordinates · left = δ of tokens that came at once, (T, r) floats; they are decomposed once."""

    coordinates: np.ndarray

    @cached_property
    def sizes(self) -> np.ndarray:
        """Length of each row, (T, 1)."""
        return _sizes(self.coordinates)

    @cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The singular value decomposition of the unit rows."""
        u, s, v = np.linalg.svd(self.coordinates / self.sizes, full_matrices=False)
        return u, np.maximum(s, np.finfo(float).tiny), v

    def solve(self, delta: np.ndarray, ridge: float = 0.0) -> np.ndarray:
        """Least squares in units of each token's size, (r, m)."""
        u, s, v = self.factors
        wanted = delta / self.sizes
        left = v.T @ ((s / (s * s + ridge))[:, None] * (u.T @ wanted))
        if not ridge:  # one step of refinement: what rounding left of the equations
            left = left + v.T @ ((u.T @ (wanted - self.coordinates / self.sizes @ left)) / s[:, None])
        return left


@dataclass(frozen=True, eq=False)
class Span:
    """X = coordinates · basis.  ``basis`` (r, n) has orthogonal rows; ``coordinates`` are (T, r).

    ``right`` (r, n) are the basis' rows over their squared lengths, so that right · x_t is row t of the coordinates.  ``tolerance``
    is the numerical rank's: directions in which unit rows reach no further are dropped.  NumPy arrays throughout.
    ``begun`` are the tokens before those that came one by one, if any did.

    >>> import numpy as np
    >>> span = Span.of(np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 1.0]]))
    >>> span.rank, bool(np.abs(span.solve(np.array([[1.0], [2.0], [3.0]]))[1]).max() < 1e-12)
    (2, True)
    """

    basis: np.ndarray
    coordinates: np.ndarray
    tolerance: float
    begun: Block | None = None
    memory: Memory = field(default_factory=Memory, repr=False)

    @staticmethod
    def of(x: Array, tolerance: float | None = None, named: bool = False) -> "Span":
        """The span of the rows of ``x`` (T, n).  The default tolerance is 100 machine epsilons of the numbers given.

        With ``named`` rows and coordinates of symbols go by short names.
        """
        xp = arithmetic(x)
        if tolerance is None:
            tolerance = UNIT_ROUNDINGS * xp.machine_epsilon(xp.lift(x))
        rows = xp.numbers(x)
        if rows.dtype == object:
            return _eliminated(rows, xp, tolerance, named)
        sizes = _sizes(rows)
        _, singular, basis = np.linalg.svd(rows / sizes, full_matrices=False)
        basis = basis[singular > tolerance]
        return Span(basis, rows @ basis.T, tolerance)

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return len(self.basis)

    @property
    def right(self) -> np.ndarray:
        """What the patch reads: (r, n), right · x_t = coordinates of x_t."""
        if self.basis.dtype != object:
            return self.basis
        return self.basis / (self.basis * self.basis).sum(-1, keepdims=True)

    def solve(self, delta: np.ndarray, ridge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(left (r, m), what is left over (T, m)): least squares in units of each token's size, exact where it can be.

        ``ridge`` > 0 minimises Σ_t ‖ΔW x_t − δ_t‖²/‖x_t‖² + ridge·‖ΔW‖² instead (theory 5).
        """
        if self.basis.dtype == object:
            return _substituted(self.coordinates, delta)
        if not self.rank:
            return np.zeros((0, delta.shape[1])), delta
        if self.begun is not None and not ridge:
            left = self._one_by_one(self.begun, delta)
        else:
            left = Block(self.coordinates).solve(delta, ridge)
        return left, delta - self.coordinates @ left

    def _one_by_one(self, begun: Block, delta: np.ndarray) -> np.ndarray:
        """Left factor (r, m): that of the first tokens, then a row for each later token that brought a direction.

        Their coordinates are lower triangular: forward substitution, O(T² m), decomposes nothing.
        """
        count, known = begun.coordinates.shape
        first = begun.solve(delta[:count]) if known else np.zeros((0, delta.shape[1]))
        brought = (self.coordinates[:, known:] != 0).argmax(0)  # the token that a direction came with
        rows = self.coordinates[brought]
        later = linalg.solve_triangular(rows[:, known:], delta[brought] - rows[:, :known] @ first, lower=True)
        return np.concatenate([first, later])

    def extended(self, x: np.ndarray) -> "tuple[Span, np.ndarray | None]":
        """The span with one more token ``x`` (n,), and the new direction (n,) if it has one.  Costs O(r · n).

        The earlier tokens' coordinates in it are 0: a change along it does not move what they give.
        """
        size = float(np.linalg.norm(x)) or 1.0
        inside = self.basis @ x
        outside = x - inside @ self.basis
        again = self.basis @ outside  # orthogonal to rounding: once is not enough
        inside, outside = inside + again, outside - again @ self.basis
        length = float(np.linalg.norm(outside))
        begun = self.begun or Block(self.coordinates)
        if length <= self.tolerance * size:
            coordinates = self.memory.grown("coordinates", self.coordinates, inside[None])
            return replace(self, coordinates=coordinates, begun=begun), None
        direction = outside / length
        place = np.append(inside, length)[None]
        coordinates = self.memory.grown("coordinates", self.coordinates, place, self.rank + 1)
        basis = self.memory.grown("basis", self.basis, direction[None])
        return replace(self, basis=basis, coordinates=coordinates, begun=begun), direction

    def condition(self) -> float:
        """Largest ÷ smallest singular value of the unit rows within the span: how much rounding is magnified."""
        if self.basis.dtype == object or not self.rank:
            return 1.0
        s = np.linalg.svd(self.coordinates / _sizes(self.coordinates), compute_uv=False)
        return float(s[0] / s[-1]) if s[-1] else float("inf")


def _sizes(rows: np.ndarray) -> np.ndarray:
    """Length of each row, (T, 1); 1 for a row of zeros."""
    sizes = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.where(sizes == 0, 1.0, sizes)


def _eliminated(rows: np.ndarray, xp: Any, tolerance: float, named: bool) -> Span:
    """Gram-Schmidt without roots: the basis of fractions is of fractions, that of symbols of symbols."""
    basis: list[np.ndarray] = []
    table: list[list[Any]] = []
    if named and xp.symbolic and _independent_somewhere(rows):  # a name would hide that rows depend on each other
        rows = xp.name(rows)
    for row in rows:
        rest, found = row, []
        for direction in basis:
            share = xp.tidy(np.array([(direction * row).sum() / (direction * direction).sum()]))[0]
            found.append(xp.name(np.array([share]))[0] if named else share)
            rest = rest - share * direction
        rest = xp.tidy(rest)
        if not _vanishes(rest, row, xp, tolerance):
            basis.append(rest)
            found.append(xp.number(1))
        table.append(found)
    coordinates = np.empty((len(rows), len(basis)), dtype=object)
    for t, found in enumerate(table):
        coordinates[t] = [*found, *[xp.number(0)] * (len(basis) - len(found))]
    return Span(np.array(basis, dtype=object).reshape(len(basis), rows.shape[1]), coordinates, tolerance)


def _independent_somewhere(rows: np.ndarray) -> bool:
    """Whether rows of symbols are independent at a random point: then they are so in general."""
    table = kept() or Definitions()
    numbers = np.array([float(table.value(entry)) for entry in rows.flat]).reshape(rows.shape)
    return np.linalg.svd(numbers / _sizes(numbers), compute_uv=False)[-1] > 1e-6 and len(rows) <= rows.shape[1]


def _vanishes(rest: np.ndarray, row: np.ndarray, xp: Any, tolerance: float) -> bool:
    if xp.exact:
        return bool(xp.is_zero(rest).all())
    return max(map(abs, rest)) <= tolerance * max(map(abs, row))


def _substituted(coordinates: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward substitution along the tokens that brought a new direction; the others are checked by what is left."""
    xp = arithmetic(delta)
    left: list[np.ndarray] = []
    for t in range(len(coordinates)):
        known = len(left)
        if known < coordinates.shape[1] and coordinates[t, known] == 1:
            done = sum((coordinates[t, k] * left[k] for k in range(known)), start=delta[t] * 0)
            left.append(xp.tidy(delta[t] - done))
    found = np.array(left, dtype=object).reshape(len(left), delta.shape[1])
    rest = delta - coordinates @ found if len(left) else delta
    return found, xp.tidy(rest)
