"""Arguments that say nothing, or something impossible: each is refused by name and none passed over."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from catalogued import patchable_families

import architectures
import controllability as ct
from controllability.components import (
    Activation,
    ExpertLinear,
    Fixed,
    Gate,
    Glu,
    Linear,
    Mixture,
    Normalize,
    Routing,
    Scale,
    Select,
    SoftCap,
    Times,
    gated,
    residual,
)  # fmt: skip
from controllability.interfaces import Param, Product, Sequence, Sum

W, U = Linear(Param("W", (5, 4))), Linear(Param("U", (4, 5)))

WRONG = {
    "Times: factor must be a number, ≠ 0; got 0": lambda: Times(0),
    "Times: factor must be a number, ≠ 0; got '2'": lambda: Times("2"),
    "Times: factor must be a number, ≠ 0; got nan": lambda: Times(float("nan")),
    "Normalize: kind must be rms, layer; got 'foo'": lambda: Normalize("foo"),
    "Normalize: eps must be a number, ≥ 0; got -1": lambda: Normalize("rms", -1),
    "SoftCap: cap must be a number, > 0; got 0": lambda: SoftCap(0),
    "Linear: weight must be Param; got 'W'": lambda: Linear("W"),
    "Linear: layout must be out_in, in_out; got 'rows'": lambda: Linear(Param("W"), layout="rows"),
    "Scale: offset must be int; got 'one'": lambda: Scale(Param("m"), offset="one"),
    "Sequence: parts must be tuple[Component, ...]; got": lambda: Sequence((W, 3)),
    "Sum: terms must be tuple[Component, ...]; got": lambda: Sum((W, "U")),
    "Product: factors must be tuple[Component, ...]; got": lambda: Product([W, W]),
    "Fixed: inner must be Component; got 3": lambda: Fixed(3),
    "unknown activation 'wave'": lambda: Gate(Param("g"), "wave"),
    "Glu: activation must be Component; got 'silu'": lambda: Glu("silu"),
    "Glu: order must be gate_up, up_gate, interleaved; got 'up'": lambda: Glu(Activation("silu"), "up"),
    "Select: index must be a number, ≥ 0; got -1": lambda: Select(-1),
    "Routing: top_k must be a number, ≥ 1; got 0": lambda: Routing(0),
    "Routing: score must be softmax, sigmoid, identity, sqrt_softplus, sparsemixer; got 'max'": lambda: Routing(1, "max"),
    "Routing: groups must be (how many, how many are kept), got (2, 3)": lambda: Routing(1, groups=(2, 3)),
    "Mixture: routing must be Routing; got 2": lambda: Mixture(W, 2, W, ExpertLinear(Param("E"))),
    "Param: shape must be tuple[int | str, ...]; got 'hd'": lambda: Param("W", "hd"),
    "sizes that are names or whole numbers from 1 on; got 'W', (0, 4)": lambda: Param("W", (0, 4)),
    "size foo=3: give whole numbers from 1 on for E, d, h": lambda: ct.sample(residual(W), foo=3),
    "size d=0": lambda: ct.sample(residual(W), d=0),
    "jointly must be True or False, got 'yes'": lambda: ct.prove(residual(W), jointly="yes"),
    "architecture 'gemma3' has no size foo; it has d, h": lambda: architectures.block("gemma3", foo=3),
    "whole numbers from 1 on; got 'pre_feedforward_layernorm.weight', (-4,)": lambda: architectures.block("gemma3", d=-4),
    "Normalize: eps must be a number, ≥ 0; got -0.1": lambda: architectures.block("llama", eps=-0.1),
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_argument_is_refused_by_name(said):
    with pytest.raises(ct.BadInput) as refused:
        WRONG[said]()
    assert said in str(refused.value)


def test_numbers_of_every_arithmetic_are_taken():
    import mpmath
    import sympy

    for number in (
        2,
        0.5,
        Fraction(1, 3),
        np.float32(2),
        torch.tensor(2.0),
        mpmath.mpf("0.1"),
        sympy.Symbol("c"),
        sympy.sqrt(2),
    ):
        assert Times(number).factor is number
    assert Normalize("rms", 0).eps == 0


MISFITS = {
    "5 by 4, then 4 by 7": W >> Linear(Param("V", (4, 7))),
    "a residual of another width": residual(W),
    "a product": residual(gated(W, Linear(Param("V", (6, 4))), Activation("silu")) >> U),
    "a norm": residual(Normalize("rms") >> Scale(Param("m", (3,))) >> W >> U),
    "no two halves": residual(W >> Glu(Activation("silu")) >> Linear(Param("V", (4, 2)))),
    "stored the other way round": residual(W >> Activation("silu") >> Linear(Param("V", (4, 5)), layout="in_out")),
}


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("jointly", [False, True])
def test_sizes_that_do_not_fit_are_no_block(name, jointly):
    with pytest.raises(ct.BadInput, match=r"the sizes of the block do not fit: .*(reads|adds|multiplies|halves)"):
        ct.prove(MISFITS[name], via="output", jointly=jointly)


def test_sizes_that_fit_or_are_names_are():
    named = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
    for block in (residual(W >> Activation("silu") >> U), residual(named[0] >> Activation("silu") >> named[1])):
        assert ct.prove(block)
    for name in architectures.names():
        if architectures.find(name).refusal is None:
            block = architectures.block(name, d=8, h=12)
            assert all(12 in p.shape or 24 in p.shape or "h" not in p.shape for p in block.parameters()), name
            if name in patchable_families():  # one of each shape
                assert ct.prove(block).root, name


def test_construct_refuses_a_patch_that_misses_its_target():
    """One norm scale for many tokens, ever larger states: what is returned is near its target, or is not returned."""
    block = architectures.block("olmo2")
    params, *_ = ct.sample(block, d=8, h=12)
    proof, seen = ct.prove(block, jointly=True), []
    for size in (1.0, 1e3, 1e5, 1e6):
        draw = np.random.default_rng(0)
        v, w = draw.normal(size=(4, 8)) * size, draw.normal(size=(4, 8)) * size
        try:
            patch = proof.construct(params, v, w)
        except ct.NotVerified as refused:
            assert "the patched block misses its target by" in str(refused)
            seen.append(None)
            continue
        found = block(patch.applied_to(params), v) - block(params, w)
        seen.append(patch.residual)
        assert np.abs(found).max() / np.abs(block(params, w)).max() < 2 * patch.residual + 1e-12 < 1e-3
    assert seen[0] is not None and seen[0] < 1e-9
    assert seen[2:] == [None, None]


def test_what_is_not_measured_says_so():
    block = residual(Linear(Param("W", ("d", "d"))))
    params, v, w = ct.sample(block)
    proof = ct.prove(block, via="output")
    assert proof.construct(params, v, w).residual < 1e-12
    assert proof.construct(*ct.sample(block, kind="rational")).residual == 0
    assert proof.construct(*ct.sample(block, kind="sympy", d=2)).residual is None
