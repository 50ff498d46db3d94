"""The leaves' joint rules: one matrix, one vector or one set of experts that serves all tokens.  (theory 5; new)

Every array has the tokens on axis 0.  What is promised is checked here: a token that is not reached is a refusal with a
certificate, unless least squares were asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from controllability.arrays import Arithmetic, Array, arithmetic
from controllability.arrays.lazy import np
from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.errors import SideConditionFailed
from controllability.interfaces import Condition, FitRows, JointOptions, JointSolution, JointUpdate, Param, Params
from controllability.solvers.dependence_certificate import Dependent
from controllability.solvers.least_norm import UNIT_ROUNDINGS, Span
from controllability.solvers.metric_fit import Drift, metric_fit
from controllability.solvers.served_tokens import Known, NotContinued, among, continued

TOO_MANY = "drop one of these tokens or give it more context, ask for via='output' where there are too many (its bound is wider), or for a fit (ridge=, rank=)"
SHOWN = 1e-6  # parts of their size: a certificate's inputs add up to less, its targets to more
ONE_VECTOR = "one vector for all tokens: let a matrix move"


def one_matrix(weight: Param, where: str, width: int | str | None, transposed: bool) -> JointUpdate:
    """ΔW X = D, the least norm of all solutions; rank at most T."""
    condition = Condition(
        f"tokens whose inputs of {weight} depend on each other have targets that depend in the same way"
        + (f" (T ≤ {width} in general position)" if width else ""), where, hint=TOO_MANY,
    )  # fmt: skip

    def solve(
        joint: JointOptions, params: Params, x: Array, delta: Array, raw: Array, known: Known | None = None
    ) -> JointSolution:
        x, delta, raw = map(_rows, (x, delta, raw))
        xp = arithmetic(x, delta)
        tokens = Known(xp.numbers(x), xp.numbers(delta), xp.numbers(raw))
        fit = fitted(condition, joint, xp, tokens, x, known, named=True)
        change = LowRank(xp.array(fit.left, like=x), xp.array(fit.right, like=x), transposed)
        return JointSolution(change, xp.array(fit.margin, like=x), fit.known)

    return JointUpdate((condition,), solve, width or "n")


def one_vector(
    param: Param, where: str, reads: Callable[[np.ndarray], np.ndarray], stored: Callable[[Params, Array], Delta], what: str
) -> JointUpdate:  # fmt: skip
    """Δ ∘ reads(x_t) = δ_t for all tokens, entry by entry: a bias reads 1, a scale its input."""
    condition = Condition(f"all tokens ask for the same change of {param} ({what})", where, hint=ONE_VECTOR)

    def solve(
        joint: JointOptions, params: Params, x: Array, delta: Array, raw: Array, known: Known | None = None
    ) -> JointSolution:
        x, delta, raw = map(_rows, (x, delta, raw))
        xp = arithmetic(x, delta)
        new = Known(reads(xp.numbers(x)) + xp.numbers(delta) * 0, xp.numbers(delta), xp.numbers(raw))
        tokens = Known.joined(known, new)
        read, wanted = tokens.x, tokens.delta
        size = (read * read).sum(0) + joint.ridge * (read * read).mean(0)
        size = np.where(size == 0, size + 1, size)
        value = (read * wanted).sum(0) / size
        rest = xp.tidy(wanted - read * value) if xp.exact else wanted - read * value
        margin = np.ones((len(wanted), 1))
        if joint.exact:
            evidence = lambda bad, i: (read[:, [i]], wanted[:, [i]])  # noqa: E731
            margin = reached(condition, joint, xp, rest, tokens.raw, wanted, x, evidence, len(new.x))
            if known is not None and not (margin > 0).all():
                raise NotContinued(f"{param} would be another mean of what its tokens ask for")
        moved = stored(params, xp.array(value, like=delta))
        return JointSolution(moved, xp.array(margin[-len(new.x) :], like=delta), tokens)

    return JointUpdate((condition,), solve, 1)


def one_bias(bias: Param, where: str) -> JointUpdate:
    """Δb = δ_t for all tokens."""
    return one_vector(bias, where, lambda x: x[..., :1] * 0 + 1, lambda params, value: Shift(value), "equal δ_t")


def one_set_of_experts(
    weight: Param, where: str, width: int | str | None, transposed: bool, index_of: Callable[[Params], Array],
    count: Callable[[Params], int],
) -> JointUpdate:  # fmt: skip
    """One matrix an expert, each solved for the tokens that are routed to it."""
    condition = Condition(
        f"tokens that one expert of {weight} serves and whose inputs depend on each other have targets that depend in the same way"
        + (f" (at most {width} tokens an expert in general position)" if width else ""), where, hint=TOO_MANY,
    )  # fmt: skip

    def solve(
        joint: JointOptions, params: Params, x: Array, delta: Array, raw: Array, known: Known | None = None
    ) -> JointSolution:
        xp = arithmetic(x, delta)
        index = np.asarray(_plain(index_of(params)))  # (T, k)
        rows, wanted, own = (np.broadcast_to(xp.numbers(a), (*index.shape, a.shape[-1])) for a in (x, delta, raw))
        index, rows, wanted, own = _rows(index), *(_rows(a, 2) for a in (rows, wanted, own))
        margin, before = np.ones((*index.shape, 1)), 0 if known is None else len(known.x)
        parts: dict[int, Known] = {} if known is None else dict(known.parts)
        factors = {e: (p.left, p.span.right) for e, p in parts.items() if p.span is not None and p.left is not None}
        for expert in np.unique(index).tolist():  # of different sizes: how many tokens each serves
            at, part = index == expert, parts.get(expert)
            numbers = before + at.nonzero()[0]
            numbers = numbers if part is None or part.index is None else np.concatenate([part.index, numbers])
            try:
                own_joint = replace(joint, rows=joint.rows.among(at.ravel())) if joint.rows else joint
                fit = fitted(condition, own_joint, xp, Known(rows[at], wanted[at], own[at]), x, part)
            except SideConditionFailed as failed:
                _renumbered(failed, numbers, int(at.sum()), before, before + len(index))
                raise
            margin[at], factors[expert] = fit.margin, (fit.left, fit.right)
            if fit.known is not None:
                parts[expert] = replace(fit.known, index=numbers)
        used = np.array(sorted(factors))
        change = _stacked_experts(xp, [factors[e] for e in used.tolist()], x, transposed, used, count(params))
        tokens = replace(Known.joined(known, Known(rows, wanted, own, index)), parts=parts)
        return JointSolution(change, xp.array(margin.min(axis=1), like=x), tokens)

    return JointUpdate((condition,), solve, width or "n")


def one_sum_of_experts(
    condition: Condition, joint: JointOptions, x: Array, shares: Array, index: Array, delta: Array, raw: Array,
    transposed: bool, experts: int, known: Known | None = None,
) -> JointSolution:  # fmt: skip
    """Σ_j s_tj ΔW_e(t,j) y_tj = δ_t: one matrix for the stacked vectors (s_tj y_tj)_j, so T ≤ (experts used) · h.

    ``x`` (T, k, h) what the experts' last matrices read, ``shares`` (T, k, 1), ``index`` (T, k), ``delta`` (T, d).
    """
    x, shares, index, delta, raw = _rows(x, 2), _rows(shares, 2), _rows(index), _rows(delta), _rows(raw)
    xp = arithmetic(x, delta)
    new = Known(xp.numbers(x) * xp.numbers(shares), xp.numbers(delta), xp.numbers(raw), np.asarray(_plain(index)))
    rows, chosen = new.x, new.index
    assert chosen is not None
    used = np.unique(chosen) if known is None or known.used is None else np.union1d(chosen, known.used)
    where = np.searchsorted(used, chosen)
    stacked = np.zeros((len(rows), len(used), rows.shape[-1]), dtype=rows.dtype)
    if rows.dtype == object:
        stacked[...] = rows.flat[0] * 0
    each = np.arange(len(rows))
    for slot in range(chosen.shape[1]):
        stacked[each, where[:, slot]] += rows[:, slot]
    flat = Known(stacked.reshape(len(rows), -1), new.delta, new.raw)
    fit = fitted(condition, joint, xp, flat, x, None if known is None else among(known, used))
    planes = fit.right.reshape(len(fit.right), len(used), rows.shape[-1]).swapaxes(0, 1)
    spread = np.broadcast_to(xp.name(fit.left), (len(used), *fit.left.shape)).copy()
    left, right = (xp.array(factor, like=x) for factor in (spread, planes.copy()))
    change = ExpertLowRank(left, right, transposed, _places(used, x), experts)
    tokens = None if fit.known is None else replace(fit.known, used=used)
    return JointSolution(change, xp.array(fit.margin, like=x), tokens)


class Fit(NamedTuple):
    """ΔW = leftᵀ · right, the margin of every new token, and what there is to remember."""

    left: np.ndarray  # (r, m)
    right: np.ndarray  # (r, n)
    margin: np.ndarray  # (N, 1)
    known: Known | None = None


def fitted(
    condition: Condition, joint: JointOptions, xp: Arithmetic, tokens: Known, like: Array, known: Known | None = None,
    named: bool = False,
) -> Fit:  # fmt: skip
    """The least-norm ΔW with ΔW x_t = δ_t for these tokens and those ``known``; or the fit that was asked for."""
    count = len(tokens.x)
    if joint.damping is not None:
        rows, wanted = tokens.x.astype(float, copy=False), tokens.delta.astype(float, copy=False)
        shares, stay, hard = (joint.rows or FitRows((1.0,) * count)).arrays(count)
        wanted = np.where(stay[:, None], 0.0, wanted)
        factors = metric_fit(rows, wanted, shares, joint.drift or Drift(None), joint.ridge, joint.rank, hard)
        return Fit(*factors, np.ones((count, 1)))
    if known is not None and known.span is not None and known.span.basis.dtype != object and joint.exact:
        both, rest = continued(known, tokens.x, tokens.delta, tokens.raw)
        assert both.span is not None and both.left is not None
        before = len(known.x)  # what they give does not move: the new ones alone are looked at
        evidence = lambda bad, i: (both.x, both.delta)  # noqa: E731
        margin = reached(condition, joint, xp, rest, tokens.raw, tokens.delta, like, evidence, count, before)
        return Fit(both.left, both.span.right, margin, both)
    if known is not None and known.span is None and joint.may_fall_short:
        raise NotContinued("what earlier tokens are given by least squares would change")
    tokens = Known.joined(known, tokens)
    tolerance = None if xp.exact else UNIT_ROUNDINGS * xp.machine_epsilon(xp.lift(like))
    span = Span.of(tokens.x, tolerance, named)
    left, rest = span.solve(tokens.delta, joint.ridge)
    if joint.exact:
        evidence = lambda bad, i: (tokens.x, tokens.delta)  # noqa: E731
        margin = reached(condition, joint, xp, rest, tokens.raw, tokens.delta, like, evidence, count)
        known = replace(tokens, span=span, left=left)
        if tokens.x.dtype == object and not span.rank:  # an empty array of objects would not say of what kind
            return Fit(tokens.delta[:1] * 0, tokens.x[:1] * 0, margin[-count:], known)
        return Fit(left, span.right, margin[-count:], known)
    right = span.right
    if joint.rank is not None and joint.rank < span.rank:
        sizes = np.linalg.norm(span.coordinates, axis=-1, keepdims=True)
        shown = span.coordinates / np.where(sizes == 0, 1.0, sizes) @ left
        kept = np.linalg.svd(shown, full_matrices=False)[2][: joint.rank]
        left, right = kept, kept @ left.T @ right
    return Fit(left, right, np.ones((count, 1)))


def reached(
    condition: Condition, joint: JointOptions, xp: Arithmetic, rest: np.ndarray, raw: np.ndarray, delta: np.ndarray, like: Array,
    evidence: Callable[[int, int], tuple[np.ndarray, np.ndarray]], new: int, before: int = 0,
) -> np.ndarray:  # fmt: skip
    """1 − what is left over ÷ what rounding explains, (T, 1); positive where the target is reached.

    The last ``new`` tokens are those that are solved for now, behind ``before`` others that the evidence has.  Raises
    ``SideConditionFailed`` with the certificate of the worst, unless the block may fall short.
    """
    if xp.exact:
        missed = ~np.asarray(xp.is_zero(rest)).reshape(len(rest), -1).all(-1)
        margin = np.where(missed, -1.0, 1.0)
    else:
        allowed = UNIT_ROUNDINGS * xp.machine_epsilon(xp.lift(like))
        size = np.maximum(_largest(raw), _largest(delta))
        margin = 1.0 - _largest(rest) / (allowed * np.where(size == 0, 1.0, size))
        missed = ~(margin > 0)  # NaN is missed too
    if missed.any() and not joint.may_fall_short:
        bad = int(np.argmin(margin))
        entry = 0 if xp.exact else int(np.abs(rest[bad].astype(float)).argmax())
        own = bad - (len(rest) - new)
        failed = condition.failed(None if xp.exact else float(margin[bad]), own if own >= 0 else None)
        if not xp.symbolic:
            found = Dependent.of(condition.where, *evidence(bad, entry), before + bad)
            failed.certificate = found if found.inputs < SHOWN < found.targets else None  # else rounding, magnified
        raise failed
    return margin[:, None]


def _renumbered(failed: SideConditionFailed, numbers: np.ndarray, new: int, before: int, count: int) -> None:
    """One expert's tokens by their ``numbers`` among all ``count``: its last ``new`` are new, as are those from ``before`` on."""
    if isinstance(failed.position, int):
        failed.position = int(numbers[failed.position + len(numbers) - new]) - before
    if isinstance(failed.certificate, Dependent):  # symbols have none
        failed.certificate = failed.certificate.among(numbers, count)


