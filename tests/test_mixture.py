"""Mixtures of experts: routing and values against oracles per token, rules against linear algebra, refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import error

import architectures
import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import (
    XIELU,
    Activation,
    Bias,
    ExpertLinear,
    Glu,
    Identity,
    Linear,
    Mixture,
    Product,
    Routing,
    Share,
    SoftCap,
    Sum,
    Times,
    gated,
    residual,
    rms_norm,
)
from controllability.interfaces import Component, Param

E, K, D, H, TOKENS = 6, 2, 5, 4, 7
SILU = Activation("silu")

# ------------------------------------------------------------------- routing: oracles for one token, plain NumPy


def soft(z):
    weights = np.exp(z - max(z))
    return weights / weights.sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


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


CORRECTION, PER_EXPERT = Param("correction", ("E",)), Param("per_expert", ("E",))
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


# --------------------------------------------------------------------------------- the mixture and its value


def experts(name: str, out: str, into: str, bias: bool = False, **options) -> ExpertLinear:
    shape = ("E", into, out) if options.get("layout") == "in_out" else ("E", out, into)
    return ExpertLinear(Param(name, shape), Param(f"{name}_bias", ("E", out)) if bias else None, **options)


ROUTER = Linear(Param("R", ("E", "d")), Param("r", ("E",)))
TOP = Routing(K, renormalise=1)
PLAIN = Mixture(ROUTER, TOP, experts("U", "h", "d") >> SILU, experts("V", "d", "h"))
MIXTURES = {
    "plain": PLAIN,
    "biases": Mixture(ROUTER, TOP, experts("U", "h", "d", True) >> SILU, experts("V", "d", "h", True)),
    "stored in_out": Mixture(
        ROUTER, TOP, experts("U", "h", "d", layout="in_out") >> SILU, experts("V", "d", "h", layout="in_out")
    ),
    "fused halves": Mixture(ROUTER, TOP, experts("U", "2h", "d", True) >> Glu(SILU), experts("V", "d", "h")),
    "gate and up": Mixture(
        ROUTER, TOP, gated(experts("G", "h", "d"), experts("U", "h", "d"), SILU), experts("V", "d", "h")
    ),
    "share first": Mixture(
        ROUTER, Routing(1, "sigmoid", after=True), Share() >> experts("U", "h", "d") >> SILU, experts("V", "d", "h"),
        weighted=False,
    ),
    "in the best groups": Mixture(
        ROUTER, Routing(K, "sigmoid", correction=CORRECTION, groups=(3, 2), renormalise=1, scaling=2.5),
        experts("U", "h", "d") >> SILU, experts("V", "d", "h"),
    ),
    "sparse mixer": Mixture(
        ROUTER, Routing(2, "sparsemixer", jitter=0.1), experts("U", "h", "d") >> SILU, experts("V", "d", "h")
    ),
    "latent": Mixture(
        ROUTER, TOP, Linear(Param("L", ("l", "d"))) >> experts("U", "h", "l") >> SILU, experts("V", "d", "h")
    ),
}  # fmt: skip


def drawn(block, seed=0, tokens=(TOKENS,)):
    return ct.sample(block, seed=seed, tokens=tokens, d=D, h=H, E=E)


def dense(name, params, x):
    """Every expert for every token, one after the other, weighted by the shares; zero for those not chosen."""
    mixture = MIXTURES[name]

    def matrix(which, e):
        w = params[which][e]
        return w.T if name == "stored in_out" else w

    def bias(which, e):
        return params[f"{which}_bias"][e] if f"{which}_bias" in params else 0

    def silu(z):
        return z * sigmoid(z)

    total = np.zeros((len(x), D))
    for t, token in enumerate(x):
        chosen, shares = mixture.routing(params, params["R"] @ token + params["r"])
        for e in range(E):
            s = dict(zip(chosen.tolist(), shares.tolist(), strict=True)).get(e, 0.0)
            read = params["L"] @ token if name == "latent" else token * s if name == "share first" else token
            hidden = matrix("U", e) @ read + bias("U", e)
            if name == "fused halves":
                hidden = silu(hidden[:H]) * hidden[H:]
            elif name == "gate and up":
                hidden = silu(params["G"][e] @ read) * hidden
            else:
                hidden = silu(hidden)
            out = matrix("V", e) @ hidden + bias("V", e)
            total[t] += out * (s > 0 if name == "share first" else s)
    return total


@pytest.mark.parametrize("name", MIXTURES)
def test_the_value_agrees_with_a_loop_over_all_experts(name):
    params, x, _ = drawn(MIXTURES[name])
    assert error(MIXTURES[name](params, x), dense(name, params, x)) < 1e-14
    assert error(MIXTURES[name](params, x.reshape(1, TOKENS, D))[0], dense(name, params, x)) < 1e-14
    tensors = {n: torch.as_tensor(p) for n, p in params.items()}
    assert error(MIXTURES[name](tensors, torch.as_tensor(x)), dense(name, params, x)) < 1e-14


def test_experts_stacked_in_two_dimensions_are_the_same_experts():
    """dbrx stores (experts · rows, columns); a merged patch has that shape too."""
    three = residual(PLAIN)
    two = residual(
        Mixture(ROUTER, TOP, ExpertLinear(Param("U"), stacked=E) >> SILU, ExpertLinear(Param("V"), stacked=E))
    )
    params, v, v_target = drawn(three, tokens=())
    flat = params | {n: params[n].reshape(-1, params[n].shape[-1]) for n in ("U", "V")}
    assert np.array_equal(two(flat, v), three(params, v))
    for via in ("input-output", "output"):
        merged = ct.prove(two, via).construct(flat, v, v_target).merged_into(flat)
        assert {n: x.shape for n, x in merged.items()} == {n: x.shape for n, x in flat.items()}
        assert error(two(merged, v), three(params, v_target)) < 1e-13


# ---------------------------------------------------------------------------------- both theorems, every kind


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_residual_mixture_is_patched_and_a_merged_patch_is_the_same(name, via):
    block = residual(rms_norm("pre") >> MIXTURES[name])
    params, v, v_target = drawn(block, seed=4)
    proof = ct.prove(block, via)
    patch = proof.construct(params, v, v_target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-12
    assert error(block(params, v), block(params, v_target)) > 1e-2
    single = proof.construct(params, v[2], v_target[2])
    merged = single.merged_into(params)
    assert all(merged[n].shape == params[n].shape for n in params)
    assert error(block(merged, v[2]), block(single.applied_to(params), v[2])) < 1e-13
    assert error(block(merged, v[2]), block(params, v_target[2])) < 1e-12


def test_inside_the_mixture_theorem_1_gives_what_the_target_run_had():
    block = residual(rms_norm("pre") >> PLAIN)
    params, v, v_target = drawn(block)
    proof = ct.prove(block)
    assert "T-mixture" in proof.rules
    assert {str(p) for p in proof.root.moved} >= {"R", "U", "V"}
    patched = proof.construct(params, v, v_target).applied_to(params)
    here, there = ct.Trace(block, patched, v), ct.Trace(block, params, v_target)
    mixture = (1, 2)
    for inside in ((*mixture, 0), (*mixture, 1)):  # logits, hidden activations of the chosen experts
        assert error(here.output(inside), there.output(inside)) < 1e-13
        assert error(ct.Trace(block, params, v).output(inside[:-1]), there.output(inside[:-1])) > 1e-2


LIMITS = {"numpy": 1e-13, "torch": 1e-5, "mpmath": 1e-47}


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("kind", LIMITS)
def test_one_proof_runs_on_every_kind_of_numbers(kind, via):
    block = residual(rms_norm("pre") >> (MIXTURES["in the best groups"] + Linear(Param("shared", ("d", "d")))))
    with mpmath.workdps(50):
        params, v, v_target = ct.sample(block, kind, tokens=(3,), d=D, h=H, E=E)
        found = block(ct.prove(block, via).construct(params, v, v_target).applied_to(params), v)
        wanted = block(params, v_target)
        size = max(abs(x) for x in wanted.reshape(-1))
        assert max(abs(x) for x in (found - wanted).reshape(-1)) / size < LIMITS[kind]
        assert max(abs(x) for x in (block(params, v) - wanted).reshape(-1)) / size > 1e-2


RATIONAL = {
    "plain": Routing(K, "identity", renormalise=1, scaling=Fraction(5, 2)),
    "best groups": Routing(K, "identity", correction=CORRECTION, groups=(3, 2), per_expert=PER_EXPERT),
}


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", RATIONAL)
def test_fractions_leave_exactly_nothing(name, via):
    """Scores that are fractions too; which of them is largest is decided exactly."""
    cubic = Activation("cubic", coefficients=(1, 2, 0, 1))
    block = residual(Mixture(ROUTER, RATIONAL[name], experts("U", "h", "d") >> cubic, experts("V", "d", "h", True)))
    for seed in range(3):
        params, v, v_target = ct.sample(block, "rational", seed, d=3, h=2, E=E)
        patch = ct.prove(block, via).construct(params, v, v_target)
        assert (block(patch.applied_to(params), v) == block(params, v_target)).all()
        assert (block(patch.merged_into(params), v) == block(params, v_target)).all()
        assert (block(params, v) != block(params, v_target)).any()


@pytest.mark.parametrize("via", ["input-output", "output"])
def test_symbols_leave_exactly_nothing(via):
    block = residual(
        Mixture(ROUTER, Routing(2), experts("U", "h", "d") >> Activation("phi", symbol=True), experts("V", "d", "h"))
    )
    params, v, v_target = ct.sample(block, "sympy", d=2, h=2, E=3)
    patch = ct.prove(block, via).construct(params, v, v_target)
    assert ct.verify(block, params, patch, v, v_target).exact
    doubled = ct.Patch(
        {p: type(d)(**(vars(d) | {"left": 2 * d.left})) for p, d in patch.deltas.items() if str(p) == "V"},
        definitions=patch.definitions,
    )
    assert not ct.verify(block, params, doubled, v, v_target).exact


# --------------------------------------------------------------------------------- O-mixture: least norm


def active(block, params, v):
    """(chosen experts, shares, their hidden activations) at one token of residual(mixture)."""
    trace = ct.Trace(block, params, v)
    bound = trace.bound((1,))
    chosen, shares = bound.values()
    return chosen, shares, trace.output((1, 1))


@pytest.mark.parametrize("routing", [TOP, Routing(3), Routing(E, "sigmoid"), Routing(1)])
def test_the_patch_is_the_smallest_of_all_that_reach_the_target(routing):
    """Σ_j s_j ΔW_j y_j = δ as one linear system in all entries of the active experts' last matrices."""
    block = residual(Mixture(ROUTER, routing, experts("U", "h", "d") >> SILU, experts("V", "d", "h")))
    for seed in range(5):
        params, v, v_target = drawn(block, seed, ())
        chosen, shares, y = active(block, params, v)
        gap = block(params, v_target) - block(params, v)
        system = np.concatenate([s * np.kron(np.eye(D), y_j[None]) for s, y_j in zip(shares, y, strict=True)], 1)
        least = np.linalg.lstsq(system, gap, rcond=None)[0].reshape(len(chosen), D, H)
        found = ct.prove(block, "output").construct(params, v, v_target)["V"]
        assert np.allclose(found.dense()[chosen], least, atol=1e-12 * abs(least).max())
        assert np.isclose(found.norms(), np.linalg.norm(least))


