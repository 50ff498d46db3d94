"""Refusals teach: the smallest culprit, the rule and its arguments, a change that has a proof.  Whole messages are pinned."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import error
from trees import D, Grower

import architectures
import controllability as ct
from controllability.cli.main import main
from controllability.components import (
    Activation,
    Bias,
    ExpertLinear,
    Gate,
    Identity,
    Linear,
    Mixture,
    Normalize,
    Product,
    Routing,
    Scale,
    Select,
    Sequence,
    Share,
    SoftCap,
    Sum,
    layer_norm,
    residual,
    rms_norm,
)
from controllability.editing import fresh, last_norm, replace_param, width_after, with_node
from controllability.interfaces import Param
from controllability.prover import Prover
from controllability.refusal import explained, refusal
from controllability.remedies import Remedy
from controllability.rules import Attempt, Failure
from controllability.trace import Place


def linear(name: str, out: str | int = "d", into: str | int = "d", bias: str = "") -> Linear:
    return Linear(Param(name, (out, into)), Param(bias, (out,)) if bias else None)


up, down = linear("up", "h", "d"), linear("down", "d", "h")
square, back = linear("up"), linear("down")
silu, tanh, relu, sigmoid = (Activation(name) for name in ("silu", "tanh", "relu", "sigmoid"))
scale = Scale(Param("lambda", ("d",)))
router = linear("R", "E")
experts_up, experts_down = ExpertLinear(Param("U", ("E", "h", "d"))), ExpertLinear(Param("V", ("E", "d", "h")))
shared_map = Share() >> Linear(Param("M", ("h", "d"))) >> silu
deepseek = architectures.block("deepseek_v3")


@dataclass(frozen=True)
class Mystery(ct.Component):
    """y = w·x, of which nobody said how it is steered."""

    weight: Param

    def __call__(self, params, x):
        return x * self.weight.value(params)

    def describe(self):
        return f"mystery {self.weight}"

    def own_parameters(self):
        return (self.weight,)


REFUSED = sorted(name for name in architectures.names() if architectures.find(name).refusal is not None)

REFUSALS = {
    "ends in tanh": (
        residual(rms_norm("pre") >> square >> tanh), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: activation tanh\n"
        "  reason:  O-after-fixed on (p = normalise (rms) pre >> scale pre.weight >> linear up, g = activation tanh): it has no parameter that moves its output, and it cannot be undone from every target\n"
        "  hint:    add a bias after activation tanh (tried: it has a proof)",
    ),
    "nothing to steer inside": (
        residual(silu >> back), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: activation silu\n"
        "  reason:  I-after on (f = activation silu, q = linear down): it has no parameter that steers its input\n"
        "  hint:    ask for via='output' (Theorem 1b); or put a linear map before activation silu (tried: both have a proof)",
    ),
    "nothing to steer inside, a soft-cap after it": (
        residual(silu >> back >> SoftCap(30.0)), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: activation silu\n"
        "  reason:  I-after on (f = activation silu, q = linear down): it has no parameter that steers its input\n"
        "  hint:    ask for via='output' (Theorem 1b); or put a linear map before activation silu (tried: both have a proof)",
    ),
    "nothing to steer at all": (
        residual(silu >> tanh), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: activation tanh\n"
        "  reason:  O-after-fixed on (p = activation silu, g = activation tanh): it has no parameter that moves its output, and it cannot be undone from every target\n"
        "  hint:    ask for via='output' (Theorem 1b), and add a bias after activation tanh (tried: it has a proof)",
    ),
    "one component": (
        residual(back), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: linear down\n"
        "  reason:  theorem-1 on (g∘f = linear down): the branch is one component: there is no inner function before the outer one\n"
        "  hint:    ask for via='output' (Theorem 1b); or put a linear map before linear down (tried: both have a proof)",
    ),
    "tied twice": (
        residual(linear("W") >> silu >> linear("W")), {"via": "output"},
        "prove via output, route auto: not controllable\n"
        "  culprit: linear W >> activation silu >> linear W\n"
        "  reason:  O-after-fixed on (p = linear W >> activation silu, g = linear W): parameter W is used twice: moving it for one use would change the other\n"
        "  hint:    untie W: a parameter of its own for its second use (linear W) (tried: it has a proof)",
    ),
    "tied across the split": (
        residual(rms_norm("pre") >> linear("W") >> silu >> linear("W")), {"frozen": ("pre.weight",)},
        "prove via input-output, route auto, frozen pre.weight: not controllable\n"
        "  culprit: linear W >> activation silu >> linear W\n"
        "  reason:  theorem-1 on (g∘f = linear W >> activation silu >> linear W): parameter W is used twice: moving it for one use would change the other\n"
        "  hint:    untie W: a parameter of its own for its second use (linear W) (tried: it has a proof)",
    ),
    "tied factors": (
        residual(rms_norm("pre") >> Product((up >> silu, silu >> up)) >> down), {"frozen": ("pre.weight",)},
        "prove via input-output, route auto, frozen pre.weight: not controllable\n"
        "  culprit: (linear up >> activation silu) * (activation silu >> linear up)\n"
        "  reason:  I-combine on (f₁ = linear up >> activation silu, f₂ = activation silu >> linear up): parameter up is used twice: moving it for one use would change the other\n"
        "  hint:    ask for via='output' (Theorem 1b); or untie up: a parameter of its own for its second use (linear up) (tried: both have a proof)",
    ),
    "frozen": (
        residual(rms_norm("pre") >> up >> silu >> down), {"frozen": ("down",)},
        "prove via input-output, route auto, frozen down: not controllable\n"
        "  culprit: linear down\n"
        "  reason:  O-linear on (g = linear down): down may not move (frozen)\n"
        "  hint:    let down move; or give linear down a bias (tried: both have a proof)",
    ),
    "layer norm without parameters at the end": (
        residual(up >> silu >> down >> Normalize("layer", 1e-5, "post")), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: normalise (layer) post\n"
        "  reason:  O-after-fixed on (p = linear up >> activation silu >> linear down, g = normalise (layer) post): it has no parameter that moves its output, and it cannot be undone from every target\n"
        "  hint:    give the last norm a bias, after normalise (layer) post (tried: it has a proof)",
    ),
    "layer norm without a bias, off its only route": (
        residual(up >> silu >> down >> layer_norm("post", bias=False)), {"route": "uniform"},
        "prove via input-output, route uniform: not controllable\n"
        "  culprit: scale post.weight\n"
        "  reason:  O-scale on (g = scale post.weight): the scale of a normalised output may move alone on route scale only, not on uniform\n"
        "  hint:    ask for route='auto'; or give the last norm a bias, after scale post.weight (tried: both have a proof)",
    ),
    "one map for all chosen experts": (
        residual(Mixture(router, Routing(2), shared_map, experts_down, weighted=False)), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: linear M\n"
        "  reason:  I-linear on (f = linear M): a token has one row for each chosen expert here, and one change cannot serve them all\n"
        "  hint:    ask for via='output' (Theorem 1b); or give each expert a map of its own in place of linear M (tried: both have a proof)",
    ),
    "experts that do not end in their own map": (
        residual(Mixture(router, Routing(2), experts_up >> silu, experts_down >> Normalize("rms"))), {"via": "output"},
        "prove via output, route auto: not controllable\n"
        "  culprit: experts V >> normalise (rms)\n"
        "  reason:  O-mixture on (last = experts V >> normalise (rms)): the experts do not end in their own linear map\n"
        "  hint:    add a bias after mixture of experts (soft-max, … experts V >> normalise (rms)) (tried: it has a proof)",
    ),
    "a component that says nothing of itself": (
        residual(up >> silu >> down >> Mystery(Param("mu", ("d",)))), {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: mystery mu\n"
        "  reason:  O-after-fixed on (p = linear up >> activation silu >> linear down, g = mystery mu): Mystery does not implement OutputControllable\n"
        "  hint:    add a bias after mystery mu (tried: it has a proof); if it can be steered, implement output_steerings in its class",
    ),
    "everything frozen": (
        deepseek, {"frozen": sorted(p.name for p in deepseek.parameters())},
        "prove via input-output, route auto, frozen mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.e_score_correction_bias and 5 more: not controllable\n"
        "  culprit: linear mlp.shared_experts.down_proj.weight\n"
        "  reason:  O-linear on (g = linear mlp.shared_experts.down_proj.weight): mlp.shared_experts.down_proj.weight may not move (frozen)\n"
        "  hint:    ask for via='output' (Theorem 1b), and let mlp.shared_experts.down_proj.weight move (tried: it has a proof)",
    ),
    "a parallel block": (
        Sum((Select(0, "x"), Select(1, "a"), Sequence.of(Select(0, "x"), tanh))), {"via": "output"},
        "prove via output, route auto: not controllable\n"
        "  culprit: activation tanh\n"
        "  reason:  O-after-fixed on (p = input x, g = activation tanh): it has no parameter that moves its output, and it cannot be undone from every target\n"
        "  hint:    add a bias after activation tanh (tried: it has a proof)",
    ),
    "no residual": (
        silu, {},
        "prove via input-output, route auto: not controllable\n"
        "  culprit: activation silu\n"
        "  reason:  it has no parameter that steers its input\n"
        "  hint:    put a linear map before activation silu (tried: it has a proof)",
    ),
}  # fmt: skip


def nodes(part: ct.Component) -> list[ct.Component]:
    return [part, *(node for child in part.children() for node in nodes(child))]


def refused(block: ct.Component, **options) -> ct.NotControllable:
    with pytest.raises(ct.NotControllable) as failed:
        ct.prove(block, **options)
    return failed.value


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_culprit_rule_arguments_and_what_helps(name):
    block, options, message = REFUSALS[name]
    error_ = refused(block, **options)
    assert str(error_) == message
    assert (f"culprit: {error_.culprit}\n" in message) and (f"reason:  {error_.reason}\n" in message)
    assert f"hint:    {error_.hint}" in message


WITHOUT_SIZES = ("nothing to steer at all", "no residual")  # no parameter says how wide the block is


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hint_says_has_a_proof_that_patches(name):
    block, options, _ = REFUSALS[name]
    error_ = refused(block, **options)
    assert error_.remedy is error_.remedies[0]
    for remedy in error_.remedies:
        assert remedy.change in error_.hint
        proof = ct.prove(remedy.block, **remedy.options)
        if name in WITHOUT_SIZES:
            continue
        params, v, v_target = ct.sample(remedy.block, seed=3, tokens=(2,), d=4, h=6)
        wanted = remedy.block(params, v_target)
        assert error(remedy.block(proof.construct(params, v, v_target).applied_to(params), v), wanted) < 1e-12
        assert error(remedy.block(params, v), wanted) > 1e-3
        if remedy.block is not block:
            assert remedy.block.parameters() - block.parameters(), "an edit brings a parameter of its own"


def test_one_that_asks_otherwise_and_one_that_edits():
    error_ = refused(residual(silu >> back))
    asks, edits = error_.remedies
    assert (asks.via, asks.block) == ("output", residual(silu >> back))
    assert (edits.via, edits.block) == ("input-output", residual(linear("before.weight") >> silu >> down))
    assert ct.NotControllable("culprit", "reason", "hint").remedy is None


def test_the_numbers_of_an_edit_are_new_names_with_sizes():
    block = residual(up >> linear("bias", 5, "h") >> tanh >> Normalize("layer"))
    edited = refused(block).remedy.block
    assert {str(p): p.shape for p in edited.parameters() - block.parameters()} == {"bias_2": (5,)}


def test_when_nothing_helps_it_is_said():
    block = residual(silu >> back)
    failure = Failure(Place(silu, (1, 0)), "input side", "it has none", "a map before it", side="input")
    tried: list[Remedy] = []

    def never(question: Remedy) -> list[Failure]:
        tried.append(question)
        return [failure]

    asked = Remedy("", block, "input-output", "scale", frozenset())
    error_ = refusal(asked, Attempt([], [failure]), Prover(block, "input-output", "scale", frozenset()), never)
    assert error_.remedies == ()
    assert error_.remedy is None
    assert error_.hint == (
        f"none of the {len(tried)} changes that were tried helps, alone or two together; input side asks: a map before it"
    )
    assert 8 < len(tried) < 40
    assert len({(q.block, q.via, q.route) for q in tried}) == len(tried), "nothing is tried twice"
    assert all((q.block, q.via, q.route) != (block, "input-output", "scale") for q in tried), "nor taken back"


def test_trees_are_edited_where_it_was_asked():
    block = residual(rms_norm("pre") >> Mixture(router, Routing(1), experts_up >> silu, experts_down)) >> silu
    for path in ((), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 1), (0, 1, 2, 1, 0), (1,)):
        changed = with_node(block, path, tanh)
        assert changed is not None
        assert len([*nodes(changed)]) < len([*nodes(block)]) + 1
        node = changed
        for index in path:
            node = node.children()[index]
        assert node == tanh
    assert width_after(block, (0, 1, 2, 1)) == "h"
    assert width_after(block, (0, 1, 2)) == "d"
    assert last_norm(block) == (0, 1, 1)
    assert fresh(block, "pre.weight") == "pre.weight_2"


class Twofold(ct.Component):
    """f(x) + f(x), by somebody who does not write dataclasses: it cannot be rebuilt from its parts."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, params, x):
        return 2 * self.inner(params, x)

    def children(self):
        return (self.inner,)

    def describe(self):
        return f"twofold ({self.inner.describe()})"


