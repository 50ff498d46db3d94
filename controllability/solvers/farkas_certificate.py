"""Certificates of impossibility, checked in exact arithmetic."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from controllability.arrays.lazy import np, optimize
from controllability.errors import ControllabilityError

NAMED = 6  # tokens that a message names


@dataclass(frozen=True, eq=False)
class Farkas:
    """λ (T,) with Aᵀλ ≥ 0 and qᵀλ ≤ 0, not both zero: no s > 0 has A s = q.

    ``coefficients`` (T, d) is A and ``right`` (T,) is q: floats, taken as the exact numbers they are, or
    Fractions.  ``weights`` is λ, rational; ``names`` (T,) say where each token stands, if anywhere.
    Source: Farkas' lemma, strict form (theory: one patch for many tokens).

    >>> Farkas([[1, 4], [2, 5]], [3, 2], (-1, 1)).holds()  # the second row exceeds the first, its right side does not
    True
    """

    coefficients: Any
    right: Any
    weights: tuple[Fraction | int, ...]
    names: tuple[str, ...] = ()

    def holds(self) -> bool:
        """Whether λ proves it, in exact arithmetic, without a tolerance."""
        columns, right = self._combination()
        return min(columns) >= 0 and right <= 0 and (right < 0 or max(columns) > 0)

    def among(self, kept: np.ndarray, like: np.ndarray) -> "Farkas":
        """This certificate for tokens of which some repeat others: ``kept`` are those of this certificate, ``like`` (T,) says which repeats which."""
        weights: list[Fraction | int] = [0] * len(like)
        for t, weight in zip(kept.tolist(), self.weights, strict=True):
            weights[t] = weight
        rows, right = np.asarray(self.coefficients)[like], np.asarray(self.right)[like]
        return replace(self, coefficients=rows, right=right, weights=tuple(weights))

    def named(self, names: Sequence[str]) -> "Farkas":
        """This certificate with a name for each token."""
        return replace(self, names=tuple(names))

    def _combination(self) -> tuple[list[int], int]:
        """(Aᵀλ, qᵀλ) up to positive factors, in whole numbers."""
        chosen = [t for t, weight in enumerate(self.weights) if weight]
        if not chosen:
            return [0] * len(self.coefficients[0]), 0
        weights = _whole([self.weights[t] for t in chosen])
        width = len(self.coefficients[0])
        flat = _whole([value for t in chosen for value in _plain(self.coefficients[t])])
        rows = np.array(flat, dtype=object).reshape(len(chosen), width)
        columns = np.array(weights, dtype=object) @ rows
        right = _whole([_plain(self.right)[t] for t in chosen])
        return list(columns), sum(a * b for a, b in zip(weights, right, strict=True))

    def __str__(self) -> str:
        T = len(self.weights)
        order = sorted((t for t in range(T) if self.weights[t]), key=lambda t: -abs(self.weights[t]))
        names = self.names or [f"token {t}" for t in range(T)]
        terms = "; ".join(f"{float(self.weights[t]):+.3g} at {names[t]}" for t in order[:NAMED])
        more = f" and {len(order) - NAMED} smaller ones" if len(order) > NAMED else ""
        _, right = self._combination()
        exact = self.holds()
        side = "a negative right side" if right < 0 or not exact else "the right side 0"
        checked = "checked in exact arithmetic" if exact else "to rounding: not confirmed in exact arithmetic"
        return (
            f"no scale gives all {T} tokens their RMS: the combination λ ({terms}{more}) of the equations "
            f"has only non-negative coefficients and {side} ({checked})"
        )

    def to_dict(self) -> dict[str, Any]:
        """λ as 'numerator/denominator' strings, and what was found; JSON-ready."""
        found = {"kind": "farkas", "weights": [str(Fraction(w)) for w in self.weights], "exact": self.holds()}
        return found | ({"names": list(self.names)} if self.names else {})


class Infeasible(ControllabilityError):
    """No scale gives every token its RMS; ``certificate`` says why (None where none was found)."""

    def __init__(self, certificate: Farkas | None) -> None:
        self.certificate = certificate
        super().__init__(str(certificate) if certificate else "no scale was found that gives all tokens their RMS")


def find_farkas(coefficients: Any, right: Any, guess: np.ndarray | None = None) -> Farkas | None:
    """A certificate that no s > 0 has A s = q; None where there is none.

    ``guess`` (T,) is tried first.  Otherwise a linear program takes λ as far inside its inequalities as
    they allow (so that a rounded λ still satisfies them), and where there is no inside, any λ at all.
    One that holds to rounding only is the answer where nothing better is found.
    """
    A = np.array([[float(value) for value in row] for row in coefficients])
    q = np.array([float(value) for value in right])
    doubtful: Farkas | None = None
    for weights in _proposals(A, q, guess):
        for rounded in _roundings(weights):
            certificate, floats = Farkas(coefficients, right, rounded), np.array([float(w) for w in rounded])
            if _plausible(A, q, floats, 1e-13) and certificate.holds():
                return certificate
            if doubtful is None and _plausible(A, q, floats, 1e-8):
                doubtful = certificate
    return doubtful


def _proposals(A: np.ndarray, q: np.ndarray, guess: np.ndarray | None) -> Iterator[np.ndarray]:
    """Vectors λ with max |λ| = 1 that may prove it."""
    if guess is not None and guess.any():
        yield guess / np.abs(guess).max()
    live = np.asarray(A.any(1))
    A, q = A[live], q[live]
    size = A.sum(1)
    rows, right = A / size[:, None], q / size
    rows, right = rows / np.maximum(rows.max(0), 1e-300), right / right.max()
    T, d = rows.shape

    def whole(weights: np.ndarray) -> np.ndarray:
        full = np.zeros(len(live))
        full[live] = weights / size
        return full / np.abs(full).max() if full.any() else full

    # most inside: Aᵀλ ≥ δ, qᵀλ ≤ −δ, |λ| ≤ 1, δ as large as possible
    system = np.block([[-rows.T, np.ones((d, 1))], [right[None], np.ones((1, 1))]])
    goal, bounds = np.append(np.zeros(T), -1), [(-1, 1)] * T + [(0, 1)]
    best = optimize.linprog(goal, A_ub=system, b_ub=np.zeros(d + 1), bounds=bounds, method="highs")
    if best.status == 0 and best.x[-1] > 0:
        yield whole(best.x[:-1])
    # any: the sum of what is not zero, as large as possible
    best = optimize.linprog(
        right - rows.sum(1), A_ub=system[:, :-1], b_ub=np.zeros(d + 1), bounds=[(-1, 1)] * T, method="highs"
    )
    if best.status == 0 and best.fun < -1e-6:
        yield whole(best.x)


def _roundings(weights: np.ndarray) -> list[tuple[Fraction, ...]]:
    """λ with simple fractions first, then with the floats as they are."""
    simple = [tuple(Fraction(w).limit_denominator(n) for w in weights.tolist()) for n in (12, 10**3, 10**6, 10**10)]
    return [*simple, tuple(Fraction(w) for w in weights.tolist())]


def _plausible(A: np.ndarray, q: np.ndarray, weights: np.ndarray, tolerance: float) -> bool:
    """Whether the inequalities hold to rounding: an exact check is worth its time."""
    slack = tolerance * (np.abs(weights) @ np.abs(A))
    return bool((weights @ A >= -slack).all() and weights @ q <= tolerance * (np.abs(weights) @ np.abs(q)))


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _whole(values: Sequence[Any]) -> list[int]:
    """The values times their common denominator: whole numbers with the same ratios."""
    ratios = [value.as_integer_ratio() for value in values]
    common = math.lcm(*{denominator for _, denominator in ratios})
    return [numerator * (common // denominator) for numerator, denominator in ratios]