def _rows(x: Any, last: int = 1) -> Any:
    """The tokens on axis 0, whatever axes stand before the ``last`` ones: inside a mixture a token is a row of its own."""
    return x.reshape(-1, *x.shape[x.ndim - last :])


def _largest(rows: np.ndarray) -> np.ndarray:
    return np.abs(rows.astype(float, copy=False)).reshape(len(rows), -1).max(-1)


def _plain(index: Any) -> Any:
    return index.cpu().numpy() if hasattr(index, "cpu") else index


def _stacked_experts(
    xp: Arithmetic, factors: list[tuple[np.ndarray, np.ndarray]], like: Array, transposed: bool, used: np.ndarray, experts: int
) -> ExpertLowRank:  # fmt: skip
    """Factors of different ranks in one delta: zeros fill up the shorter ones."""
    most = max(len(left) for left, _ in factors)
    zero = xp.number(0) if factors[0][0].dtype == object else 0.0

    def filled(rows: np.ndarray) -> np.ndarray:
        whole = np.full((most, rows.shape[1]), zero, dtype=rows.dtype)
        whole[: len(rows)] = rows
        return whole

    left, right = (xp.array(np.stack([filled(pair[side]) for pair in factors]), like=like) for side in (0, 1))
    return ExpertLowRank(left, right, transposed, _places(used, like), experts)


def _places(used: np.ndarray, like: Any) -> Any:
    """Numbers of experts, as an index of the arithmetic of ``like``."""
    return like.new_tensor(used.tolist()).long() if hasattr(like, "new_tensor") else used