def test_experts_that_are_not_chosen_keep_every_bit():
    block = residual(PLAIN)
    params, v, v_target = drawn(block, tokens=())
    for via in ("input-output", "output"):
        patch = ct.prove(block, via).construct(params, v, v_target)
        merged = patch.merged_into(params)
        chosen = ct.Trace(block, merged, v).bound((1,))["(chosen experts)"]
        others = [e for e in range(E) if e not in chosen]
        assert len(others) == E - K
        for name in set(patch) & {"U", "V"}:
            assert merged[name][others].tobytes() == params[name][others].tobytes()
            assert all((merged[name][e] != params[name][e]).any() for e in chosen)


def test_shares_that_sum_to_zero_are_no_obstacle():
    """[G] adds δ/S to what every active expert gives: there S = 0, and no common addition changes the sum at all."""
    block = residual(
        Mixture(
            Linear(Param("R", ("E", "d"))),
            Routing(2, "identity"),
            experts("U", "h", "d") >> SILU,
            experts("V", "d", "h"),
        )
    )
    params, v, v_target = drawn(block, tokens=())
    params["R"] = np.full((E, D), -50.0) * v
    params["R"][1], params["R"][4] = v / (v @ v), -v / (v @ v)
    chosen, shares, y = active(block, params, v)
    assert chosen.tolist() == [1, 4]
    assert shares.tolist() == [shares[0], -shares[0]]
    common = np.array([3.0, -1.0, 2.0, 5.0, 4.0])
    out = [params["V"][e] @ y_j for e, y_j in zip(chosen, y, strict=True)]
    plain = sum(s * o for s, o in zip(shares, out, strict=True))
    added = sum(s * (o + common) for s, o in zip(shares, out, strict=True))
    assert np.allclose(added, plain, atol=1e-12)
    with np.errstate(divide="ignore"):
        assert not np.isfinite(common / shares.sum()).any()
    patch = ct.prove(block, "output").construct(params, v, v_target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-13


# -------------------------------------------------------------------------------------- side conditions
SMALL = Mixture(
    Linear(Param("R", (3, 2))), Routing(2, "identity"), ExpertLinear(Param("U", (3, 2, 2))) >> Activation("relu"),
    ExpertLinear(Param("V", (3, 2, 2))),
)  # fmt: skip
NO_ZERO = "some active expert has a share and an activation that are not zero"
NO_TIE = "the target run's choice of experts is no near-tie"


def by_hand(router, first):
    """Parameters of SMALL: router rows, and a multiple of the identity for each expert's first map."""
    eye = np.eye(2)
    return {"R": np.array(router, dtype=float), "U": np.stack([f * eye for f in first]), "V": np.stack([eye, eye, eye])}


def refused(block, params, v, v_target, via) -> ct.SideConditionFailed:
    with pytest.raises(ct.SideConditionFailed) as failed:
        ct.prove(block, via).construct(params, v, v_target)
    return failed.value


def test_activations_that_are_all_zero_are_refused_with_their_position():
    # positive tokens go to experts 1 and 2, whose relu lets nothing through; the others to 0 and 1
    params = by_hand([[0, 0], [1, 0], [2, 0]], [1, -1, -1])
    v = np.array([[-1.0, 1.0], [1.0, 1.0], [-1.0, 2.0]])
    failure = refused(residual(SMALL), params, v, v + 1, "output")
    assert (failure.statement, failure.position, failure.margin) == (NO_ZERO, 1, 0.0)


def test_one_activation_that_is_not_zero_is_enough():
    params = by_hand([[0, 0], [1, 0], [2, 0]], [1, 1, -1])
    block, v, v_target = residual(SMALL), np.array([1.0, 2.0]), np.array([3.0, 1.0])
    merged = ct.prove(block, "output").construct(params, v, v_target).merged_into(params)
    assert error(block(merged, v), block(params, v_target)) < 1e-15
    assert (merged["V"][1] != params["V"][1]).any()
    assert merged["V"][[0, 2]].tobytes() == params["V"][[0, 2]].tobytes()


def test_shares_that_are_all_zero_are_refused_with_their_position():
    params = by_hand([[-1, 0], [0, 1], [0, 1]], [1, 1, 1])
    v = np.array([[1.0, 1.0], [1.0, 0.0]])  # the second token's chosen experts have the share 0
    failure = refused(residual(SMALL), params, v, v + 1, "output")
    assert (failure.statement, failure.position, failure.margin) == (NO_ZERO, 1, 0.0)


@pytest.mark.parametrize(("second", "dtype", "tied"), [
    (1.0, "float64", True), (1 - 2e-15, "float64", True), (1 - 1e-6, "float64", False), (1 - 1e-6, "float32", True),
])  # fmt: skip
def test_a_near_tie_in_the_target_is_refused_with_its_margin_and_position(second, dtype, tied):
    params = {n: p.astype(dtype) for n, p in by_hand([[1, 0], [0, 1], [-1, -1]], [1, 1, 1]).items()}
    block = residual(Mixture(SMALL.router, Routing(1, "identity"), SMALL.inner, SMALL.last))
    v = np.array([[1.0, 3.0], [2.0, 1.0], [1.0, 4.0]], dtype=dtype)
    v_target = np.array([[1.0, 2.0], [1.0, second], [3.0, 1.0]], dtype=dtype)
    if tied:
        failure = refused(block, params, v, v_target, "input-output")
        assert (failure.statement, failure.position) == (NO_TIE, 1)
        assert failure.margin is not None
        assert -100 * np.finfo(dtype).eps < failure.margin <= 0
        assert "via='output'" in str(failure)
    else:
        patch = ct.prove(block).construct(params, v, v_target)
        assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-14
        assert 0 < min(m.value for m in patch.journal.margins if m.condition.statement == NO_TIE) <= 1e-6
    patch = ct.prove(block, "output").construct(params, v, v_target)  # keeps what the source run chooses
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize(("token", "hidden", "dtype"), [
    (1e-170, 1.0, "float64"), (1e160, 1.0, "float64"), (1.0, 1e-170, "float64"), (1.0, 1e160, "float64"),
    (1e-23, 1.0, "float32"), (1e20, 1.0, "float32"), (1.0, 1e-23, "float32"), (1.0, 1e20, "float32"),
])  # fmt: skip
def test_sizes_that_cannot_be_squared(token, hidden, dtype, via):
    """What the experts' maps read is as small or as large as given; what comes out has the size of the state."""
    router = Linear(Param("R", (3, 2)), Param("r", (3,)))
    linear = Mixture(
        router, Routing(2, "sigmoid"), ExpertLinear(Param("U", (3, 2, 2))), ExpertLinear(Param("V", (3, 2, 2)))
    )
    rng = np.random.default_rng(0)
    params = {
        "R": rng.normal(size=(3, 2)) * 0.1 / token, "r": np.array([-3.0, 1.0, 3.0]),
        "U": rng.normal(size=(3, 2, 2)) * hidden / token, "V": rng.normal(size=(3, 2, 2)) / hidden,
    }  # fmt: skip
    params = {n: p.astype(dtype) for n, p in params.items()}
    v, v_target = (np.array(x, dtype=dtype) * np.dtype(dtype).type(token) for x in ([1, 2], [2, -1]))
    block = residual(linear >> Times(token))
    patched = ct.prove(block, via).construct(params, v, v_target).applied_to(params)
    assert error(block(patched, v), block(params, v_target)) < 20 * np.finfo(dtype).eps
    if via == "input-output":
        here, there = ct.Trace(block, patched, v), ct.Trace(block, params, v_target)
        assert error(here.output((1, 0, 1)), there.output((1, 0, 1))) < 20 * np.finfo(dtype).eps


def test_another_choice_than_the_targets_is_refused():
    """What a real run tells, or what a router that misses its logits would do."""
    block = residual(PLAIN)
    params, v, v_target = drawn(block, tokens=())
    run = ct.prove(block).patched_run(params, v, v_target)
    bound = dict(run.target.bound((1,)))
    run.bind((1,), bound)  # the same choice
    other = bound | {"(chosen experts)": (bound["(chosen experts)"] + 1) % E}
    with pytest.raises(ct.SideConditionFailed, match="the patched router chooses the experts of the target run"):
        run.bind((1,), other)


def test_a_router_that_misses_its_logits_is_noticed(monkeypatch):
    from controllability.deltas import LowRank

    plain = Linear._rank_one

    def reversed_(self, params, x, gap):
        delta = plain(self, params, x, gap)
        return LowRank(-9 * delta.left, delta.right, delta.transposed)

    block = residual(Mixture(Linear(Param("R", ("E", "d"))), TOP, PLAIN.inner, PLAIN.last))
    params, v, v_target = drawn(block)
    ct.prove(block).construct(params, v, v_target)
    monkeypatch.setattr(Linear, "_rank_one", reversed_)
    failure = refused(block, params, v, v_target, "input-output")
    assert failure.statement == "the patched router chooses the experts of the target run"
    assert isinstance(failure.position, int)


# ------------------------------------------------------------------- beside, before and after: whole branches
SHARED = gated(Linear(Param("G", ("h", "d"))), Linear(Param("W", ("h", "d"))), SILU) >> Linear(Param("D", ("d", "h")))
NARROW = Linear(Param("g", ("one", "d"))) >> Activation("sigmoid")
INTO_LATENT = Mixture(ROUTER, TOP, experts("U", "h", "d") >> SILU, experts("V", "l", "h"))
BRANCHES = {
    "shared expert after": PLAIN + SHARED,
    "shared expert first": SHARED + PLAIN,
    "gated shared expert": PLAIN + Product((NARROW, SHARED)),
    "norm after the sum": (PLAIN + SHARED) >> rms_norm("post"),
    "norm after the mixture": PLAIN >> rms_norm("post"),
    "factor after the mixture": (PLAIN >> Times(2.5)) + SHARED,
    "one bias for all": PLAIN >> Bias(Param("c", ("d",))),
    "out of a latent space": INTO_LATENT >> Linear(Param("L", ("d", "l"))),
    "norms on both terms": ((PLAIN >> rms_norm("post1")) + (SHARED >> rms_norm("post2"))) >> rms_norm("post"),
    "two mixtures": PLAIN + Mixture(
        Linear(Param("R2", ("E", "d"))), Routing(3), experts("U2", "h", "d") >> SILU, experts("V2", "d", "h")
    ),
    "a mixture inside": Mixture(
        Linear(Param("R2", ("E", "d"))), Routing(3), PLAIN >> experts("U2", "h", "d") >> SILU, experts("V2", "d", "h")
    ),
    "a mixture as router": Mixture(
        Mixture(ROUTER, TOP, experts("U", "h", "d") >> SILU, ExpertLinear(Param("V", ("E", "E", "h")))), Routing(3),
        experts("U2", "h", "d") >> SILU, experts("V2", "d", "h"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", BRANCHES)
def test_mixtures_with_something_around_them(name, via):
    block = residual(rms_norm("pre") >> BRANCHES[name])
    for seed in range(3):
        params, v, v_target = drawn(block, seed)
        assert error(ct.Trace(block, params, v).output(()), block(params, v)) < 1e-15
        proof = ct.prove(block, via)
        patch = proof.construct(params, v, v_target)
        assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-11
        assert error(block(params, v), block(params, v_target)) > 1e-2
        merged = proof.construct(params, v[0], v_target[0]).merged_into(params)
        assert error(block(merged, v[0]), block(params, v_target[0])) < 1e-11


def test_a_shared_expert_beside_has_the_activations_of_the_target_run():
    block = residual(rms_norm("pre") >> (PLAIN + SHARED))
    params, v, v_target = drawn(block)
    proof = ct.prove(block)
    assert "T-sum" in proof.rules
    patched = proof.construct(params, v, v_target).applied_to(params)
    here, there = ct.Trace(block, patched, v), ct.Trace(block, params, v_target)
    for inside in ((1, 2, 0, 0), (1, 2, 0, 1), (1, 2, 1, 0)):  # logits, experts' and shared hidden activations
        assert error(here.output(inside), there.output(inside)) < 1e-13


def test_what_the_source_run_chose_is_not_taken_for_what_the_patched_run_computes():
    """Values that were observed in the source run are stale where the steered router chooses other experts."""
    block = residual(PLAIN)
    params, v, v_target = drawn(block)
    plain, target = ct.Trace(block, params, v), ct.Trace(block, params, v_target)
    observed = {path: plain.output(path) for path in ((1, 0), (1, 1, 0), (1, 1), (1, 2))}
    source = ct.Trace(block, params, v, observed)
    assert (plain.bound((1,))["(chosen experts)"] != target.bound((1,))["(chosen experts)"]).any()
    patch = ct.prove(block).construct(params, source, target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-13


# ------------------------------------------------------------------------------------------- refusals


class Ones(Component):
    """Does not see its input."""

    constant = True

    def __call__(self, params, x):
        return x * 0 + 1

    def describe(self):
        return "ones"


def test_a_constant_beside_a_mixture_needs_nothing():
    block = residual(rms_norm("pre") >> (PLAIN + Ones()))
    params, v, v_target = drawn(block)
    proof = ct.prove(block)
    assert "I-constant" in proof.rules
    assert error(block(proof.construct(params, v, v_target).applied_to(params), v), block(params, v_target)) < 1e-12


def between(k: int) -> Component:
    """One map for all chosen experts, each of which reads its share of the token."""
    inner = Share() >> Linear(Param("M", ("h", "d"))) >> SILU
    return residual(Mixture(ROUTER, Routing(k), inner, experts("V", "d", "h"), weighted=False))


def test_one_map_for_all_chosen_experts_is_not_steered_for_each_of_them():
    with pytest.raises(ct.NotControllable, match="one row for each chosen expert") as refusal:
        ct.prove(between(2))
    assert refusal.value.culprit == "linear M"
    params, v, v_target = drawn(between(1), tokens=())
    alone = ct.prove(between(1))  # one expert, one row
    assert "M" in {str(p) for p in alone.root.moved}
    merged = alone.construct(params, v, v_target).merged_into(params)
    assert error(between(1)(merged, v), between(1)(params, v_target)) < 1e-12


TIED = {
    "last and first maps": Mixture(ROUTER, TOP, experts("V", "d", "d") >> SILU, experts("V", "d", "d")),
    "router and experts' scale": Mixture(
        Identity() >> Bias(Param("p", ("d",))), Routing(1, "identity", per_expert=Param("p", ("d",))),
        ExpertLinear(Param("U", ("d", "h", "d"))) >> SILU, ExpertLinear(Param("V", ("d", "d", "h"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_what_the_mixture_itself_reads_is_not_moved(name):
    with pytest.raises(ct.NotControllable, match="used twice"):
        ct.prove(residual(TIED[name]))


def test_a_skip_whose_routing_reads_a_moved_parameter_is_refused():
    """A skip may read its patch, but only in a map that computes with one patch for each token."""
    gain = Param("gain", ("d",))
    skip = Mixture(
        Linear(Param("R", ("d", "d"))), Routing(1, per_expert=gain),
        ExpertLinear(Param("U", ("d", "h", "d"))) >> SILU, ExpertLinear(Param("V", ("d", "d", "h"))),
    )  # fmt: skip
    tied = Sum((skip, Bias(gain) >> SILU >> Linear(Param("W", ("d", "d")))))
    with pytest.raises(ct.NotControllable, match="gain is used twice"):
        ct.prove(tied, frozen=["U", "V"])


def test_what_an_activation_inside_a_gated_pair_reads_counts():
    names = [Param(n, ("one",)) for n in ("alpha_p", "alpha_n", "beta", "eps")]
    block = residual(Linear(Param("U", ("2h", "d"))) >> Glu(XIELU(*names)) >> Linear(Param("W", ("d", "h"))))
    assert {p.name for p in block.parameters()} >= {p.name for p in names}
    params, v, v_target = drawn(block)
    patch = ct.prove(block).construct(params, v, v_target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-13
    first, last = Linear(Param("g", ("one", "d")), names[0]), Linear(Param("W", ("d", "one")))
    with pytest.raises(ct.NotControllable, match="alpha_p is used twice"):
        ct.prove(residual(first >> Glu(XIELU(*names)) >> last), frozen=["g"])


@pytest.mark.parametrize("put_together", [Product, Sum])
def test_one_number_for_all_features_cannot_give_each_its_own(put_together):
    """They broadcast, so that a patch of the wrong shape would seem to work."""
    block = residual(put_together((Linear(Param("g", ("one", "d"))), SILU)))
    params, v, v_target = drawn(block)
    failure = refused(block, params, v, v_target, "output")
    assert failure.statement == "there is a number for every feature that must change"


def test_experts_that_do_not_end_in_their_own_map_are_refused_on_the_output_side():
    block = residual(Mixture(ROUTER, TOP, experts("U", "h", "d"), experts("V", "d", "h") >> SILU))
    with pytest.raises(ct.NotControllable, match="the experts do not end in their own linear map"):
        ct.prove(block, "output")


# ------------------------------------------------------------------------------------ the levels of proof


def built(name: str, *has: str) -> Component:
    architecture = architectures.find(name)
    assert architecture.build is not None
    block = architecture.build(architectures.View("", {}, architecture.defaults | ({"has": has} if has else {})))
    assert block is not None
    return block


@dataclass
class Checked:
    """A block, a level, and what its method has to own up to."""

    block: Component
    level: str
    says: str = ""
    status: str = "passed"


CHECKED = {
    "soft-max router": Checked(built("mixtral"), "symbolic", "any routing"),
    "clamped halves, biases": Checked(built("gpt_oss"), "symbolic", "any routing"),
    "sigmoid router": Checked(built("deepseek_v3"), "exact", "the logits themselves as scores"),
    "norms around norms": Checked(built("gemma4", "experts"), "exact", "the logits themselves as scores"),
    "gate of one number": Checked(built("qwen2_moe"), "exact", "the first 2 experts are the chosen ones"),
    "gate of one number, numbers": Checked(built("qwen2_moe"), "numeric"),
    "share before": Checked(built("llama4"), "symbolic", "any routing"),
    "parallel": Checked(built("gptj"), "symbolic"),
    "parallel, exact": Checked(built("falcon"), "exact"),
    "parallel mixture": Checked(built("cohere2_moe"), "numeric"),
    "norm after the sum": Checked(built("bert"), "symbolic"),
    "learned activation": Checked(built("apertus"), "symbolic"),
    "fused matrix": Checked(built("phi3"), "exact"),
    "compares sizes": Checked(built("phimoe"), "symbolic", "any routing"),
    "compares sizes, exact": Checked(built("phimoe"), "exact", "symbols have no order", "skipped"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_the_levels_of_proof_hold(name):
    case = CHECKED[name]
    *rules, whole = ct.prove(case.block).check(case.level)
    assert all(c["status"] == "passed" for c in rules)
    assert (whole["rule"], whole["status"]) == ("whole block", case.status)
    assert case.says in whole["method"]
    if case.level == "symbolic":
        assert {c["rule"] for c in rules} == set(ct.prove(case.block).rules)


@pytest.mark.parametrize("level", ["symbolic", "exact"])
def test_a_wrong_mixture_rule_fails_its_checks(monkeypatch, level):
    from controllability.rules import mixture

    plain = mixture._shares
    monkeypatch.setattr(mixture, "_shares", lambda *given: plain(*given) + 1)
    linear = Mixture(Linear(Param("R", ("E", "d"))), Routing(2), experts("U", "h", "d"), experts("V", "d", "h"))
    checks = ct.prove(residual(linear)).check(level)
    failed = {c["rule"] for c in checks if c["status"] == "failed"}
    assert failed == ({"T-mixture", "whole block"} if level == "symbolic" else {"whole block"})


def test_exact_is_said_of_instances_that_fulfil_the_side_conditions():
    """SymPy cannot compare sizes: outside the ball its roots would be imaginary, and the residual 0 all the same."""
    ball = ct.prove(architectures.block("olmo2"), "output", "ball")
    assert refused_at(ball, 0).startswith("mean((G/m)²) < 1")
    assert ball.check("exact")[-1]["status"] == "passed"  # on a later instance
    capped = ct.prove(residual(Linear(Param("W", ("d", "d"))) >> SoftCap(1e-3)), "output")
    refused_at(capped, 0)
    (whole,) = capped.check("exact")
    assert whole["status"] == "skipped"
    assert "the soft-cap can reach the target" in whole["method"]


def refused_at(proof, seed) -> str:
    with pytest.raises(ct.SideConditionFailed) as failed:
        proof.construct(*ct.sample(proof.block, seed=seed, d=2, h=3))
    return failed.value.statement


def test_a_frozen_parameter_of_a_replaced_activation_does_not_stop_a_check():
    names = sorted(p.name for p in built("apertus").parameters() if "act_fn" in p.name)
    assert ct.prove(built("apertus"), frozen=names).check("exact")[-1]["status"] == "passed"
