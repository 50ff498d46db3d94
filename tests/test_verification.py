"""A checker for other people's patches: right ones pass in every form, bad input is one error, reports read well."""

from __future__ import annotations

import re
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from other_patches import MATRICES, VIAS, Made, only, square

import controllability as ct
from controllability.components import Activation, Linear, residual
from controllability.deltas import LowRank
from controllability.execution.trace import Trace
from controllability.interfaces import Param

# ------------------------------------------------------------------------------------------- right patches


ROUTED = [  # a route is chosen where a norm stands behind the last map: in gemma3
    pytest.param(name, route, marks=() if "auto" in route or name == "gemma3" else pytest.mark.slow)
    for name in MATRICES
    for route in ("auto", "scale", "secular", "uniform")
]


@pytest.mark.parametrize("via", VIAS)
@pytest.mark.parametrize(("name", "route"), ROUTED)
def test_right_patches_have_no_problems_in_every_form(name, via, route):
    for seed, tokens in ((0, ()), (1, (3,)), (2, (2, 2))):
        made = Made(name, via, seed, tokens, route)
        for patch in (made.patch, dict(made.patch), made.right):
            result = made.check(patch)
            assert result.ok
            assert result.problems == ()
            assert result.residual <= result.rounding < 1e-9 < 1e-2 < result.unpatched


@pytest.mark.parametrize("via", VIAS)
@pytest.mark.parametrize("name", MATRICES)
def test_the_rounding_of_float32_is_no_problem(name, via):
    for seed in range(1, 6):
        made = Made(name, via, seed, (3,), kind="torch", d=16, h=24)
        for patch in (made.patch, made.right):
            result = made.check(patch)
            assert result.ok, str(result)
            assert result.residual <= result.rounding < 1e-2


def test_half_precision_parameters_and_states():
    made = Made("llama", tokens=(4,), kind="torch", d=16, h=24)
    params = {name: p.bfloat16() for name, p in made.params.items()}
    v, v_target = made.v.bfloat16(), made.v_target.bfloat16()
    patch = ct.prove(made.block).construct(params, v, v_target)
    good = ct.verify(made.block, params, patch, v, v_target)
    assert good.ok
    assert good.rounding is not None
    assert good.rounding < 0.1
    wrong = {n: made.stored(n, d) for n, d in patch.items()}
    name = "mlp.gate_proj.weight"
    z = Trace(made.block, params, v).input(made.path(name)).float()
    z_target = Trace(made.block, params, v_target).input(made.path(name)).float()
    wrong[name] = made.matrix(name, (z_target - z) @ params[name].float().T, z_target / square(z_target))
    found = ct.verify(made.block, params, wrong, v, v_target)
    assert found.problems[0].kind == "target-vector"
    assert found.problems[0].parameter == name


def test_fractions_and_many_digits():
    cubic = residual(
        Linear(Param("up", ("h", "d")))
        >> Activation("cubic", coefficients=(0, 1, 1, 2))
        >> Linear(Param("down", ("d", "h")))
    )
    for kind, context in (("rational", mpmath.workdps(15)), ("mpmath", mpmath.workdps(50))):
        with context:
            made = Made(cubic, kind=kind, d=2, h=3)
            good = made.check(made.right)
            assert good.ok
            assert good.residual == 0 or kind == "mpmath"
            z, g = made.input("up", "target"), made.change("up")
            wrong = made.verify(up=made.matrix("up", g, z / square(z)))
            only(wrong, "target-vector", "I-linear", "up")
            third = made.right["down"] * (Fraction(1, 3) if kind == "rational" else mpmath.mpf(1) / 3)
            assert "reaches only 0.3333 of" in only(made.verify(down=third), "factor", "O-linear", "down").how


def test_a_tiny_mistake_in_fractions_is_a_mistake():
    block = residual(Linear(Param("W", ("d", "d"))))
    made = Made(block, "output", kind="rational", d=2)
    assert made.check(made.right).exact
    result = made.verify(W=made.right["W"] * (1 + Fraction(1, 10**30)))
    assert only(result, "factor", "O-linear", "W").relative == pytest.approx(1e-30)


