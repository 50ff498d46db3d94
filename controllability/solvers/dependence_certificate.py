"""The certificate that no one matrix serves all tokens: inputs that depend on each other, targets that do not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from controllability.arrays import arithmetic
from controllability.arrays.lazy import np

ROUNDING = 1e-12  # part of the targets below which their combination counts as 0
NAMED = 0.01  # weights below this part of the largest are not named


@dataclass(frozen=True, eq=False)
class Dependent:
    """Weights λ (T,) with Σ λ_t x_t = 0 and Σ λ_t δ_t ≠ 0: whatever ΔW is, it maps the first sum to 0.

    ``inputs`` is max |Σ λ_t x_t| and ``targets`` max |Σ λ_t δ_t|, both over the largest |λ_t|‖·_t‖∞.  ``exact`` says that the first
    is exactly 0 in the numbers given (fractions), not to rounding.  ``names`` (T,) say where each token stands, if anywhere.
    """

    where: str
    weights: np.ndarray
    inputs: float
    targets: float
    exact: bool
    names: tuple[str, ...] = ()

    @staticmethod
    def of(where: str, x: np.ndarray, delta: np.ndarray, worst: int) -> "Dependent":
        """The dependency that token ``worst`` takes part in.  ``x`` (T, n), ``delta`` (T, m), floats or fractions."""
        x, delta = (a if _exact(a) else a.astype(float) for a in (x, delta))  # many digits: as floats
        weights = _weights(x, delta, worst)
        exact = x.dtype == object
        combined, missing = weights @ x, weights @ delta
        sizes = [abs(w) * max(map(abs, row)) for w, row in zip(weights, x, strict=True)]
        wanted = [abs(w) * max(map(abs, row)) for w, row in zip(weights, delta, strict=True)]
        held = bool(exact and all(v == 0 for v in combined))
        return Dependent(where, weights, _ratio(combined, sizes), _ratio(missing, wanted), held)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that depend on each other, the heaviest first."""
        size = np.array([abs(float(w)) for w in self.weights])
        order = np.argsort(-size, kind="stable")
        return tuple(int(t) for t in order if size[t] > NAMED * size.max())

    def among(self, tokens: np.ndarray, count: int) -> "Dependent":
        """This certificate for ``count`` tokens, of which those of this certificate are ``tokens`` (T,)."""
        weights = np.zeros(count, dtype=self.weights.dtype)
        weights[tokens] = self.weights
        return replace(self, weights=weights)

    def named(self, names: Sequence[str]) -> "Dependent":
        """This certificate with a name for each token."""
        return replace(self, names=tuple(names))

    def holds(self) -> bool:
        """Whether the inputs' combination vanishes exactly and the targets' does not."""
        return self.exact and self.targets > 0

    def __str__(self) -> str:
        named = ("; " if self.names else ", ").join(self.names[t] if self.names else str(t) for t in self.tokens[:6])
        named += " …" if len(self.tokens) > 6 else ""
        if len(self.tokens) == 1 and not self.inputs:
            return f"token {named} brings nothing but 0 to {self.where} and has to change there: no one change of it does that"
        how = "exactly" if self.exact else f"to {self.inputs:.1g} of their size"
        return (
            f"tokens {named} depend on each other at {self.where} ({how}) and their targets do not "
            f"(they differ by {self.targets:.2g} of their size): no one change of it gives them all"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "kind": "dependent tokens", "where": self.where, "tokens": list(self.tokens),
            "weights": [float(self.weights[t]) for t in self.tokens],
            "inputs": self.inputs, "targets": self.targets, "exact": self.exact,
        } | ({"names": [self.names[t] for t in self.tokens]} if self.names else {})  # fmt: skip


def _exact(numbers: np.ndarray) -> bool:
    return numbers.dtype == object and arithmetic(numbers).exact


def _ratio(combined: np.ndarray, sizes: list[Any]) -> float:
    largest = max(map(float, sizes), default=0.0)
    return max((abs(float(v)) for v in combined), default=0.0) / (largest or 1.0)


def _weights(x: np.ndarray, delta: np.ndarray, worst: int) -> np.ndarray:
    """λ with λ_worst = 1 and Σ λ_t x_t as small as it gets; one other token where one is enough."""
    others = [t for t in range(len(x)) if t != worst]
    if x.dtype == object:
        return _exact_weights(x, delta, worst, others)
    weights = _nearest_weights(x, worst, others)
    if np.abs(weights @ delta).max() > ROUNDING * (np.abs(weights) @ np.abs(delta)).max():
        return weights
    return _null_weights(x, delta)  # a token whose target depends in the same way, and others that do not


def _null_weights(x: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """λ with Σ λ_t x_t = 0, of all those the one that tells most of a δ apart."""
    sizes = np.linalg.norm(x, axis=-1, keepdims=True)
    sizes = np.where(sizes == 0, 1.0, sizes)
    u, s, _ = np.linalg.svd(x / sizes)
    null = u[:, int((s > 1e-10).sum()) :]
    left = null.T @ (delta / sizes)
    worst = int((left**2).sum(0).argmax())
    weights = (null @ left[:, worst]) / sizes[:, 0]
    return weights / (np.abs(weights).max() or 1.0)


def _nearest_weights(x: np.ndarray, worst: int, others: list[int]) -> np.ndarray:
    weights = np.zeros(len(x))
    weights[worst] = 1.0
    sizes = (x[others] ** 2).sum(-1)
    usable = [t for t, size in zip(others, sizes, strict=True) if size]
    if not usable:
        return weights
    single = {t: float(x[t] @ x[worst]) / float(x[t] @ x[t]) for t in usable}
    nearest = min(usable, key=lambda t: float(np.abs(x[worst] - single[t] * x[t]).max()))
    fitted, *_ = np.linalg.lstsq(x[usable].T, x[worst], rcond=1e-10)
    alone = np.abs(x[worst] - single[nearest] * x[nearest]).max()
    if alone <= 4 * np.abs(x[worst] - fitted @ x[usable]).max() + 1e-6 * np.abs(x[worst]).max():
        weights[nearest] = -single[nearest]
    else:
        weights[usable] = -fitted
    return weights


def _exact_weights(x: np.ndarray, delta: np.ndarray, worst: int, others: list[int]) -> np.ndarray:
    """A dependence found by elimination of fractions: the first that Σ λ_t δ_t = 0 does not hold for."""
    zero, one = x.flat[0] * 0, x.flat[0] * 0 + 1
    kept: list[tuple[np.ndarray, np.ndarray]] = []  # (reduced row, which combination of tokens it is)

    def reduced(row: np.ndarray, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for base, from_ in kept:
            at = next(i for i, v in enumerate(base) if v != 0)
            share = row[at] / base[at]
            row, mix = row - share * base, mix - share * from_
        return row, mix

    def unit(t: int) -> np.ndarray:
        mix = np.array([zero] * len(x), dtype=object)
        mix[t] = one
        return mix

    for t in (*others, worst):
        row, mix = reduced(x[t], unit(t))
        if any(v != 0 for v in row):
            kept.append((row, mix))
        elif any(v != 0 for v in mix @ delta):
            return mix
    return unit(worst)
