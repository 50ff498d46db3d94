"""The levels of proof: what each runs, that it can fail, and the numbers that are asked of it."""

from __future__ import annotations

import mpmath
import pytest
from catalogued import patchable_families
from mutations import CENTRED, COLLAPSED, CONVOLVED, CORRECTED, EXPERTS, LLAMA, MIXED, POST, SIZED

import architectures
import controllability as ct
from controllability.checks import symbolic_rules as rules
from controllability.checks.numeric_block import PRECISIONS, falls, residuals_of
from controllability.components import (
    Activation,
    Bias,
    Gate,
    Linear,
    Product,
    SoftCap,
    Sum,
    Times,
    residual,
    rms_norm,
    updates,
)
from controllability.interfaces import Component, Param, Place
from controllability.rules import RULES, Step
from controllability.rules.schema import Unseeing

up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
square, silu = Linear(Param("W", ("d", "d"))), Activation("silu")
both = residual(rms_norm("pre") >> Sum((EXPERTS.terms[1], up >> silu >> down)))
# blocks that need the rule inside a branch (side "through"): experts before what is undone
ENDS = {"through cap": SoftCap(30.0), "through times": Times(0.5), "through norm": rms_norm("post")}
THROUGH = {name: residual(EXPERTS.terms[1] >> end) for name, end in ENDS.items()}


def blocks() -> dict[str, tuple[Component, dict]]:
    """Blocks whose proofs use every rule of the table on every side."""
    return {
        "llama": (LLAMA, {}),
        "1b": (LLAMA, {"via": "output"}),
        "bias": (residual(up >> silu >> Linear(Param("down", ("d", "h")), Param("b", ("d",)))), {"frozen": ["down"]}),
        "input bias": (residual(Linear(Param("up", ("h", "d")), Param("c", ("h",))) >> silu >> down), {"frozen": ["up"]}),
        "input scale": (residual(rms_norm("pre") >> silu >> down), {}),
        "scale": (POST, {"route": "scale"}),
        "normalised": (POST, {}),
        "centred": (CENTRED, {}),
        "experts": (EXPERTS, {}),
        "experts, 1b": (EXPERTS, {"via": "output"}),
        "inner experts": (residual(EXPERTS.terms[1] >> rms_norm("between") >> square), {}),
        "both": (both, {}),
        "two": (residual(Sum((up >> silu >> down, square))), {"via": "output"}),
        "factor": (residual(Product((Activation("sigmoid"), square))), {"via": "output"}),
        "capped": (residual(square >> SoftCap(30.0)), {"via": "output"}),
        "gate": (residual(square >> Gate(Param("g", (1,)), "tanh")), {"via": "output"}),
        "times": (residual(square >> Times(0.25)), {"via": "output"}),
        "no skip": (Product((Activation("sigmoid"), square)), {"via": "output"}),
        "bias alone": (residual(square >> Bias(Param("b", ("d",)))), {"via": "output", "frozen": ["W"]}),
        **{name: (block, {}) for name, block in THROUGH.items()},
        "collapsed": (COLLAPSED, {}),
        "collapsed, 1b": (COLLAPSED, {"via": "output"}),
        "normed streams": (MIXED, {}),
        "corrected": (CORRECTED, {}),
        "convolved": (CONVOLVED, {}),
        "input factor": (SIZED, {}),
    }  # fmt: skip


def test_every_rule_of_the_table_passes_its_own_check():
    used: dict[tuple[str, str], set[str]] = {}
    for name, (block, options) in blocks().items():
        for step in ct.prove(block, **options).root.walk():
            status, method = rules.rule_check(step)
            assert status == "passed", f"{name}: {step.rule.name}: {method}"
            assert "every size a symbol" in method
            used.setdefault((step.rule.name, step.rule.side), set()).add(name)
    (constant,) = (rule for rule in RULES if rule.name == "I-constant")  # no component of the package is one
    assert rules.rule_check(Step(constant, Place(Unseeing("c"))))[0] == "passed"
    assert set(used) == {(rule.name, rule.side) for rule in RULES if not rule.jointly} - {("I-constant", "input")}


def test_what_was_reduced_before_is_forgotten_when_the_code_changes(monkeypatch):
    """Without being told: a helper of the rules is replaced, and put back."""
    from controllability.rules import theorems

    assert ct.prove(LLAMA).check("symbolic")[0]["status"] == "passed"
    with monkeypatch.context() as changed:
        changed.setattr(theorems, "rest_of_sum", lambda step, moved, run, wanted: wanted)
        first, *_, whole = ct.prove(LLAMA).check("symbolic")
        assert (first["rule"], first["status"], whole["status"]) == ("theorem-1", "failed", "failed")
    assert {row["status"] for row in ct.prove(LLAMA).check("symbolic")} == {"passed"}


