"""Side conditions that fail on numbers say where, by how much and what to do: whole messages, and the advice followed."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest
from catalogued import patchable_families
from helpers import error
from refused_blocks import drawn, linear, relu, sigmoid, silu

import architectures
import controllability as ct
from controllability.components import (
    Bias,
    Collapse,
    Correction,
    ExpertLinear,
    Gate,
    Joined,
    Linear,
    Mixture,
    Normalize,
    Product,
    Routing,
    Scale,
    SoftCap,
    Spread,
    Streams,
    Taps,
    Window,
    layer_norm,
    residual,
    rms_norm,
)
from controllability.interfaces import Param


def numbers(block, params, v, v_target, via="output", route="auto", frozen=()):
    """What ``construct`` raises on these numbers."""
    with np.errstate(all="ignore"), pytest.raises(ct.SideConditionFailed) as failed:
        arrays = {name: np.array(value, dtype=float) for name, value in params.items()}
        proof = ct.prove(block, via, route, frozen)
        proof.construct(arrays, np.array(v, dtype=float), np.array(v_target, dtype=float))
    return failed.value


def experts(inner, **options):
    last = ExpertLinear(Param("V", (2, 2, 2)))
    return Mixture(Linear(Param("R", (2, 2)), Param("r", (2,))), Routing(1, "identity"), inner, last, **options)


W, EYE = linear("W", 2, 2), np.eye(2)
MATRICES = {"U": np.stack([EYE, EYE]), "V": np.stack([EYE, EYE])}
own = ExpertLinear(Param("U", (2, 2, 2)))
ONES, ZERO = [[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]

CONDITIONS = {
    "soft-cap": (
        residual(W >> SoftCap(30.0)), {"W": EYE}, ONES, [[1.0, 1.0], [100.0, 1.0]], {},
        "side condition failed at soft-cap 30.0, position 1: the soft-cap can reach the target: |target| < 30.0 (margin -98.9)\n"
        "  hint:  the soft-cap 30.0 cannot reach this target: |target| ≤ 30.0, and here it is 129",
    ),
    "zero input of a linear map": (
        residual(W), {"W": EYE}, ZERO, ONES, {},
        "side condition failed at linear W, position 1: the input of W is not zero (margin 0)\n"
        "  hint:  give linear W a bias: it moves the output whatever the input is",
    ),
    "zero input, tokens along two axes": (
        residual(W), {"W": EYE}, [ONES, ONES, ZERO], [ONES, ONES, ONES], {},
        "side condition failed at linear W, position 5 (token [2, 1]): the input of W is not zero (margin 0)\n"
        "  hint:  give linear W a bias: it moves the output whatever the input is",
    ),
    "zero input, the bias frozen": (
        residual(linear("W", 2, 2, "b")), {"W": EYE, "b": [0, 0]}, ZERO, ONES, {"frozen": ("b",)},
        "side condition failed at linear W, position 1: the input of W is not zero (margin 0)\n"
        "  hint:  let b move: it moves the output whatever the input is",
    ),
    "zero inside, several derivations": (
        residual(Scale(Param("m", (2,))) >> relu >> W), {"m": [1, 1], "W": EYE}, [-1.0, -1.0], [-1.0, -2.0],
        {"via": "input-output"},
        "side condition failed at linear W, position 0: the input of W is not zero (margin 0)\n"
        "  hint:  give linear W a bias: it moves the output whatever the input is",
    ),
    "scale": (
        residual(Scale(Param("m", (2,)))), {"m": [1, 1]}, [1.0, 0.0], [1.0, 2.0], {},
        "side condition failed at scale m, position 0: no input coordinate of m is zero where its output must change (margin 0)\n"
        "  hint:  a scale cannot move a zero: add a bias after scale m",
    ),
    "scale of a norm, on route scale": (
        residual(W >> rms_norm("post", 2)), {"W": EYE, "post.weight": [1, 1]}, [1.0, 0.0], [1.0, 2.0], {"route": "scale"},
        "side condition failed at scale post.weight, position 0: no input coordinate of post.weight is zero where its output must change (margin 0)\n"
        "  hint:  take route='auto' or 'balanced': they do not divide by the activations of the norm",
    ),
    "centred norm without a bias": (
        residual(W >> layer_norm("post", 2, bias=False)), {"W": EYE, "post.weight": [1, 1]}, [-5.0, -5.0], [1.0, 2.0],
        {"route": "balanced"},
        "side condition failed at scale post.weight, position 0: what the branch must give, over its scale, has entries of both signs, or none at all: Σ G_i/m'_i = 0 (margin 0)\n"
        "  hint:  add a bias after the norm, or ask for route='scale', which leaves what enters the norm as it is",
    ),
    "fixed scale": (
        residual(W >> Scale(Param("m", (2,)))), {"W": EYE, "m": [1, 0]}, ONES, ZERO, {"frozen": ("m",)},
        "side condition failed at scale m, position 0: no entry of the fixed scale m is zero (margin 0)\n"
        "  hint:  a zero entry lets nothing through: let m move, or add a bias after it",
    ),
    "gate": (
        residual(W >> Gate(Param("g", (1,)), "tanh")), {"W": EYE, "g": [0]}, ONES, ZERO, {},
        "side condition failed at gate tanh g, position 0: the gate g is not closed (margin 0)\n"
        "  hint:  a closed gate lets nothing through: open g, or steer after it (a bias)",
    ),
    "other factor": (
        residual(Product((relu, W))), {"W": EYE}, [1.0, -1.0], [2.0, 1.0], {},
        "side condition failed at activation relu * linear W, position 0: no entry of the other factor (activation relu) is zero (margin 0)\n"
        "  hint:  where the other factor is zero nothing passes: steer after the product, by a bias or a linear map",
    ),
    "taps": (
        residual(W >> Window(2) >> Taps(Param("c", (2, 1, 2)))), {"W": EYE, "c": np.ones((2, 1, 2))},
        [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]], np.ones((3, 2)), {"frozen": ("W",)},
        "side condition failed at convolution c, position 2: no channel of c reads only zeros where its output must change (margin 0)\n"
        "  hint:  the convolution cannot move a channel in which nothing comes in: add a bias before it",
    ),
    "streams": (
        Collapse(
            Spread(linear("S", 4, 2) >> Streams(2), linear("b", 2, 2), W), Joined() >> linear("P", 2, 4) >> sigmoid
        ), {"S": np.ones((4, 2)), "b": [[1, 1], [1, 1]], "W": EYE, "P": np.ones((2, 4))}, [[1.0, 1.0], [1.0, -1.0]], ONES, {},
        "side condition failed at weighted sum of streams + weights ⊗ (linear W), position 1: the weights of what is written do not cancel (margin 0)\n"
        "  hint:  nothing that the carrier writes comes out here: patch another token, or steer after the collapse",
    ),
    "gain": (
        Correction(linear("p", 2, 2), W, linear("g", 1, 2)), {"p": EYE, "W": EYE, "g": [[1, 0]]}, ONES, [[1.0, 1.0], [-1.0, 1.0]], {},
        "side condition failed at linear p corrected by linear W, position 1: the gain of the correction is not 0 (margin 0)\n"
        "  hint:  nothing that the carrier writes comes out here: patch another token, or steer after the collapse",
    ),
    "one number for all features": (
        residual(linear("g", 1, 2)), {"g": [[1, 1]]}, ONES, ZERO, {},
        "side condition failed at linear g: there is a number for every feature that must change (margin -1)\n"
        "  hint:  one number serves all features here: steer after it, by a map or a bias with a number for each feature",
    ),
    "ball, asked for": (
        residual(W >> rms_norm("post", 2, 1e-2)), {"W": EYE, "post.weight": [1, 1]}, ONES, [[1.0, 1.0], [3.0, 1.0]],
        {"route": "ball"},
        "side condition failed at normalise (rms) post, position 1: mean((G/m)²) < 1: the target lies in the image of the normalisation (ε > 0) (margin -4.68)\n"
        "  tried: route ball\n"
        "  hint:  with the scale as it is only targets with mean((G/m)²) < 1 are reached: take route='auto' or 'balanced', which move a scale after the norm",
    ),
    "ball, the scale frozen": (
        residual(W >> rms_norm("post", 2, 1e-2)), {"W": EYE, "post.weight": [1, 1]}, ONES, [[1.0, 1.0], [3.0, 1.0]],
        {"frozen": ("post.weight",)},
        "side condition failed at normalise (rms) post, position 1: mean((G/m)²) < 1: the target lies in the image of the normalisation (ε > 0) (margin -4.68)\n"
        "  tried: route ball\n"
        "  hint:  with the scale as it is only targets with mean((G/m)²) < 1 are reached: let a scale after the norm move, or add a bias after it",
    ),
    "ball, no scale": (
        residual(W >> Normalize("rms", 1e-2)), {"W": EYE}, ONES, [[1.0, 1.0], [3.0, 1.0]], {},
        "side condition failed at normalise (rms), position 1: mean((G/m)²) < 1: the target lies in the image of the normalisation (ε > 0) (margin -4.68)\n"
        "  tried: route ball\n"
        "  hint:  with the scale as it is only targets with mean((G/m)²) < 1 are reached: let a scale after the norm move, or add a bias after it",
    ),
    "overflow at a norm": (
        residual(W >> rms_norm("post", 2)), {"W": 1e150 * EYE, "post.weight": [1, 1]}, [[1.0, 1.0], [1e200, 1.0]], ONES, {},
        "side condition failed at scale post.weight, position 1: the activations around the normalisation are finite\n"
        "  tried: 3 derivations that move different parameters\n"
        "  hint:  the layer overflows on this input: take another dtype",
    ),
    "too large for a norm": (
        residual(W >> rms_norm("post", 2)), {"W": 1e153 * EYE, "post.weight": [1, 1]}, [[1.0, 1.0], [300.0, 1.0]], ONES, {},
        "side condition failed at scale post.weight, position 1: some route is open for the target (uniform always is when ε > 0 or the activation is not zero)\n"
        "  tried: 3 derivations that move different parameters\n"
        "  hint:  the numbers around the normalisation are too large to be squared: take another dtype",
    ),
    "too large for route uniform": (
        residual(W >> rms_norm("post", 2)), {"W": 1e153 * EYE, "post.weight": [1, 1]}, [[1.0, 1.0], [300.0, 1.0]], ONES,
        {"route": "uniform"},
        "side condition failed at scale post.weight, position 1: the target and the scale are finite\n"
        "  tried: 2 derivations that move different parameters\n"
        "  hint:  the numbers around the normalisation are too large to be squared: take another dtype",
    ),
    "too large for route secular": (
        residual(W >> rms_norm("post", 2)), {"W": 1e153 * EYE, "post.weight": [1, 1]}, [[1.0, 1.0], [300.0, 1.0]], ONES,
        {"route": "secular"},
        "side condition failed at scale post.weight, position 1: the target and the scale are finite; the hard case leaves dead channels\n"
        "  tried: 2 derivations that move different parameters\n"
        "  hint:  the numbers around the normalisation are too large to be squared: take another dtype",
    ),
    "a patch that overflows": (
        residual(W), {"W": EYE}, [[1.0, 1.0], [1e-310, 0.0]], ONES, {},
        "side condition failed at the patch of W: the construction stays finite\n"
        "  hint:  scale the numbers, or take more precision (float64, mpmath)",
    ),
    "experts' zero input": (
        residual(experts(relu >> own >> sigmoid)), MATRICES | {"R": EYE, "r": [0, 0]}, [-1.0, -2.0], [1.0, 2.0],
        {"via": "input-output"},
        "side condition failed at experts U, position 0: no chosen expert's input of U is zero where its output must change (margin 0)\n"
        "  tried: 2 derivations that move different parameters\n"
        "  hint:  an expert's matrix cannot move what it sees as zero: ask for via='output'",
    ),
    "no active expert": (
        residual(experts(own >> relu)), MATRICES | {"R": EYE, "r": [0, 0]}, [[1.0, 2.0], [-1.0, -2.0]], ONES, {},
        "side condition failed at mixture of experts (identity, top 1; experts V), position 1: some active expert has a share and an activation that are not zero (margin 0)\n"
        "  hint:  no expert's last matrix moves the output here: steer beside or after the mixture (a shared expert, a bias)",
    ),
    "near-tie": (
        residual(experts(own >> silu)), MATRICES | {"R": EYE, "r": [0, 0]}, [[1.0, 2.0], [1.0, 2.0]], [[1.0, 3.0], [2.0, 2.0]],
        {"via": "input-output"},
        "side condition failed at mixture of experts (identity, top 1; experts V), position 1: the target run's choice of experts is no near-tie (margin -1.42e-14)\n"
        "  hint:  via='output' keeps the experts that the source run chooses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_that_fail_on_numbers_say_where_how_far_and_what_to_do(name):
    block, params, v, v_target, options, message = CONDITIONS[name]
    assert str(numbers(block, params, v, v_target, **options)) == message


ADVICE = {  # what the hint says, done: the same numbers then have a patch
    "zero input of a linear map": lambda b, p, o: (residual(linear("W", 2, 2, "b")), p | {"b": [0, 0]}, o),
    "zero input, the bias frozen": lambda b, p, o: (b, p, {}),
    "scale": lambda b, p, o: (residual(Scale(Param("m", (2,))) >> Bias(Param("b", (2,)))), p | {"b": [0, 0]}, o),
    "scale of a norm, on route scale": lambda b, p, o: (b, p, {"route": "uniform"}),
    "centred norm without a bias": lambda b, p, o: (residual(W >> layer_norm("post", 2)), p | {"post.bias": [0, 0]}, {}),
    "fixed scale": lambda b, p, o: (b, p, {}),
    "gate": lambda b, p, o: (b, p | {"g": [1.0]}, o),
    "other factor": lambda b, p, o: (residual(Product((relu, W)) >> Bias(Param("b", (2,)))), p | {"b": [0, 0]}, o),
    "ball, asked for": lambda b, p, o: (b, p, {"route": "uniform"}),
    "ball, the scale frozen": lambda b, p, o: (b, p, {}),
    "experts' zero input": lambda b, p, o: (b, p, {"via": "output"}),
    "near-tie": lambda b, p, o: (b, p, {"via": "output"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_the_advice_helps_on_the_same_numbers(name):
    block, params, v, v_target, options, _ = CONDITIONS[name]
    block, params, options = ADVICE[name](block, params, options)
    params = {key: np.array(value, dtype=float) for key, value in params.items()}
    v, v_target = np.array(v), np.array(v_target)
    options = {"via": "output"} | options
    patch = ct.prove(block, **options).construct(params, v, v_target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-12


def test_another_choice_of_experts_is_said_with_how_many_differ():
    block = residual(experts(own >> silu))
    params = MATRICES | {"R": EYE, "r": np.zeros(2)}
    run = ct.prove(block).patched_run(params, np.array(ONES), np.array([[1.0, 3.0], [2.0, 1.0]]))
    chosen = dict(run.target.bound((1,)))
    chosen["(chosen experts)"] = np.array([[1], [1]])
    with pytest.raises(ct.SideConditionFailed) as failed:
        run.bind((1,), chosen)
    assert str(failed.value) == (
        "side condition failed at mixture of experts (identity, top 1; experts V), position 1: "
        "the patched router chooses the experts of the target run (margin -1)\n"
        "  hint:  rounding decides between experts: take more precision (float32 or better); "
        "or via='output' keeps the experts that the source run chooses"
    )


ALL = architectures.names()


@pytest.mark.parametrize(
    ("names", "seeds"), [(patchable_families(), 30), pytest.param(ALL, 100, marks=pytest.mark.slow)]
)
def test_every_condition_that_proofs_have_is_in_the_table_and_has_a_hint(names, seeds):
    """A condition that is added needs a hint and a row above."""
    told = {"the patched router chooses the experts of the target run"}  # tested above
    for block, *_, message in CONDITIONS.values():
        told.add(bare(block, message.partition("\n")[0].partition(": ")[2].partition(" (margin")[0]))
    blocks = {name: architectures.block(name) for name in names}
    blocks |= {f"seed {seed}": drawn(seed)[1] for seed in range(seeds)}
    for name, block in blocks.items():
        for via, route in (("input-output", "auto"), ("output", "auto"), ("output", "uniform"), ("output", "secular")):
            with contextlib.suppress(ct.NotControllable):
                proof = ct.prove(block, via, route)
                for step in (proof.root, *proof.alternatives):
                    for condition in (c for s in step.walk() for c in s.conditions):
                        assert condition.hint, f"{name}: {condition}"
                        assert bare(block, condition.statement) in told, f"{name}: {condition}"


def bare(block: ct.Component, statement: str) -> str:
    """A statement without the names of this block and the numbers of its components."""
    for name in sorted(map(str, block.parameters()), key=len, reverse=True):
        statement = statement.replace(f" {name} ", " … ")
    return re.sub(r"factor \(.*\)|< [\d.]+", "…", statement)
