"""Proofs are executed: block(patched, v) = block(original, v'), on every arithmetic; refusals are pinned."""

from __future__ import annotations

import contextlib
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import error, gemma_by_hand

import architectures
import controllability as ct
from controllability.components import (
    Activation,
    Linear,
    Normalize,
    Product,
    Scale,
    SoftCap,
    Sum,
    Times,
    gated,
    layer_norm,
    residual,
    rms_norm,
    updates,
)
from controllability.interfaces import Param

up, gate = Linear(Param("up", ("h", "d"))), Linear(Param("gate", ("h", "d")))
down = Linear(Param("down", ("d", "h")))
biased = Linear(Param("down", ("d", "h")), Param("b", ("d",)))
silu = Activation("silu")

BLOCKS = {
    "gemma": residual(rms_norm("pre", offset=1) >> gated(gate, up, silu) >> down >> rms_norm("post", offset=1)),
    "llama": residual(rms_norm("pre") >> gated(gate, up, silu) >> down),
    "gpt-2": residual(layer_norm("pre") >> up >> Activation("gelu_tanh") >> biased),
    "olmo 2": residual(gated(gate, up, silu) >> down >> rms_norm("post")),
    "bert": residual(up >> Activation("gelu") >> biased) >> layer_norm("out"),
    "layer scale": residual(rms_norm("pre") >> up >> silu >> down >> Scale(Param("lambda", ("d",)))),
    "multiplier": residual(rms_norm("pre") >> gated(gate, up, silu) >> down >> Times(0.25)),
    "norm without parameters": residual(rms_norm("pre") >> up >> silu >> down >> Normalize("rms", 1e-6)),
    "two branches": Sum((Scale(Param("skip", ("d",))), rms_norm("pre") >> up >> silu >> down, down_two := Linear(Param("two", ("d", "d"))))),
    "soft-cap in the middle": residual(rms_norm("pre") >> up >> SoftCap(5.0) >> down),
}  # fmt: skip
VIAS = ("input-output", "output")


@pytest.mark.parametrize("via", VIAS)
@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "norm without parameters"])
def test_the_patched_block_gives_what_the_target_gave(name, via):
    block = BLOCKS[name]
    for seed in range(5):
        params, v, v_target = ct.sample(block, seed=seed, tokens=(2, 3), d=6, h=10)
        patch = ct.prove(block, via=via).construct(params, v, v_target)
        wanted = block(params, v_target)
        assert error(block(patch.applied_to(params), v), wanted) < 1e-12
        assert error(block(params, v), wanted) > 1e-2


@pytest.mark.parametrize("kind", ["numpy", "torch", "mpmath"])
@pytest.mark.parametrize("route", ["auto", "scale", "secular", "uniform"])
@pytest.mark.parametrize("via", VIAS)
def test_one_proof_runs_on_every_arithmetic(kind, route, via):
    block = architectures.block("gemma3")
    proof = ct.prove(block, via, route)
    limit = {"numpy": 1e-13, "torch": 1e-5, "mpmath": 1e-46}[kind]
    with mpmath.workdps(50):
        params, v, v_target = ct.sample(block, kind, tokens=(3,), d=8, h=16)
        patched = block(proof.construct(params, v, v_target).applied_to(params), v)
        wanted = block(params, v_target)
        largest = max(abs(x) for x in (patched - wanted).reshape(-1))
        assert largest / max(abs(x) for x in wanted.reshape(-1)) < limit


def test_the_gemma_expression_agrees_with_gemma_written_by_hand():
    block = architectures.block("gemma3")
    params, v, v_target = ct.sample(block, tokens=(4,), d=8, h=16)
    assert error(block(params, v), gemma_by_hand(params, v)) < 1e-14
    patch = ct.prove(block).construct(params, v, v_target)
    merged = [
        {n: p[i] if p.ndim > params[n].ndim else p for n, p in patch.merged_into(params).items()} for i in range(4)
    ]
    found = np.stack([gemma_by_hand(merged[i], v[i]) for i in range(4)])
    assert error(found, gemma_by_hand(params, v_target)) < 1e-13