def test_symbols_say_exact_or_not():
    block = residual(Linear(Param("W", ("d", "d"))))
    made = Made(block, "output", kind="sympy", d=2)
    assert made.check(made.patch).ok
    gap = made.delta() + made.change("W")
    dense = np.multiply.outer(gap, made.v) / (made.v @ made.v)
    assert str(made.check({"W": dense})) == "right patch: the residual reduces to 0 in symbols"
    twice = made.check({"W": 2 * dense})
    assert not twice.ok
    assert (twice.residual, twice.problems) == (None, ())
    assert str(twice) == "wrong patch: the residual does not reduce to 0 in symbols"


def test_made_in_float32():
    made = Made("llama", tokens=(3,))
    rounded = {n: x.astype(np.float32) for n, x in made.right.items()}
    assert made.check(rounded).ok, "float32 numbers are held to the precision of float32"
    again = {n: x.astype(np.float64) for n, x in rounded.items()}
    result = made.check(again)
    assert {p.kind for p in result.problems} == {"precision"}


def test_low_rank_deltas_and_other_libraries():
    made = Made("llama", "output", kind="torch")
    w = "mlp.down_proj.weight"
    delta = made.patch[w]
    assert made.check({w: delta}).ok
    assert made.check({w: made.right[w].numpy()}).ok
    assert made.check({w: LowRank(2 * delta.left, delta.right / 2)}).ok
    only(made.check({w: LowRank(-delta.left, delta.right)}), "sign", "O-linear", w)
    only(made.check({w: LowRank(delta.right, delta.left)}), "orientation", "O-linear", w)


def test_a_patch_of_rank_2_that_is_right_is_right():
    made, w = Made("llama", "output"), "mlp.down_proj.weight"
    y = made.input(w)
    away = np.random.default_rng(0).normal(size=9)
    away -= y * (away @ y) / (y @ y)
    assert made.verify(**{w: made.right[w] + np.outer(np.ones(6), away)}).ok


# ------------------------------------------------------------------------------------------------- bad input

