"""Joint proofs of random component trees: one patch for one to four tokens at 50 digits, or a refusal that holds.

The judge knows no rule: where the output is affine in everything that a derivation moves, the wanted changes of all tokens, stacked, must
lie in the column space of the stacked Jacobian for a patch to exist.  A derivation that moves one parameter and refuses must be right.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import mpmath
import numpy as np
import oracles
import pytest
from judging import DIGITS, LIMIT, Affine, used_twice
from trees import Case, D, Grower

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.interfaces import Layout, overlap
from controllability.solvers.dependence_certificate import Dependent

MPMATH = ARITHMETICS["mpmath"]


def grown(seed: int) -> Case:
    rng = random.Random(seed)
    grower = Grower(rng)
    block = grower.block(rng.randint(1, 4))
    tokens = rng.choice((1, 2, 3, 3, 4))
    states = np.random.default_rng(seed).normal(size=(2, len(Layout.of(block).inputs), tokens, D))
    if tokens > 1 and rng.random() < 0.3:  # a repeated state: with the same target, or with another
        states[0, :, 1] = states[0, :, 0]
        if rng.random() < 0.5:
            states[1, :, 1] = states[1, :, 0]
    options = {"via": rng.choice(("input-output", "output"))}
    return Case(seed, block, grower.values, grower.frozen(block), options, states)


def judge(case: Case) -> str:
    try:
        proof = ct.prove(case.block, frozen=case.frozen, jointly=True, **case.options)
    except ct.NotControllable as refused:
        assert refused.culprit
        assert refused.reason
        return "no proof"
    assert all(step.rule.jointly is not False for step in proof.root.walk())
    try:
        residual = executed(proof, case, DIGITS)
        if residual > LIMIT:  # badly conditioned, or wrong?  Rounding falls with the precision
            assert executed(proof, case, 2 * DIGITS) < residual * LIMIT, f"{case}: residual {residual:.3g}"
    except ct.SideConditionFailed as failed:
        assert failed.hint or failed.statement
        return judged_refusal(case, proof)
    return f"{case.states.shape[2]} tokens, one patch"


def executed(proof: ct.Proof, case: Case, digits: int) -> float:
    """max |difference| / (1 + max |target|) over all tokens, with the factors of the patch and with stored tensors."""
    with mpmath.workdps(digits):
        params = {name: MPMATH.array(value) for name, value in case.values.items()}
        v, v_target = (case.state(run, MPMATH.array) for run in (0, 1))
        wanted = case.block(params, v_target)
        patch = proof.construct(params, v, v_target)
        moved = {name: value.copy() for name, value in params.items()}
        for param, delta in patch.deltas.items():
            part = moved[param.name][param.index]
            moved[param.name][param.index] = part + delta.dense().reshape(part.shape)  # one change, without tokens
        assert all((moved[n] == params[n])[mask].all() for n, mask in case.still.items()), f"{case}: frozen moved"
        found = [case.block(patch.applied_to(params), v) - wanted, case.block(moved, v) - wanted]
        size = 1 + max(abs(x) for x in wanted.reshape(-1))
        return float(max(abs(x) for x in np.concatenate(found).reshape(-1)) / size)


def judged_refusal(case: Case, proof: ct.Proof) -> str:
    """What the rank says of the first derivation, which refuses these tokens."""
    alone = replace(proof, alternatives=())
    try:
        executed(alone, case, DIGITS)
        return "condition failed, the derivation alone serves"
    except ct.SideConditionFailed as failed:
        certificate = failed.certificate
    if isinstance(certificate, Dependent):
        assert certificate.inputs < 1e-9, f"{case}: {certificate}"
        assert certificate.targets > 1e-9, f"{case}: {certificate}"
    moved = proof.root.moved
    still = [str(p) for p in case.block.parameters() - moved if not overlap(frozenset({p}), moved)]
    only = Case(case.seed, case.block, case.values, sorted(still), case.options, case.states)
    judged = Affine.of(only)
    inner = any(step.rule.side == "input" for step in [*proof.root.walk()][1:])  # asks for more than it must
    if judged is None or inner or len(moved) > 1 or any(used_twice(only, p) for p in moved):
        return "condition failed, not judged"
    if certificate is None:
        return "condition failed, no certificate"
    assert not reachable(judged), f"{case}\nrefused ({certificate}), but the stacked Jacobian reaches the targets"
    return "condition failed, the rank says no as well"


def reachable(judged: Affine) -> bool:
    """Whether the stacked wanted change lies in the column space of the stacked Jacobian."""
    case, numbers = judged.case, judged.numbers
    with mpmath.workdps(DIGITS):
        stored = {name: numbers.array(value) for name, value in case.values.items()}
        gap = case.block(stored, case.state(1, numbers.array)) - case.block(stored, case.state(0, numbers.array))
        columns = [c.reshape(gap.size, -1) for c in judged.columns.values()]
        jacobian = np.concatenate(columns, -1)
        return oracles.rank(np.concatenate([jacobian, gap.reshape(-1, 1)], -1), numbers) == oracles.rank(
            jacobian, numbers
        )


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(220), marks=pytest.mark.slow)], ids=len)
def test_random_trees_with_one_patch_for_many_tokens(capsys, seeds):
    counts = Counter(judge(grown(seed)) for seed in seeds)
    with capsys.disabled():
        print("\n" + "\n".join(f"{n:7}  {kind}" for kind, n in sorted(counts.items())))
    assert sum(n for kind, n in counts.items() if "one patch" in kind) >= len(seeds) * 50 / 220
    assert all(counts[f"{tokens} tokens, one patch"] >= len(seeds) * 5 / 220 for tokens in (1, 2, 3))
    assert counts["condition failed, the rank says no as well"] >= len(seeds) * 5 / 220