def test_theorem_1_reproduces_the_activations_inside_and_1b_does_not():
    block = BLOCKS["llama"]
    params, v, v_target = ct.sample(block, d=6, h=10)
    hidden = (1, 2)  # the gated product
    inside = ct.Trace(block, params, v_target).output(hidden)
    found = {}
    for via in VIAS:
        patched = ct.prove(block, via).construct(params, v, v_target).applied_to(params)
        found[via] = error(ct.Trace(block, patched, v).output(hidden), inside)
    assert found["input-output"] < 1e-13
    assert found["output"] > 1e-2


def test_exact_rationals_leave_nothing():
    def frac(values):
        out = np.empty(len(values), dtype=object)
        out[:] = [Fraction(x) for x in values]
        return out

    block = residual(up >> Activation("cubic", coefficients=(1, 2, 0, 1)) >> down)
    params, v, v_target = ct.sample(block, "rational", d=3, h=4)
    for via in VIAS:
        patch = ct.prove(block, via).construct(params, v, v_target)
        assert (block(patch.applied_to(params), v) == block(params, v_target)).all()
        assert (block(params, v) != block(params, v_target)).any()
    # with a normalisation: numbers whose mean square plus ε is a square of a rational, so that the root is one
    normed = residual(Normalize("rms", Fraction(3)) >> Linear(Param("W", ("d", "d"))))
    W = {"W": np.stack([frac([1, 2, 0, 1]), frac([0, 1, 1, 0]), frac([2, 0, 1, 1]), frac([1, 1, 0, 3])])}
    source, target = frac([1, 1, 1, 1]), frac([2, 0, 0, 0])  # mean squares 1 and 1: root of 4
    patch = ct.prove(normed, "output").construct(W, source, target)
    assert (normed(patch.applied_to(W), source) == normed(W, target)).all()


def test_traces_spare_what_was_observed(monkeypatch):
    """W z and W z' that the two runs already computed are not computed again."""
    block = BLOCKS["llama"]
    params, v, v_target = ct.sample(block, d=6, h=10)
    full_source, full_target = ct.Trace(block, params, v), ct.Trace(block, params, v_target)
    inner = ((1, 2, 0, 0), (1, 2, 1))  # gate and up
    observed = [{path: trace.output(path) for path in inner} for trace in (full_source, full_target)]
    observed[1][()] = full_target.output(())
    calls: list[str] = []
    plain = Linear.__call__

    def counting(self, params, x):
        calls.append(str(self.weight))
        return plain(self, params, x)

    monkeypatch.setattr(Linear, "__call__", counting)
    source, target = (ct.Trace(block, params, x, seen) for x, seen in zip((v, v_target), observed, strict=True))
    patch = ct.prove(block).construct(params, source, target)
    assert calls == ["down"]
    calls.clear()
    ct.prove(block).construct(params, v, v_target)
    assert sorted(calls) == ["down", "down", "gate", "gate", "up", "up"]
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-12


def test_a_tied_skip_reads_its_patch():
    """δ is computed after the input patch, from the patched skip (theory 1: MiniMax)."""
    shared = Linear(Param("shared", ("d", "d")))
    block = Sum((shared, shared >> silu >> Linear(Param("out", ("d", "d")))))
    params, v, v_target = ct.sample(block, d=4)
    patch = ct.prove(block).construct(params, v, v_target)
    assert set(patch) == {"shared", "out"}
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-13


def test_a_target_outside_the_image_is_a_failed_condition_not_a_refusal():
    block = Sum((Times(1.0), up >> silu >> down >> SoftCap(1.0)))
    params, v, v_target = ct.sample(block, d=3, h=4)
    with pytest.raises(ct.SideConditionFailed, match=r"the soft-cap can reach the target: \|target\| < 1.0"):
        ct.prove(block).construct(params, v, v_target * 100)
    near = v + 1e-3 * (v_target - v)
    patch = ct.prove(block).construct(params, v, near)
    assert error(block(patch.applied_to(params), v), block(params, near)) < 1e-13


def test_alternatives_are_tried_when_numbers_break_a_condition():
    block = residual(rms_norm("pre") >> up >> Activation("relu") >> biased)
    params, v, v_target = ct.sample(block, d=4, h=5)
    params["up"] = -abs(params["up"])
    params["pre.weight"] = abs(params["pre.weight"])
    v, v_target = abs(v), abs(v_target)  # relu kills everything: the linear map after it sees zero
    patch = ct.prove(block).construct(params, v, v_target)
    assert "b" in patch
    assert "down" not in patch
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-14


