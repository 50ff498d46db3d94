"""Patches of mixtures: values against loops, both theorems on every kind of numbers, least norm, levels of proof."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import error
from mixtures import (
    CORRECTION,
    MIXTURES,
    PER_EXPERT,
    PLAIN,
    ROUTER,
    SILU,
    TOKENS,
    TOP,
    D,
    E,
    H,
    K,
    dense,
    drawn,
    experts,
)

import architectures
import controllability as ct
from controllability.components import (
    Activation,
    Bias,
    ExpertLinear,
    Linear,
    Mixture,
    Product,
    Routing,
    SoftCap,
    Times,
    gated,
    residual,
    rms_norm,
)
from controllability.interfaces import Component, Param


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
    "compares sizes, exact": Checked(built("phimoe"), "exact", "the logits themselves as scores"),
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

    plain = mixture.shares_of
    monkeypatch.setattr(mixture, "shares_of", lambda *given: plain(*given) + 1)
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