def test_a_combinator_that_cannot_be_rebuilt_is_left_alone():
    block = residual(square >> Twofold(silu >> tanh))
    assert with_node(block, (1, 1, 0, 1), relu) is None
    assert replace_param(Twofold(square), Param("up"), Param("new")) is None
    error_ = refused(block)
    assert error_.culprit == "twofold (activation silu >> activation tanh)"
    assert error_.remedy.change == "add a bias after twofold (activation silu >> activation tanh)"


# ------------------------------------------------------------------------------------------- the culprit is minimal
def ways(failure: Failure) -> list[list[tuple[Place, str]]]:
    """The premises that the failed rule asks for at a place: one list for each way in which it may apply."""
    place, rule = failure.place, failure.rule
    parts, count = place.parts(), len(place.parts())
    if rule in ("O-after-fixed", "I-before"):
        return [[(parts[-1], failure.side)]]
    if rule == "I-after":
        return [[(place.slice(0, count - 1), "input")]]
    if rule == "I-combine":
        return [[(part, "input") for part in parts]]
    if rule in ("O-sum", "O-factor"):
        return [[(part, "output")] for part in parts]
    if rule == "T-sum":
        return [[(part, "through")] for part in parts]
    if rule in ("I-mixture", "T-mixture"):
        return [[(parts[0], "input"), (parts[1], "input")]]
    if rule == "T-before":
        return [[(place.slice(1, count), "through")]]
    if rule in ("O-through-bijection", "O-times", "O-normalised"):
        return [[(place.slice(0, stop), failure.side)] for stop in range(1, count)]
    branches = [place] if isinstance(place.component, Sequence) else [p for p in parts if p.component.children()]
    found = [[(branch, "through")] for branch in branches if branch != place]
    for branch in branches:
        stop = len(branch.component.children())
        if isinstance(branch.component, Sequence):
            found += [[(branch.slice(0, i), "input"), (branch.slice(i, stop), "output")] for i in range(1, stop)]
    return found


