"""Soundness: whenever the prover says yes and the side conditions hold, the executed proof verifies.

300 trees in the suite; ``python tests/test_random_trees.py 20000`` runs more and prints the counts.
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import mpmath
import numpy as np
from helpers import error
from trees import D, Grower

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.sampling import inputs_of

DIGITS, LIMIT = 50, 1e-30  # what 50 digits leave after losses of conditioning; a wrong rule leaves 1e-3 and more


def judge(seed: int) -> tuple[str, str]:
    """(outcome, description) of one random tree: no, condition, yes; anything else raises."""
    rng = random.Random(seed)
    grower = Grower(rng)
    block = grower.block(rng.randint(1, 4))
    frozen = [name for name in grower.values if rng.random() < 0.1]
    options = {
        "via": rng.choice(("input-output", "output")),
        "route": rng.choice(("auto", "auto", "scale", "secular", "uniform", "ball")),
    }
    numbers = np.random.default_rng(seed)
    states = numbers.normal(size=(2, inputs_of(block), 2, D))  # source and target, inputs, tokens, features
    if rng.random() < 0.05:
        states[0, 0, 0] = 0
    shown = f"seed {seed}: {block.describe()}  frozen {frozen} {options}"
    try:
        proof = ct.prove(block, frozen=frozen, **options)
    except ct.NotControllable as refused:
        assert refused.culprit
        assert refused.reason
        assert refused.hint
        return "no", shown
    assert not {str(p) for p in proof.root.moved} & set(frozen), shown
    try:
        residual = executed(proof, block, grower.values, states, DIGITS)
        if residual > LIMIT:  # badly conditioned, or wrong?  Rounding falls with the precision
            assert executed(proof, block, grower.values, states, 2 * DIGITS) < residual * LIMIT, (
                f"{shown}\nresidual {residual:.3g}"
            )
    except ct.SideConditionFailed:
        return "condition", shown
    return "yes", shown


def executed(proof, block, values, states, digits) -> float:
    """max |difference| / (1 + max |target|) of the executed proof, computed with so many digits."""
    with mpmath.workdps(digits):
        xp = ARITHMETICS["mpmath"]
        params = {name: xp.array(value) for name, value in values.items()}
        v, v_target = (tuple(map(xp.array, run)) if len(run) > 1 else xp.array(run[0]) for run in states)
        wanted = block(params, v_target)
        patch = proof.construct(params, v, v_target)
        factored = block(patch.applied_to(params), v)
        # and as stored: each token has one change of each tensor, and a row of a mixture is no token
        merged = np.stack([block(params | stored(patch, params, token), at(v, token)) for token in range(2)])
        difference = np.concatenate([factored - wanted, merged - wanted])
        return float(max(abs(x) for x in difference.reshape(-1)) / (1 + max(abs(x) for x in wanted.reshape(-1))))


def stored(patch, params, token):
    return {name: params[name] + delta.dense()[token].reshape(params[name].shape) for name, delta in patch.items()}


def at(state, token):
    return tuple(x[token] for x in state) if isinstance(state, tuple) else state[token]


def test_300_random_trees():
    counts = Counter(judge(seed)[0] for seed in range(300))
    print(dict(counts))
    assert counts["yes"] >= 100
    assert counts["no"] >= 30
    assert counts["condition"] >= 5


def test_the_judge_notices_a_wrong_rule(monkeypatch):
    """A mutated construction must not pass: the rank-1 patch with the norm instead of its square."""
    from controllability.components import linear
    from controllability.deltas import LowRank

    def wrong(self, params, x, gap):
        right = x / ARITHMETICS["mpmath"].sqrt((x * x).sum(-1, keepdims=True))
        return LowRank(gap[..., None, :], right[..., None, :], transposed=self.layout == "in_out")

    monkeypatch.setattr(linear.Linear, "_rank_one", wrong)
    caught = 0
    for seed in range(40):
        try:
            judge(seed)
        except AssertionError:
            caught += 1
    assert caught >= 5


def test_float64_agrees_with_50_digits_on_the_same_tree():
    agreed = 0
    for seed in range(100):
        rng = random.Random(seed)
        grower = Grower(rng, sharing=0)
        block = grower.tree(3)
        v, v_target = np.random.default_rng(seed).normal(size=(2, 2, D))
        try:
            patch = ct.prove(block).construct(grower.values, v, v_target)
        except ct.ControllabilityError:
            continue
        assert error(block(patch.applied_to(grower.values), v) + 1, block(grower.values, v_target) + 1) < 1e-6
        agreed += 1
    assert agreed >= 20


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    tally: Counter[str] = Counter()
    for number in range(total):
        try:
            tally[judge(number)[0]] += 1
        except Exception as wrong:
            tally["WRONG"] += 1
            print(type(wrong).__name__, wrong)
    print(dict(tally))