BAD = {
    "unknown name": ({"mlp.up.weight": np.ones((9, 6))}, r"mlp\.up\.weight is no parameter of the block; it has mlp\.down_proj\.weight, "),
    "wrong shape": ({"mlp.up_proj.weight": np.ones((4, 6))}, r"the change of mlp\.up_proj\.weight has shape \(4, 6\): expected \(9, 6\), or \(3, 9, 6\) with a change for every token"),
    "other tokens": ({"mlp.up_proj.weight": np.ones((2, 9, 6))}, r"has shape \(2, 9, 6\): expected"),
    "NaN": ({"mlp.up_proj.weight": np.full((9, 6), np.nan)}, r"the change of mlp\.up_proj\.weight holds NaN or infinity"),
    "a slice": ({"mlp.up_proj.weight[0:4]": np.ones((4, 6))}, r"mlp\.up_proj\.weight\[0:4\] is a slice: the block reads mlp\.up_proj\.weight as a whole"),
    "a list": ({"mlp.up_proj.weight": [[1.0]]}, r"mlp\.up_proj\.weight gets a list: give floating point numbers or objects"),
    "integers": ({"mlp.up_proj.weight": np.ones((9, 6), dtype=int)}, r"gets an array of int64"),
    "factors": ({"mlp.up_proj.weight": LowRank(np.ones((1, 4)), np.ones((1, 6)))}, r"the change of mlp\.up_proj\.weight maps 6 to 4 numbers; the block maps 6 to 9 there"),
    "factors of a vector": ({"post_attention_layernorm.weight": LowRank(np.ones((1, 6)), np.ones((1, 6)))}, r"has shape \(6,\): a LowRank cannot be added to it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    patch, message = BAD[name]
    made = Made("llama", tokens=(3,))
    with pytest.raises(ct.BadInput, match=message):
        made.check(patch)


def test_all_bad_input_at_once():
    made = Made("llama")
    with pytest.raises(ct.BadInput) as caught:
        made.check({"a": np.ones(3), "mlp.up_proj.weight": np.ones(2), "mlp.gate_proj.weight": np.full((9, 6), np.inf)})
    assert str(caught.value) == (
        "the patch does not fit the block: a is no parameter of the block; it has mlp.down_proj.weight, "
        "mlp.gate_proj.weight, mlp.up_proj.weight, post_attention_layernorm.weight; the change of "
        "mlp.up_proj.weight has shape (2,): expected (9, 6); the change of mlp.gate_proj.weight holds NaN or infinity"
    )
    with pytest.raises(ct.BadInput, match="a patch maps parameter names to arrays or deltas, got list"):
        made.check([np.ones(3)])


def test_slices_are_named_as_the_block_reads_them():
    first, second = Param("F", ("h", "d"), (slice(0, 4),)), Param("F", ("h", "d"), (slice(4, 8),))
    silu = Activation("silu")
    block = residual((Linear(first) >> silu) * Linear(second) >> Linear(Param("W", ("d", "h"))))
    rng = np.random.default_rng(0)
    params = {"F": rng.normal(size=(8, 3)), "W": rng.normal(size=(3, 4))}
    v, v_target = rng.normal(size=(2, 3))
    patch = ct.prove(block).construct(params, v, v_target)
    right = {name: delta.dense() for name, delta in patch.items()}
    assert set(right) == {"F[0:4]", "F[4:8]", "W"}
    assert ct.verify(block, params, right, v, v_target).ok
    wrong = ct.verify(block, params, right | {"F[4:8]": -right["F[4:8]"]}, v, v_target)
    assert [(p.kind, p.parameter) for p in wrong.problems] == [("sign", "F[4:8]")]
    with pytest.raises(ct.BadInput, match=r"F is read in slices: give a change for each of F\[0:4\], F\[4:8\]"):
        ct.verify(block, params, {"F": np.zeros((8, 3))}, v, v_target)


# --------------------------------------------------------------------------------------------------- reports


def report(result):
    """The text, the level of rounding left out."""
    return re.sub(r"(rounding explains) \S+", r"\1 …", str(result))


def test_the_report_of_a_right_patch():
    block = residual(Linear(Param("W", ("d", "d"))))
    made = Made(block, "output", kind="rational", d=2)
    assert str(made.check(made.right)) == "right patch: residual 0; unpatched 0.83; rounding explains 0"


def test_the_report_of_a_wrong_vector():
    made, w = Made("llama", tokens=(3,)), "mlp.gate_proj.weight"
    z = made.input(w, "target")
    assert report(made.verify(**{w: made.matrix(w, made.change(w), z / square(z))})) == (
        """\
wrong patch: residual 0.99; unpatched 1.1; rounding explains …
compared with theorem-1, moving mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight
1. off by 1.9 at position 2: I-linear at linear mlp.gate_proj.weight, which reads the output of
   scale post_attention_layernorm.weight
   should hold: ΔW z = W(z' − z), z the input in the patched run, z' in the target run
   looks like: the right factor is z', this input in the target run; the rule takes z, the output of
               scale post_attention_layernorm.weight in the patched run
   do: ΔW = W(z' − z) zᵀ/‖z‖², z being the output of scale post_attention_layernorm.weight in the
       patched run
only follow from this: O-linear at mlp.down_proj.weight"""
    )


def test_the_report_of_two_mistakes():
    made, fc, proj = Made("gpt2"), "mlp.c_fc.weight", "mlp.c_proj.weight"
    assert report(made.verify(**{fc: made.right[fc].T, proj: -made.right[proj]})) == (
        """\
wrong patch: residual 0.38; unpatched 0.39; rounding explains …
compared with theorem-1, moving mlp.c_fc.weight, mlp.c_proj.weight
1. off by 1: I-linear at linear mlp.c_fc.weight, which reads the output of bias ln_2.bias
   should hold: ΔW z = W(z' − z), z the input in the patched run, z' in the target run
   looks like: wrong orientation: the change has the shape of mlp.c_fc.weight transposed; turned
               over it does what the rule demands
   do: transpose it
2. off by 2: O-linear at linear mlp.c_proj.weight, which reads the output of activation gelu_tanh
   should hold: ΔW y = δ, y the input in the patched run, δ what the output still lacks
   looks like: the sign is flipped: it does the opposite of what the rule demands
   do: negate it"""
    )


def test_the_report_of_a_parameter_too_many():
    made, name = Made("llama"), "post_attention_layernorm.weight"
    assert report(made.verify(**{name: made.params[name] / 4})) == (
        """\
wrong patch: residual 0.57; unpatched 0.81; rounding explains …
compared with theorem-1, moving mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight
1. off by 0.25: stays fixed at scale post_attention_layernorm.weight, which reads the output of
   normalise (rms) post_attention_layernorm
   should hold: post_attention_layernorm.weight stays as it is
   looks like: the patch moves post_attention_layernorm.weight, which this derivation leaves as it
               is: what the others were made for changes
   do: leave post_attention_layernorm.weight out
only follow from this: I-linear at mlp.gate_proj.weight; I-linear at mlp.up_proj.weight; O-linear at
  mlp.down_proj.weight"""
    )