def test_a_check_says_what_was_reduced_and_how():
    rows = {row["rule"]: row["method"] for row in ct.prove(POST).check("symbolic")}
    assert rows["theorem-1"] == (
        "f(z; θ') − f(z'; θ) reduced to 0; every size a symbol, s1, f, g undefined functions; "
        "each premise is asked for what it can do"
    )
    assert "on route balanced, route uniform, route secular, route ball, route scale" in rows["O-normalised"]
    assert rows["O-linear"] == "g(y; φ') − g(y; φ) − δ reduced to 0; every size a symbol"
    assert rows["whole block"].startswith(
        "residual reduced to 0 in index notation: every size, entry, ε and activation"
    )


class Foreign(Linear):
    """A component whose formula needs real numbers: no symbols run through it."""

    def __call__(self, params, x):
        import numpy as np

        return np.asarray(super().__call__(params, x), dtype=float)


def test_a_component_that_takes_no_symbols_is_skipped_not_passed():
    proof = ct.prove(residual(up >> silu >> Foreign(Param("down", ("d", "h")))))
    rows = {row["rule"]: row["status"] for row in proof.check("symbolic")}
    assert rows["O-linear"] == "skipped"
    assert rows["I-linear"] == "passed"


@pytest.mark.parametrize(("name", "route"), [("gemma3", "auto"), ("gemma3", "secular"), ("mixtral", "auto")])
@pytest.mark.parametrize("via", ["input-output", "output"])
def test_fifty_digits_leave_less_than_1e_45(name, route, via):
    """Whole blocks with d = 8, h = 16 on 50 digits; the unpatched block beside it."""
    with mpmath.workdps(50):
        block = architectures.block(name)
        params, v, v_target = ct.sample(block, "mpmath", tokens=(3,), d=8, h=16)
        patch = ct.prove(block, via, route).construct(params, v, v_target)
        result = ct.verify(block, params, patch, v, v_target)
    print(f"{name}, via {via}, route {route}: residual {result.residual:.1e}, unpatched {result.unpatched:.1e}")
    assert result.residual <= 1e-45
    assert result.unpatched > 1e-2


def test_a_residual_that_does_not_fall_fails():
    good = {"bfloat16": 4e-3, "float32": 2e-7, "float64": 3e-16, "50 digits": 1e-51}
    assert falls(good)
    assert falls(good | {"float64": 0.0, "50 digits": 0.0})
    for name in ("float32", "float64", "50 digits"):
        assert not falls(good | {name: 1e-3})
        assert not falls(good | {name: float("nan")})


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "gptj"])
def test_the_residual_falls_from_bfloat16_to_fifty_digits(name):
    proof = ct.prove(architectures.block(name))
    residuals, plain, unpatched = residuals_of(proof, 0)
    assert list(residuals) == list(PRECISIONS)
    assert falls(residuals)
    assert residuals["bfloat16"] > 1e-5  # otherwise it was not half precision
    assert unpatched > 1e-2
    assert all(residuals[p] <= 100 * plain[p] + 1e-47 for p in PRECISIONS)  # no worse than the plain run's rounding
    (row,) = proof.check("numeric")
    assert row["status"] == "passed"
    assert "it falls by" in row["method"]


def test_a_wrong_patch_does_not_fall(monkeypatch):
    from controllability.deltas import LowRank

    plain = updates.rank_one_change

    def nearly(*given):
        delta = plain(*given)
        return LowRank(delta.left * 1.0625, delta.right, delta.transposed)

    monkeypatch.setattr(updates, "rank_one_change", nearly)
    for level in ("numeric", "exact"):
        assert ct.prove(LLAMA).check(level)[-1]["status"] == "failed"


def test_a_shared_parameter_is_caught_by_the_whole_block(monkeypatch):
    """If the rules overlooked a parameter that is used twice, each rule alone would pass: the whole would not."""
    from controllability.rules import base, output_side, theorems

    tied = Linear(Param("shared", ("d", "d")))
    block = residual(tied >> silu >> tied)
    with pytest.raises(ct.NotControllable):
        ct.prove(block)
    for module in (base, theorems, output_side):
        if hasattr(module, "disturbs"):
            monkeypatch.setattr(module, "disturbs", lambda *_: ())
    proof = ct.prove(block)
    params, v, v_target = ct.sample(block)
    patched = proof.construct(params, v, v_target).applied_to(params)
    assert abs(block(patched, v) - block(params, v_target)).max() > 1e-3
    assert proof.check("symbolic")[-1]["status"] == "failed"


def test_whole_blocks_of_every_shape_reduce_to_0():
    """One family of each shape; the others differ in the names of their parameters only."""
    for name in patchable_families():
        rows = ct.prove(architectures.block(name)).check("symbolic")
        assert {row["status"] for row in rows} == {"passed"}, (name, rows)


def test_exact_leaves_nothing_on_rationals():
    for name in ("llama", "olmo2", "mixtral", "bert"):
        (row,) = ct.prove(architectures.block(name)).check("exact")
        assert row["status"] == "passed"
        assert "exactly 0" in row["method"]