def test_unknown_options_are_refused():
    for options, message in (
        ({"via": "magic"}, "unknown theorem via='magic'"),
        ({"route": "magic"}, "unknown route 'magic'"),
    ):
        with pytest.raises(ct.BadInput, match=message):
            ct.prove(BLOCKS["llama"], **options)
    with pytest.raises(ct.BadInput, match="unknown level 'magic'"):
        ct.prove(BLOCKS["llama"]).check("magic")


def test_the_gated_product_needs_both_factors():
    block = residual(rms_norm("pre") >> Product((up >> silu, silu >> up)) >> down)
    with pytest.raises(ct.NotControllable, match="used twice"):
        ct.prove(block, frozen=("pre.weight",))


def test_verify_reports_the_residual_and_the_negative_control():
    block = BLOCKS["llama"]
    params, v, v_target = ct.sample(block, d=6, h=10)
    patch = ct.prove(block).construct(params, v, v_target)
    good = ct.verify(block, params, patch, v, v_target)
    assert good.residual < 1e-12 < good.unpatched
    wrong = ct.Patch({p: d for p, d in patch.deltas.items() if str(p) != "down"})
    assert ct.verify(block, params, wrong, v, v_target).residual > 1e-3
    with pytest.raises(ct.BadInput, match="compared entry by entry"):
        ct.verify(block, params, patch, v, v_target[:2])


def test_half_precision_blocks_are_solved_in_float32():
    block = architectures.block("gemma3")
    params, v, v_target = ct.sample(block, "torch", tokens=(4,), d=32, h=64)
    half = {name: value.bfloat16() for name, value in params.items()}
    patch = ct.prove(block).construct(half, v, v_target)
    assert all(d.norms().dtype == torch.float32 for d in patch.deltas.values())
    stored = half["post_feedforward_layernorm.weight"] + patch["post_feedforward_layernorm.weight"].value
    assert torch.equal(stored, stored.bfloat16().float()), "the new scale must be one that bfloat16 can hold"
    assert error(block(patch.applied_to(half), v), block(half, v_target)) < 0.01