def minimal(failure: Failure, prover: Prover) -> str:
    """How the place of a failure fails while everything below it passes; an AssertionError if it does not."""
    component = failure.place.component
    if failure.rule in ("O-mixture", "T-mixture") and not isinstance(component, Mixture):
        assert not isinstance(component, ExpertLinear) or failure.weight > 0  # frozen, or crowded by rows
        return "experts' last map"
    assert not prover.attempt(failure.place, failure.side).steps, "it passes"
    if not component.children():
        return "leaf"
    if not component.parameters() and all(isinstance(c, Identity) for c in component.children()):
        return "nothing to steer"
    if failure.rule == "O-mixture":
        assert isinstance(component.last, ExpertLinear)
        return "together"
    assert any(all(prover.attempt(p, side).steps for p, side in way) for way in ways(failure)), "a part fails as well"
    return "together"


def drawn(seed: int):
    rng = random.Random(seed)
    grower = Grower(rng)
    block = grower.block(rng.randint(1, 4))
    frozen = frozenset(name for name in grower.values if rng.random() < 0.15)
    via = rng.choice(("input-output", "output"))
    route = rng.choice(("auto", "auto", "scale", "secular", "uniform", "ball"))
    return grower, block, {"via": via, "route": route, "frozen": frozen & {p.name for p in block.parameters()}}


