"""What the checks of a proof must not overlook: other functions, untrue components, stored tensors, empty equations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sympy

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.checks.rebuilt_blocks import rebuilt
from controllability.checks.symbolic_block import any_routings, generic
from controllability.components import (
    Activation,
    ExpertLinear,
    Linear,
    Mixture,
    Routing,
    Scale,
    Sum,
    residual,
    rms_norm,
    updates,
)
from controllability.components.glu import Swish
from controllability.deltas import Delta, LowRank, Shift
from controllability.interfaces import Param, Update
from controllability.solvers import norm_scale as routes
from controllability.symbolic.indexed import IndexedArray

N, M, H, E = (sympy.Symbol(s, integer=True, positive=True) for s in "nmhe")
INDEXED = ARITHMETICS["indexed"]
square, silu = Linear(Param("W", ("d", "d"))), Activation("silu")


def test_different_functions_get_different_names():
    """Norms with other ε, activations with other slopes, routings with another number of experts."""

    def experts(k: int, name: str) -> Mixture:
        last = ExpertLinear(Param(f"V{name}", ("E", "d", "d")))
        return Mixture(
            Linear(Param("R", ("E", "d"))), Routing(k), ExpertLinear(Param(f"U{name}", ("E", "d", "d"))), last
        )

    inside = [rms_norm("a", eps=eps) for eps in (1e-6, 1e-5, 1e-6)] + [Swish(1.0), Swish(2.0)]
    block = residual(Sum((*inside, experts(1, "a"), experts(2, "b"))) >> square)
    terms = rebuilt(block, generic(ct.prove(block, "output")), any_routings()).children()[1].children()[0].children()
    first, second, third = (norm.children()[0] for norm in terms[:3])
    assert first == third != second
    assert terms[3] != terms[4]
    (one, _), (two, _) = (t.routing({}, IndexedArray.named("l", (E,))) for t in terms[5:] if isinstance(t, Mixture))
    assert one.entry.func != two.entry.func


def halved(params: Any, x: Any, delta: Delta) -> Any:
    assert isinstance(delta, Shift)
    return delta.value / 2


class Lying(Linear):
    """Twice the change that is asked for, and an effect that denies it; no index notation runs through it."""

    def __call__(self, params, x):
        if isinstance(x, IndexedArray):
            raise TypeError("explicit sizes only")
        return super().__call__(params, x)

    def updates(self):
        (way,) = super().updates()

        def solve(params, x, gap):
            delta = way.solve(params, x, gap)
            assert isinstance(delta, LowRank)
            return LowRank(delta.left * 2, delta.right, delta.transposed)

        return (replace(way, solve=solve, effect=lambda p, x, d: way.effect(p, x, d) / 2),)


@dataclass(frozen=True)
class TwoWays(Scale):
    """A right way to steer, and a wrong one of the same name that moves another parameter."""

    extra: Param = field(default_factory=lambda: Param("extra", ("d",)))

    def own_parameters(self):
        return (self.weight, self.extra)

    def __call__(self, params, x):
        return super().__call__(params, x) + self.extra.value(params)

    def updates(self):
        (way,) = super().updates()
        return way, Update(way.kind, self.extra, (), lambda p, x, gap: Shift(gap * 2), halved)


class Doubled(Sum):
    """A sum of a class of its own: twice what its terms add up to."""

    def __call__(self, params, x):
        return super().__call__(params, x) * 2

    def assemble(self, params, output):
        return super().assemble(params, output) * 2


UNTRUE = {
    "effect and solution differ": (residual(Lying(Param("W", ("d", "d")))), (), "O-linear"),
    "the second way is wrong": (residual(square >> TwoWays(Param("m", ("d",)))), ("W", "m"), "O-scale"),
    "a sum that is none": (Doubled((square, silu)), (), "whole block"),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_a_component_that_does_not_do_what_it_says_is_found(name):
    block, frozen, rule = UNTRUE[name]
    proof = ct.prove(block, "output", "scale", frozen)
    params, v, v_target = ct.sample(block)
    try:
        patched = proof.construct(params, v, v_target).applied_to(params)
        assert abs(block(patched, v) - block(params, v_target)).max() > 1e-3
    except ct.NotVerified:  # seen in the run itself
        assert rule == "whole block"
    rows = {row["rule"]: row["status"] for row in proof.check("symbolic")}
    assert rows[rule] == "failed", rows


def test_another_derivation_is_checked_as_a_proof_of_its_own(monkeypatch):
    """A bias is moved where the map's input is zero: the first derivation alone would not show that this is wrong."""

    proof = ct.prove(residual(Linear(Param("W", ("d", "d")), Param("b", ("d",)))), "output")
    (alternative,) = proof.alternatives
    other = replace(proof, root=alternative, alternatives=())
    assert {row["rule"]: row["status"] for row in other.check("symbolic")} == dict.fromkeys(
        ("theorem-1b", "O-bias", "whole block"), "passed"
    )
    monkeypatch.setattr(updates, "offset_change", lambda x, gap: Shift(-gap))
    assert {row["rule"]: row["status"] for row in other.check("symbolic")} == {
        "theorem-1b": "passed", "O-bias": "failed", "whole block": "failed",
    }  # fmt: skip


def test_exact_and_numeric_judge_what_is_stored(monkeypatch):
    """The factored change may be right and the dense one wrong: what is merged is the dense one."""
    from controllability.deltas import ExpertLowRank

    routing = Mixture(
        Linear(Param("R", ("E", "d"))), Routing(2), ExpertLinear(Param("U", ("E", "h", "d"))), ExpertLinear(Param("V", ("E", "d", "h")))
    )  # fmt: skip
    plain = ExpertLowRank.dense
    for block, options in ((residual(square), {}), (residual(routing), {})):
        for level in ("exact", "numeric"):
            assert ct.prove(block, "output", **options).check(level)[-1]["status"] == "passed"
    monkeypatch.setattr(ExpertLowRank, "dense", lambda self: -plain(self))
    for level in ("exact", "numeric"):
        assert ct.prove(residual(routing), "output").check(level)[-1]["status"] == "failed"
    dense = LowRank.dense
    monkeypatch.setattr(LowRank, "dense", lambda self: -dense(self))
    for level in ("exact", "numeric"):
        assert ct.prove(residual(square), "output").check(level)[-1]["status"] == "failed"


def test_a_wrong_equation_of_the_secular_route_is_no_proof(monkeypatch):
    def secular(xp, G, m, q):
        xp.root("mu", lambda mu: xp.mean((G / m) ** 2), q)
        return m + G * 0, G / m

    monkeypatch.setattr(routes, "secular", secular)
    proof = ct.prove(residual(square >> rms_norm("post")), route="secular", via="output")
    rows = {row["rule"]: row["status"] for row in proof.check("symbolic")}
    assert rows["O-normalised"] == "failed"
    assert rows["whole block"] != "passed"