BAD_INSTANCES = {
    "missing parameter": (lambda p, v, t: ({k: x for k, x in p.items() if k != "down"}, v, t), "parameter down is missing; given are: gate, pre.weight, up"),
    "other width": (lambda p, v, t: (p, v[:3], t[:3]), "the states have width 3, the block takes 6"),
    "different states": (lambda p, v, t: (p, v, np.stack([t, t])), r"source has shape \(6,\), target has shape \(2, 6\)"),
    "transposed weight": (lambda p, v, t: (p | {"up": p["up"].T}, v, t), r"up has shape \(6, 10\), expected \(h = 10, d = 6\)"),
    "NaN": (lambda p, v, t: (p, v * np.nan, t), "the source state holds NaN or infinity"),
    "mixed libraries": (lambda p, v, t: (p, torch.as_tensor(v), torch.as_tensor(t)), r"torch tensors and NumPy arrays are mixed \(down is not a tensor\)"),
    "integers": (lambda p, v, t: (p, np.ones(6, dtype=int), t), "expected floating point numbers or objects, got an array of int64"),
    "lists": (lambda p, v, t: (p, [1.0] * 6, t), "expected a NumPy array or a torch tensor, got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INSTANCES)
def test_numbers_that_do_not_fit_are_one_clear_error(name):
    block = BLOCKS["llama"]
    change, message = BAD_INSTANCES[name]
    with pytest.raises(ct.BadInput, match=message):
        ct.prove(block).construct(*change(*ct.sample(block, d=6, h=10)))


def test_the_whole_gemma_patch_in_closed_form():
    """Explicit 2 × 3 matrices of symbols: the patch as formulas, the residual simplified to 0."""
    import sympy

    block = architectures.block(
        "gemma3", d=2, h=3, eps=sympy.Symbol("epsilon", positive=True), activation=Activation("phi", symbol=True)
    )
    params, v, v_target = ct.sample(block, "sympy")
    assert all(result["status"] == "passed" for result in ct.prove(block).check("symbolic"))
    patch = ct.prove(block).construct(params, v, v_target)
    assert ct.verify(block, params, patch, v, v_target).exact
    delta = patch["mlp.gate_proj.weight"].dense()
    z, z_target = (ct.Trace(block, params, x).output((1, 1)) for x in (v, v_target))
    papers = np.outer(params["mlp.gate_proj.weight"] @ (z_target - z), z) / (z @ z)
    assert all(
        sympy.simplify(patch.definitions.expand(a) - b) == 0
        for a, b in zip(delta.reshape(-1), papers.reshape(-1), strict=True)
    )


def test_a_wrong_rule_fails_the_symbolic_check_and_does_not_run_for_ever(monkeypatch):
    from controllability.deltas import LowRank

    plain = updates.rank_one_change

    def doubled(*given):
        delta = plain(*given)
        return LowRank(delta.left, delta.right + delta.right, delta.transposed)

    monkeypatch.setattr(updates, "rank_one_change", doubled)
    checks = ct.prove(architectures.block("gemma3")).check("symbolic")
    assert {c["rule"] for c in checks if c["status"] == "failed"} == {"I-linear", "O-linear", "whole block"}


def test_a_check_is_about_the_proof_that_was_asked_for():
    """With the scale frozen only the ball route is left, and symbols cannot run it: not 'passed' by another proof."""
    proof = ct.prove(architectures.block("gemma3"), frozen=["post_feedforward_layernorm.weight"])
    assert "post_feedforward_layernorm.weight" not in {str(p) for p in proof.root.moved}
    params, v, v_target = ct.sample(proof.block)
    with contextlib.suppress(ct.SideConditionFailed):
        assert "post_feedforward_layernorm.weight" not in proof.construct(params, v, v_target)


@pytest.mark.parametrize(
    ("v", "dtype"),
    [
        ([3e160, 4e160], "float64"),
        ([3e-160, 4e-160], "float64"),
        ([3e20, 4e20], "float32"),
        ([3e-22, 4e-22], "float32"),
    ],
)
def test_sizes_that_cannot_be_squared(v, dtype):
    block = residual(Linear(Param("W")))
    state = np.array(v, dtype=dtype)
    params = {"W": np.eye(2, dtype=dtype)}
    patch = ct.prove(block, "output").construct(params, state, -state)
    assert ct.verify(block, params, patch, state, -state).residual < 1e-6


def test_ball_needs_epsilon():
    block = residual(Linear(Param("W")) >> Normalize("rms", 0.0))
    v = np.array([3.0, 4.0])
    with pytest.raises(ct.SideConditionFailed, match=r"\(ε > 0\)"):
        ct.prove(block, "output").construct({"W": np.eye(2)}, v, v - 0.5 * np.array([0.6, 0.8]))


def test_slices_that_overlap_partly_are_refused():
    first, second = Param("F", ("h", "d"), (slice(0, 4),)), Param("F", ("h", "d"), (slice(2, 6),))
    block = Sum((Linear(first), Linear(second) >> silu >> Linear(Param("W", ("h", "h")))))
    with pytest.raises(ct.NotControllable, match="used twice"):
        ct.prove(block)


def test_overflow_on_the_way_is_a_failed_condition_not_a_patch():
    block = residual(rms_norm("pre") >> up >> silu >> down >> rms_norm("post"))
    params, v, v_target = ct.sample(block, d=3, h=4)
    with pytest.raises(ct.BadInput, match="down holds NaN or infinity"):
        ct.prove(block).construct(params | {"down": params["down"] * np.inf}, v, v_target)
    with np.errstate(all="ignore"), pytest.raises(ct.SideConditionFailed, match=r"finite|not zero"):
        ct.prove(block).construct(params | {"up": params["up"] * 1e308}, v, v_target * 1e3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ct.prove("gemma3"), "prove takes a component, got str"),
    (lambda: ct.prove(BLOCKS["llama"], frozen=["nonsense"]), "frozen names nonsense, which the block does not have"),
    (lambda: ct.prove(BLOCKS["llama"]).construct(None, np.ones(3), np.ones(3)), "the parameters must be a mapping"),
    (lambda: ct.prove(BLOCKS["llama"]).construct({}, np.ones((0, 3)), np.ones((0, 3))), r"the source state has shape \(0, 3\)|expected floating"),
    (lambda: silu >> silu and __import__("controllability.components", fromlist=["Sequence"]).Sequence((silu,)), "at least two parts, got 1"),
])  # fmt: skip
def test_misuse_from_python_is_one_clear_error(call, message):
    with pytest.raises(ct.BadInput, match=message):
        call()