def test_culprits_are_minimal_and_remedies_prove_on_random_trees():
    counts: Counter[str] = Counter()
    for seed in range(300):
        grower, block, options = drawn(seed)
        try:
            ct.prove(block, **options)
            continue
        except ct.NotControllable as refusal_:
            error_ = refusal_
        prover = Prover(block, *options.values())
        failures = explained(prover.attempt(Place(block), "input").failures, block, prover)
        shown = f"seed {seed} {options}: {block.describe()}\n{error_}"
        try:
            counts[minimal(failures[0], prover)] += 1
        except AssertionError as wrong:
            raise AssertionError(f"{shown}\n{failures[0]}") from wrong
        assert error_.culprit == failures[0].place.describe()
        assert any(error_.culprit in part.describe() for part in nodes(block)), shown  # the user's own names
        counts["remedies"] += len(error_.remedies)
        for remedy in error_.remedies:
            counts[executed(remedy, grower.values, seed)] += 1
    assert counts["leaf"] >= 60
    assert counts["together"] >= 10
    assert counts["remedies"] >= 100
    assert counts["patched"] >= 60
    assert counts["patched"] + counts["condition"] == counts["remedies"]


def executed(remedy: Remedy, values: dict[str, np.ndarray], seed: int) -> str:
    """Whether the remedy's proof patches random numbers, or a side condition fails on them."""
    proof = ct.prove(remedy.block, **remedy.options)
    rng = np.random.default_rng(seed)
    params = dict(values)
    for p in sorted(remedy.block.parameters(), key=str):
        if p.name not in params:
            unknown = (D, D) if "weight" in p.name else (D,)  # a block of activations does not say how wide it is
            params[p.name] = rng.normal(size=p.shape or unknown)
    inputs = 1 + max((part.index for part in nodes(remedy.block) if isinstance(part, Select)), default=0)
    states = rng.normal(size=(2, inputs, 2, D))
    v, v_target = (tuple(run) if inputs > 1 else run[0] for run in states)
    try:
        patched = proof.construct(params, v, v_target).applied_to(params)
    except ct.SideConditionFailed:
        return "condition"
    difference = np.abs(remedy.block(patched, v) - remedy.block(params, v_target)).max()
    assert difference / (1 + np.abs(remedy.block(params, v_target)).max()) < 1e-5, f"seed {seed}: {remedy}"
    return "patched"


