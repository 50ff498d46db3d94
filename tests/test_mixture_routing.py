"""The routing of a mixture: choice, shares and margin, against plain NumPy formulas for one token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import error
from mixtures import CORRECTION, PER_EXPERT, E, K, sigmoid

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import Routing
from controllability.interfaces import Param

# ------------------------------------------------------------------- routing: oracles for one token, plain NumPy


def soft(z):
    weights = np.exp(z - max(z))
    return weights / weights.sum()


def best(scores, k):
    """Where the k largest stand."""
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


def renormalised(shares, power=1, eps=0.0):
    size = sum(abs(s) ** power for s in shares.values()) ** (1 / power) + eps
    return {e: s / size for e, s in shares.items()}


def pick(values, chosen):
    return {e: values[e] for e in chosen}


def limited(choice, groups, kept, best_of, fill):
    """The choice with every group but the best ones filled; a group is worth the sum of its best."""
    members = np.array_split(np.arange(len(choice)), groups)
    worth = [sum(sorted(choice[m])[-best_of:]) for m in members]
    open_ = {int(e) for g in best(worth, kept) for e in members[g]}
    return np.array([c if e in open_ else fill for e, c in enumerate(choice)])


def grouped(z, c, p):
    s = sigmoid(z)
    chosen = best(limited(s + c, 3, 2, 2, -math.inf), K)
    return {e: 2.5 * share for e, share in renormalised(pick(s, chosen), eps=1e-20).items()}


def greedy_groups(z, c, p):
    s = soft(z)
    return {e: 16 * s[e] for e in best(limited(s, 3, 1, 1, 0.0), K)}


def sparse_mixer(z, c, p, jitter=0.2):
    """Two rounds: the arg-max, and its soft-max among those that are not much worse; then without it."""
    shares, rest = {}, dict(enumerate(z))
    for _ in range(2):
        top = max(rest, key=rest.__getitem__)
        near = {e: x for e, x in rest.items() if (rest[top] - x) / max(abs(x), rest[top]) <= 2 * jitter}
        shares[top] = math.exp(rest[top]) / sum(math.exp(x) for x in near.values())
        del rest[top]
    return shares


ROUTINGS = {
    "soft-max, top k": (Routing(K), lambda z, c, p: pick(soft(z), best(z, K))),
    "renormalised": (Routing(K, renormalise=1), lambda z, c, p: renormalised(pick(soft(z), best(z, K)))),
    "2-norm": (Routing(K, renormalise=2), lambda z, c, p: renormalised(pick(soft(z), best(z, K)), 2)),
    "3-norm": (Routing(K, renormalise=3), lambda z, c, p: renormalised(pick(soft(z), best(z, K)), 3)),
    "top k, then soft-max": (
        Routing(K, after=True),
        lambda z, c, p: dict(zip(best(z, K), soft(z[best(z, K)]), strict=True)),
    ),
    "top k, then sigmoid": (Routing(K, "sigmoid", after=True), lambda z, c, p: pick(sigmoid(z), best(z, K))),
    "identity": (Routing(K, "identity"), lambda z, c, p: pick(z, best(z, K))),
    "all": (Routing(E), lambda z, c, p: dict(enumerate(soft(z)))),
    "one": (Routing(1), lambda z, c, p: pick(soft(z), best(z, 1))),
    "correction": (
        Routing(K, "sigmoid", correction=CORRECTION, renormalise=1, eps=1e-20, scaling=2.5),
        lambda z, c, p: {
            e: 2.5 * s for e, s in renormalised(pick(sigmoid(z), best(sigmoid(z) + c, K)), eps=1e-20).items()
        },
    ),
    "correction of the logits": (
        Routing(K, "sigmoid", correction=CORRECTION, choose_logits=True),
        lambda z, c, p: pick(sigmoid(z), best(z + c, K)),
    ),
    "best groups": (
        Routing(K, "sigmoid", correction=CORRECTION, groups=(3, 2), renormalise=1, eps=1e-20, scaling=2.5), grouped,
    ),
    "greedy groups": (Routing(K, groups=(3, 1), group_best=1, group_fill=0.0, scaling=16), greedy_groups),
    "per-expert scale": (
        Routing(K, renormalise=1, per_expert=PER_EXPERT),
        lambda z, c, p: {e: s * p[e] for e, s in renormalised(pick(soft(z), best(z, K))).items()},
    ),
    "soft-cap": (Routing(K, cap=1.5), lambda z, c, p: pick(soft(1.5 * np.tanh(z / 1.5)), best(z, K))),
    "sparse mixer": (Routing(2, "sparsemixer", jitter=0.2), sparse_mixer),
    "no expert": (
        Routing(1, skip=True),
        lambda z, c, p: {0: 0.0} if best(z, 1) == [E - 1] else pick(soft(z), best(z, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_agrees_with_its_formula_token_by_token(name):
    routing, oracle = ROUTINGS[name]
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(40, E))
    correction, per_expert = rng.normal(size=E), rng.normal(size=E)
    params = {"correction": correction, "per_expert": per_expert}
    index, shares = routing(params, logits)
    wanted = [dict(sorted(oracle(z, correction, per_expert).items())) for z in logits]
    assert index.tolist() == [list(w) for w in wanted]
    assert np.allclose(shares, [list(w.values()) for w in wanted], rtol=1e-13, atol=0)
    assert len({tuple(row) for row in index.tolist()}) > 1 or name == "all", "one choice for all tokens tests nothing"
    tensors = {n: torch.as_tensor(x) for n, x in params.items()}
    torch_index, torch_shares = routing(tensors, torch.as_tensor(logits).reshape(8, 5, E))
    assert torch_index.reshape(40, -1).tolist() == index.tolist()
    assert error(torch_shares.reshape(40, -1), shares) < 1e-15
    digits = {n: ARITHMETICS["mpmath"].array(x) for n, x in params.items()}
    found, many = routing(digits, ARITHMETICS["mpmath"].array(logits[:5]))
    assert found.tolist() == index[:5].tolist()
    assert max(abs(float(x)) for x in (many - shares[:5]).reshape(-1)) < 1e-14


def test_the_correction_counts_for_the_choice_alone():
    logits, correction = np.array([3.0, 2.0, 1.0]), np.array([0.0, 0.0, 9.0])
    index, shares = Routing(1, "sigmoid", correction=Param("c"))({"c": correction}, logits)
    assert index.tolist() == [2]
    assert np.allclose(shares, sigmoid(1.0))


def test_a_correction_that_is_stored_as_a_row_serves_one_token_too():
    correction = np.array([[0.0, 0.0, 9.0]])
    routing = Routing(1, correction=Param("c"))
    for logits in (np.array([3.0, 2.0, 1.0]), np.array([[3.0, 2.0, 1.0]] * 2)):
        index, shares = routing({"c": correction}, logits)
        assert index.shape == shares.shape == (*logits.shape[:-1], 1)
        assert (index == 2).all()


@pytest.mark.parametrize(("routing", "logits"), [
    (Routing(2), [1.0, 3.0, 2.0, 2.0]),
    (Routing(2, "sigmoid", groups=(2, 1)), [1.0, 2.0, 2.0, 1.0]),  # the groups are tied, the experts in one are not
    (Routing(2, "sparsemixer", jitter=0.01), [3.0, 3.0, 1.0, 2.0]),  # who is first decides the shares
])  # fmt: skip
def test_the_margin_is_zero_at_a_tie_and_positive_beside_it(routing, logits):
    tied = np.array(logits)
    assert routing.margin({}, tied).tolist() == [0.0]
    assert routing.margin({}, tied + np.array([0, 1e-3, 0, 0.0]) + np.array([0, 0, 1e-4, 0.0]))[0] > 1e-6


def test_two_choices_that_may_both_be_no_expert_are_refused():
    """They would be the same expert twice, and one matrix would be changed twice."""
    with pytest.raises(ct.BadInput, match="skip"):
        Routing(2, skip=True)


def test_where_there_is_nothing_to_choose_the_margin_is_vacuous():
    assert Routing(3).margin({}, np.array([1.0, 1.0, 1.0])).tolist() == [math.inf]
