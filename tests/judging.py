"""The judgement of one random tree: what the prover says of it against what the numbers say.

Yes: the executed proof verifies at 50 digits, or a side condition fails.  No: where the output is affine in all
that may move the rank of its Jacobian says no as well, or the case is one of ``KINDS``; elsewhere least squares
tries the sampled target, and what it reaches is counted.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from typing import Any

import mpmath
import numpy as np
import oracles
from trees import Case, D, grown, nodes

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import Bias, ExpertLinear, Linear, Mixture, Scale, Sequence
from controllability.components.collapse import SelfWeighted
from controllability.interfaces import Bijection, Component, Param

DIGITS, MANY, LIMIT = (
    50,
    800,
    1e-30,
)  # what 50 digits leave after losses of conditioning; a wrong rule leaves 1e-3 and more
YES, CONDITION, OTHERWISE = "yes", "condition failed", "no, asked otherwise yes"
AFFINE, BENT, WRONG = "no, affine", "no, not affine", "WRONG"
OUTCOMES = (YES, CONDITION, OTHERWISE, AFFINE, BENT, WRONG)
AGREES = "the rank says no as well"


def judge(case: Case) -> tuple[str, str]:
    """(outcome, in particular) of one random tree; anything that is wrong raises."""
    try:
        proof = ct.prove(case.block, frozen=case.frozen, **case.options)
    except ct.NotControllable as refused:
        assert refused.culprit
        assert refused.reason
        assert refused.hint
        return judged_refusal(case, refused.reason)
    assert not {str(p) for p in proof.root.moved} & set(case.frozen), case
    try:
        try:
            residual = executed(proof, case, DIGITS)
        except (
            ct.NotVerified
        ):  # refused, so no wrong patch was handed out; and the proof?  A wrong rule misses with any digits
            residual = executed(proof, case, MANY)
        if residual > LIMIT:  # badly conditioned, or wrong?  Rounding falls with the precision
            again = executed(proof, case, 2 * DIGITS)
            assert again < residual * LIMIT, f"{case}\nresidual {residual:.3g}, with twice the digits {again:.3g}"
    except ct.SideConditionFailed:
        judged = Affine.of(case)
        if judged is None:
            return CONDITION, "not affine"
        full = "full rank at every token" if all(judged.full) else "rank deficient at a token"
        return CONDITION, f"affine, {full}"
    return YES, "the executed proof verifies"


def executed(proof: ct.Proof, case: Case, digits: int) -> float:
    """max |difference| / (1 + max |target|) of the executed proof, computed with so many digits."""
    with mpmath.workdps(digits):
        xp = ARITHMETICS["mpmath"]
        params = {name: xp.array(value) for name, value in case.values.items()}
        v, v_target = (case.state(run, xp.array) for run in (0, 1))
        wanted = case.block(params, v_target)
        patch = proof.construct(params, v, v_target)
        factored = case.block(patch.applied_to(params), v)
        # and as stored: each token has one change of each tensor, and a row of a mixture is no token
        merged = []
        for token in range(2):
            moved = stored(patch, params, token)
            assert all((moved[n] == params[n])[mask].all() for n, mask in case.still.items()), f"{case}: frozen moved"
            merged.append(case.block(moved, at(v, token)))
        difference = np.concatenate([factored - wanted, np.stack(merged) - wanted])
        return float(max(abs(x) for x in difference.reshape(-1)) / (1 + max(abs(x) for x in wanted.reshape(-1))))


def stored(patch: ct.Patch, params: dict[str, Any], token: int) -> dict[str, Any]:
    """Every whole tensor with what the patch adds to it, or to slices of it."""
    moved = {name: value.copy() for name, value in params.items()}
    for param, delta in patch.deltas.items():
        part = moved[param.name][param.index]
        moved[param.name][param.index] = part + delta.dense()[token].reshape(part.shape)
    return moved


def at(state: Any, token: int) -> Any:
    return tuple(x[token] for x in state) if isinstance(state, tuple) else state[token]


# ---------------------------------------------------------------------------------------------- refusals


def judged_refusal(case: Case, reason: str) -> tuple[str, str]:
    """What another theorem or route, the rank, or least squares says of a tree refused for ``reason``."""
    for via in ("input-output", "output"):
        if case.options == {"via": via, "route": "auto"}:
            continue
        try:
            ct.prove(case.block, via=via, frozen=case.frozen)
            return OTHERWISE, f"via={via!r}, route='auto' has a proof"
        except ct.NotControllable as refused:
            reason = refused.reason if via == "output" else reason
    judged = Affine.of(case)
    if judged is None:
        return BENT, f"{'reached' if tried(case) else 'not reached'}: {reason_class(reason)}"
    if not any(judged.full):
        return AFFINE, AGREES
    kind = judged.kind(judged.full.index(True))
    assert kind, f"{case}\nrefused ({reason}), but the Jacobian has full row rank and docs/incompleteness.md lacks it"
    return AFFINE, f"full rank, known: {kind}"


def tried(case: Case) -> bool:
    """Whether least squares reaches the sampled target of the second token (the first may be 0)."""
    source, target = at(case.state(0), 1), case.block(case.values, at(case.state(1), 1))
    return oracles.solver_reaches(lambda p: case.block(p, source), case.values, case.masks, target, case.seed)


REASONS = (
    "used twice", "may not move", "no parameter that moves its output", "no parameter that steers", "no inner function",
    "one row for each chosen expert", "do not end in their own linear map", "no part of the inner function",
    "no parameter after or before", "does not implement", "not input-controllable", "may move alone on route scale",
)  # fmt: skip


def reason_class(reason: str) -> str:
    """What a refusal says, without names."""
    return next((known for known in REASONS if known in reason), "another reason")


@dataclass(frozen=True)
class Affine:
    """A tree whose output is affine in all that may move, with its Jacobian."""

    case: Case
    numbers: oracles.Numbers
    columns: dict[str, np.ndarray]  # parameter -> (tokens, d, its entries that may move)

    @staticmethod
    def of(case: Case) -> Affine | None:
        """None where the output is not affine."""
        if oracles.surely_bent(case.function(), case.values, case.masks, case.seed):
            return None
        found = oracles.affine_jacobian(
            lambda numbers: case.function(numbers.array), case.values, case.masks, case.seed
        )
        return found and Affine(case, *found)

    def rank(self, token: int, masks: oracles.Masks) -> int:
        """The rank when only these entries may move."""
        kept = [self.columns[name][token][:, masks[name][free]] for name, free in self.case.masks.items()]
        return oracles.rank(np.concatenate(kept, -1), self.numbers) if kept else 0

    @cached_property
    def full(self) -> tuple[bool, ...]:
        """For each token whether any output can be reached."""
        return tuple(self.rank(token, self.case.masks) == D for token in range(2))

    def kind(self, token: int) -> str:
        """Which known incompleteness explains a refusal; '' if none does.

        Rules move one parameter of one term (a normalised output aside, which is not affine).  So either no parameter
        has full rank on its own, or something stands in the way of every one that has.
        """
        alone = [p for p in self.case.params if self.rank(token, self.case.entries([p])) == D]
        obstacles = [next((name for name, holds in KINDS.items() if holds(self.case, p)), "") for p in alone]
        return "" if "" in obstacles else (*obstacles, TOGETHER)[0]


def uses(case: Case, param: Param) -> list[tuple[tuple[int, ...], Component]]:
    """Where entries of a parameter are read: paths and components."""
    return [(path, part) for path, part in nodes(case.block) for own in part.own_parameters() if own.overlaps(param)]


def around(case: Case, param: Param) -> Iterator[tuple[Component, int]]:
    """The components around the (first) use of a parameter, and in which of their parts it stands."""
    (path, _), part = uses(case, param)[0], case.block
    for index in path:
        yield part, index
        part = part.children()[index]


def used_twice(case: Case, param: Param) -> bool:
    return len(uses(case, param)) > 1


def unsteered(case: Case, param: Param) -> bool:
    _, leaf = uses(case, param)[0]
    return param != leaf.weight if isinstance(leaf, ExpertLinear) else not isinstance(leaf, Linear | Scale | Bias)


def in_mixture(case: Case, param: Param) -> bool:
    """Unless it is the last map of experts that end in it."""
    return any(
        isinstance(part, Mixture) and not (index == 2 and isinstance(part.last, ExpertLinear))
        for part, index in around(case, param)
    )


def behind(case: Case, param: Param) -> bool:
    later = (x for part, i in around(case, param) if isinstance(part, Sequence) for x in part.parts[i + 1 :])
    return not all(isinstance(part, Bijection) for part in later)


TOGETHER = "several together"


def weighed(case: Case, param: Param) -> bool:
    return any(isinstance(part, SelfWeighted) for part, _ in around(case, param))


KINDS: dict[str, Callable[[Case, Param], bool]] = {
    "used twice": used_twice,
    "no rule moves it": unsteered,
    "inside a mixture": in_mixture,
    "inside a weighted sum of streams": weighed,
    "a fixed part after it": behind,
}


# ----------------------------------------------------------------------------------------- many, counted


def outcome(seed: int) -> tuple[str, str]:
    """The judgement of one seed; what is wrong is told instead of raised."""
    try:
        return judge(grown(seed))
    except Exception as wrong:
        return WRONG, f"seed {seed}: {type(wrong).__name__}: {wrong}"


def table(counts: Counter[tuple[str, str]]) -> str:
    """The counts, each outcome with its particulars."""
    lines = [f"{counts.total():7} random trees"]
    for kind in OUTCOMES:
        rows = sorted((particular, n) for (k, particular), n in counts.items() if k == kind)
        lines.append(f"{sum(n for _, n in rows):7}   {kind}")
        lines += [f"{n:7}       {particular}" for particular, n in rows]
    return "\n".join(lines)


def counted(seeds: range, jobs: int = 1, every: float = 5.0) -> Counter[tuple[str, str]]:
    """The outcomes of many seeds, with a line of progress on stderr every few seconds."""
    counts: Counter[tuple[str, str]] = Counter()
    begun = told = time.monotonic()
    with get_context("spawn").Pool(jobs) as pool:
        for done, found in enumerate(pool.imap_unordered(outcome, seeds, chunksize=10), 1):
            counts[found] += 1
            now = time.monotonic()
            if found[0] == WRONG or now - told > every:
                told, wrong = now, found[1] if found[0] == WRONG else ""
                tally = Counter(kind for kind, _ in counts.elements())
                so_far = "; ".join(f"{tally[kind]} {kind}" for kind in OUTCOMES)
                print(f"{done} of {len(seeds)}, {now - begun:.0f} s: {so_far}  {wrong}", file=sys.stderr, flush=True)
    return counts