def test_the_judge_of_culprits_notices_one_that_is_too_large():
    block = residual(rms_norm("pre") >> up >> tanh)
    prover = Prover(block, "input-output", "auto", frozenset())
    branch = Place(block).parts()[1]
    with pytest.raises(AssertionError, match="a part fails as well"):
        minimal(Failure(branch, "O-after-fixed", "", "", side="output"), prover)
    with pytest.raises(AssertionError, match="it passes"):
        minimal(Failure(branch.slice(2, 3), "O-linear", "", "", side="output"), prover)


@pytest.mark.parametrize("name", ["deepseek_v3", "zaya", "beam", "cohere2_moe", "axk1"])
def test_the_largest_refusals_take_less_than_half_a_second(name):
    block = architectures.block(name)
    frozen = sorted(p.name for p in block.parameters())
    started = time.process_time()
    error_ = refused(block, frozen=frozen)
    assert time.process_time() - started < 0.5
    assert error_.remedies


# ------------------------------------------------------------------- conditions that fail on numbers: whole messages
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
        "  hint:  take route='auto' or 'uniform': they do not divide by the activations of the norm",
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
        "  hint:  with the scale as it is only targets with mean((G/m)²) < 1 are reached: take route='auto' or 'uniform', which move a scale after the norm",
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


def test_every_condition_that_proofs_have_is_in_the_table_and_has_a_hint():
    """A condition that is added needs a hint and a row above."""
    told = {"the patched router chooses the experts of the target run"}  # tested above
    for block, *_, message in CONDITIONS.values():
        told.add(bare(block, message.partition("\n")[0].partition(": ")[2].partition(" (margin")[0]))
    blocks = {name: architectures.block(name) for name in architectures.names() if name not in REFUSED}
    blocks |= {f"seed {seed}": drawn(seed)[1] for seed in range(100)}
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


# -------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("form", ["text", "latex"])
def test_families_that_are_refused_by_reading_say_why_on_the_command_line(capsys, name, form):
    said = architectures.find(name).refusal
    assert said is not None
    assert main(["prove", name, "--format", form]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        f"controllability: architecture {name}: not controllable\n"
        f"  culprit: {name}: {said.culprit}\n  reason:  {said.reason}\n  hint:    {said.hint}\n"
    )
    assert said.culprit and said.reason and said.hint


def test_blocks_that_the_prover_refuses_say_why_on_the_command_line(capsys):
    import json

    @architectures.register("tanhfish", layer_class="TanhFish")
    def tanhfish(view):
        return residual(rms_norm("pre") >> up >> tanh)

    try:
        assert main(["prove", "tanhfish"]) == 1
        _, _, message = REFUSALS["ends in tanh"]
        assert capsys.readouterr().err == f"controllability: {message}\n"
        assert main(["prove", "tanhfish", "--json"]) == 1
        data = json.loads(capsys.readouterr().out)
        assert [data[key] for key in ("name", "verdict", "culprit")] == ["tanhfish", "refused", "activation tanh"]
        assert f"reason:  {data['reason']}\n" in message
        assert f"hint:    {data['hint']}" in message
        assert main(["prove", "tanhfish", "--via", "output"]) == 1
        assert "prove via output, route auto: not controllable" in capsys.readouterr().err
    finally:
        architectures.unregister("tanhfish")
