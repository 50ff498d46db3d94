"""Refusals teach: the smallest culprit, the rule and its arguments, a change that has a proof.  Whole messages are pinned,
here and on the command line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from helpers import error
from refused_blocks import down, linear, nodes, refused, relu, silu, tanh, up

import architectures
import controllability as ct
from controllability.cli.main import main
from controllability.components import (
    ExpertLinear,
    Linear,
    Mixture,
    Normalize,
    Product,
    Routing,
    Select,
    Sequence,
    Share,
    SoftCap,
    Sum,
    layer_norm,
    residual,
    rms_norm,
)
from controllability.interfaces import Param, Place
from controllability.prover.edits import fresh, last_norm, replace_param, width_after, with_node
from controllability.prover.explain import refusal
from controllability.prover.remedies import Remedy
from controllability.prover.search import Prover
from controllability.rules import Attempt, Failure

square, back = linear("up"), linear("down")
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
        "  hint:    add a bias after mystery mu (tried: it has a proof); if it can be steered, implement output_updates in its class",
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


# -------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("name", ["mamba", "zamba", "rwkv", "reformer"])
@pytest.mark.parametrize("form", ["text", "latex"])
def test_a_place_that_a_family_does_not_have_is_refused_with_its_reason_on_the_command_line(capsys, name, form):
    said = architectures.find(name).half_refused
    assert said is not None
    assert main(["prove", name, "--place", "feed-forward", "--format", form]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    text, _, page = shown.err.partition("\n  page:")
    assert page.strip().endswith(("refusals.md", "refusals.html#no-proof")) and page.count("\n") == 1
    assert words(text) == words(
        f"controllability: architecture {name}: not controllable"
        f"  culprit: {name}: {said.culprit}  reason:  {said.reason}  hint:    {said.hint}"
    )
    assert max(map(len, text.splitlines())) <= 100  # the lines are broken to fit a terminal
    assert said.culprit and said.reason and said.hint


def words(text: str) -> list[str]:
    return text.split()


def test_blocks_that_the_prover_refuses_say_why_on_the_command_line(capsys):
    import json

    @architectures.register("tanhfish", layer_class="TanhFish")
    def tanhfish(view):
        return residual(rms_norm("pre") >> up >> tanh)

    try:
        assert main(["prove", "tanhfish"]) == 1
        _, _, message = REFUSALS["ends in tanh"]
        assert words(capsys.readouterr().err.partition("\n  page:")[0]) == words(f"controllability: {message}")
        assert main(["prove", "tanhfish", "--json"]) == 1
        data = json.loads(capsys.readouterr().out)
        assert [data[key] for key in ("name", "verdict", "culprit")] == ["tanhfish", "refused", "activation tanh"]
        assert f"reason:  {data['reason']}\n" in message
        assert f"hint:    {data['hint']}" in message
        assert main(["prove", "tanhfish", "--via", "output"]) == 1
        assert "prove via output, route auto: not controllable" in capsys.readouterr().err
    finally:
        architectures.unregister("tanhfish")
