"""Which experts a token goes to, and with which shares: the fixed half of a router."""

from dataclasses import dataclass
from typing import Any, Literal

from controllability.arrays import Arithmetic, Array, arithmetic
from controllability.errors import BadInput
from controllability.interfaces import Param, Params
from controllability.interfaces.arguments import refuse_misfits

BOUNDS = {
    "top_k": "≥ 1", "group_best": "≥ 1", "renormalise": "≥ 1", "eps": "≥ 0", "scaling": "≠ 0", "cap": "> 0", "jitter": "≥ 0",
}  # fmt: skip
Score = Literal["softmax", "sigmoid", "identity", "sqrt_softplus", "sparsemixer"]


@dataclass(frozen=True)
class Routing:
    """Router logits (..., E) -> chosen experts (..., k), ascending, and their shares (..., k).

    ``score`` turns logits into scores, over all experts or (``after``) over the chosen ones only.
    ``correction`` (E,) is added for the choice alone, to the scores or (``choose_logits``) to the
    logits.  ``groups=(n, kept)`` first keeps the best ``kept`` of ``n`` equal groups, a group being
    worth the sum of its ``group_best`` best.  ``renormalise`` divides the shares by their p-norm (1: their
    sum), plus ``eps``.  ``scaling`` and the stored ``per_expert`` (E,) multiply them in the end.  ``cap``
    is a tanh soft-cap on the logits.  ``skip``: there is one class more than experts, and the last one is
    none of them: as expert 0 with share 0.  The shares are those that an implementation uses: they need not sum to 1.

    >>> import numpy as np
    >>> Routing(2, renormalise=1)({}, np.log(np.array([1.0, 6.0, 3.0])))
    (array([1, 2]), array([0.66666667, 0.33333333]))
    >>> Routing(1, skip=True)({}, np.log(np.array([1.0, 2.0, 5.0])))
    (array([0]), array([0.]))
    """

    top_k: int
    score: Score = "softmax"
    after: bool = False
    correction: Param | None = None
    choose_logits: bool = False
    groups: tuple[int, int] | None = None
    group_best: int = 2
    group_fill: float = float("-inf")
    renormalise: int | None = None
    eps: float = 0.0
    scaling: Any = 1
    per_expert: Param | None = None
    cap: float | None = None
    jitter: float = 0.0
    skip: bool = False

    def __post_init__(self) -> None:
        refuse_misfits(self, BOUNDS)
        if self.groups is not None and not 1 <= self.groups[1] <= self.groups[0]:
            raise BadInput(f"Routing: groups must be (how many, how many are kept), got {self.groups}")
        if self.skip and self.top_k != 1:  # two that are no expert would be expert 0 twice
            raise BadInput(f"skip needs top_k=1, got {self.top_k}")

    def __call__(self, params: Params, logits: Array) -> tuple[Array, Array]:
        xp = arithmetic(logits)
        if self.score == "sparsemixer":
            return self._sparsemixer(xp, logits)
        logits = self._capped(xp, logits)
        scores = logits if self.after else self._scores(xp, logits)
        index = xp.top(self._choice(xp, params, logits, scores), self.top_k)
        shares = xp.take(scores, index)
        if self.after:
            shares = self._scores(xp, shares)
        if self.renormalise is not None:
            shares = shares / (self._norm(xp, shares) + xp.number(self.eps))
        shares = shares * xp.number(self.scaling)
        if self.per_expert is not None:
            shares = shares * self.per_expert.value(params)[index]
        shares = xp.name(shares)
        if self.skip:
            none = index == logits.shape[-1] - 1
            index, shares = (xp.where(none, xp.zeros_like(a), a) for a in (index, shares))
        return index, shares

    def margin(self, params: Params, logits: Array) -> Array:
        """How far the choice is from being another one, relative to the size of the scores: (..., 1).

        Infinite where there is nothing to choose; 1 for symbols, whose order is assumed.
        """
        xp = arithmetic(logits)
        one = xp.sum(xp.zeros_like(logits)) + 1
        if xp.symbolic:
            return one
        if self.score == "sparsemixer":
            return xp.min(xp.concatenate([_gap(xp, logits, 1), _gap(xp, logits, 2)], -1))  # which is first counts
        logits = self._capped(xp, logits)
        scores = logits if self.after else self._scores(xp, logits)
        margin = one * float("inf") if not xp.exact else one
        if self.groups is not None:
            worth = self._worth(xp, self._for_choice(params, logits, scores))
            if self.groups[1] < self.groups[0]:
                margin = _gap(xp, worth, self.groups[1])
        choice = self._choice(xp, params, logits, scores)
        if self.top_k < logits.shape[-1]:
            margin = xp.min(xp.concatenate([margin, _gap(xp, choice, self.top_k)], -1))
        return margin

    def parameters(self) -> tuple[Param, ...]:
        """What is read beside the logits."""
        return tuple(p for p in (self.correction, self.per_expert) if p is not None)

    def describe(self) -> str:
        """In words: 'soft-max, then top 2, renormalised'."""
        score = {"softmax": "soft-max", "sparsemixer": "sparse mixer"}.get(self.score, self.score)
        steps = [f"top {self.top_k}", score] if self.after else [score, f"top {self.top_k}"]
        steps += [f"of {self.groups[1]} in {self.groups[0]} groups"] if self.groups else []
        steps += ["renormalised"] if self.renormalise is not None else []
        steps += ["the last class is no expert"] if self.skip else []
        return ", ".join(steps)

    def _capped(self, xp: Arithmetic, logits: Array) -> Array:
        return logits if self.cap is None else xp.tanh(logits / xp.number(self.cap)) * xp.number(self.cap)

    def _scores(self, xp: Arithmetic, logits: Array) -> Array:
        if self.score == "identity":
            return logits
        if self.score == "sigmoid":
            return xp.name(xp.sigmoid(logits))
        if self.score == "sqrt_softplus":
            size = xp.magnitude(logits)  # so that no exponential overflows
            return xp.name(xp.sqrt((logits + size) / 2 + xp.log(1 + xp.exp(-size))))
        return xp.name(softmax(xp, logits))

    def _for_choice(self, params: Params, logits: Array, scores: Array) -> Array:
        base = logits if self.choose_logits else scores
        return base if self.correction is None else base + self.correction.value(params).reshape(-1)  # maybe (1, E)

    def _worth(self, xp: Arithmetic, choice: Array) -> Array:
        assert self.groups is not None
        grouped = choice.reshape(*choice.shape[:-1], self.groups[0], -1)
        return xp.take(grouped, xp.top(grouped, self.group_best)).sum(-1)

    def _choice(self, xp: Arithmetic, params: Params, logits: Array, scores: Array) -> Array:
        choice = self._for_choice(params, logits, scores)
        if self.groups is None or xp.symbolic:
            return choice
        kept = xp.top(self._worth(xp, choice), self.groups[1])
        size = choice.shape[-1] // self.groups[0]
        members = xp.array(range(size), like=None)
        members = members.to(kept.device).to(kept.dtype) if xp.kind == "torch" else members.astype(int)
        index = (kept[..., :, None] * size + members).reshape(*kept.shape[:-1], -1)
        return xp.only(choice, index, self.group_fill)

    def _norm(self, xp: Arithmetic, shares: Array) -> Array:
        if self.renormalise == 1:
            return xp.sum(shares)
        power = int(self.renormalise or 1)
        total = xp.sum(xp.magnitude(shares) ** power)
        return xp.sqrt(total) if power == 2 else total ** (1 / power)

    def _sparsemixer(self, xp: Arithmetic, logits: Array) -> tuple[Array, Array]:
        """Two arg-max choices, each with a soft-max over what lies within a relative gap of 2·jitter."""
        first = xp.top(logits, 1)
        shares, indices = [], []
        rest = logits
        for chosen in (first, None):
            best = xp.max(rest)
            index = xp.top(rest, 1) if chosen is None else chosen
            size = xp.magnitude(logits)
            size = xp.where(size < best, xp.zeros_like(size) + best, size)
            size = xp.where(xp.is_zero(size), size + 1, size)
            far = (best - logits) / size > 2 * self.jitter
            low = xp.where(far, xp.zeros_like(rest) + float("-inf"), rest)
            shares.append(xp.take(softmax(xp, low), index))
            indices.append(index)
            rest = xp.where(_is_in(xp, logits, index), xp.zeros_like(rest) + float("-inf"), rest)
        index, share = xp.concatenate(indices, -1), xp.concatenate(shares, -1)
        swap = index[..., :1] > index[..., 1:]

        def ordered(a: Array) -> Array:
            one, two = a[..., :1], a[..., 1:]
            return xp.concatenate([xp.where(swap, two, one), xp.where(swap, one, two)], -1)

        return ordered(index), ordered(share)


def softmax(xp: Arithmetic, x: Array) -> Array:
    """exp(x)/Σ exp(x) over the features; shifted by the largest where numbers have an order."""
    weights = xp.exp(x if xp.symbolic else x - xp.max(x))
    return weights / xp.sum(weights)


def _gap(xp: Arithmetic, scores: Array, k: int) -> Array:
    """(k-th best − next best) / largest |score|, (..., 1)."""
    chosen = xp.top(scores, k)
    least = xp.min(xp.take(scores, chosen))
    low = xp.min(scores) - 1 if xp.exact else xp.zeros_like(xp.min(scores)) - float("inf")
    rest = xp.where(_is_in(xp, scores, chosen), xp.zeros_like(scores) + low, scores)
    finite = xp.where(xp.magnitude(scores) < 1e30, xp.magnitude(scores), xp.zeros_like(scores))
    size = xp.max(finite)
    return (least - xp.max(rest)) / xp.where(size > 0, size, size + 1)


def _is_in(xp: Arithmetic, scores: Array, chosen: Array) -> Array:
    marks = xp.only(xp.zeros_like(scores) + 1, chosen, 0)
    return marks == 1
