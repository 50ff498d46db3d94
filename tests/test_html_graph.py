"""The graph of a page: boxes lie apart, and colours and frames say what moves and what the derivation cuts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from pages import Page, checked, down, representative_names

import architectures
import controllability as ct
from controllability.components import Activation, Linear, Sum
from controllability.interfaces import Param, leaves
from controllability.prover.search import Via
from controllability.rendering import graph
from controllability.rendering.css import STATES
from controllability.rendering.graph import draw
from controllability.rendering.html import proof_html
from controllability.rendering.leaf_states import roles
from controllability.rendering.svg import Box, Junction

representatives = pytest.fixture(scope="module")(representative_names)


def laid_out(name: str, via: Via = "input-output") -> None:
    """Boxes and circles lie apart, and inside the picture."""
    block = architectures.block(name)
    whole = draw(block, roles(ct.prove(block, via)))
    boxes = [s for s in whole.shapes if isinstance(s, Box)]
    rings = [Box(s.x - 13, s.y - 13, 26, 26, s.path, "", s.title, ()) for s in whole.shapes if isinstance(s, Junction)]
    for a, b in combinations([*boxes, *rings], 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart, f"{name}: {a.title} lies on {b.title}"
    for box in boxes:
        stack = 6 * box.stacked
        assert box.x >= 0
        assert box.y >= max(8, stack), "a label stands on the upper border"
        assert box.x + box.width + stack <= whole.width
        assert box.y + box.height <= whole.height


@pytest.mark.parametrize("via", ["input-output", "output"])
def test_nothing_overlaps_and_nothing_is_cut_off(representatives, via):
    for name in representatives:
        laid_out(name, via)


@pytest.mark.parametrize("wrong", ["LANE", "GAP"])
def test_a_wrong_layout_is_noticed(monkeypatch, wrong):
    monkeypatch.setattr(graph, wrong, -40.0)
    with pytest.raises(AssertionError, match="lies on"):
        laid_out("deepseek_v3")


@pytest.mark.parametrize("via", ["input-output", "output"])
def test_the_colours_tell_the_truth_about_every_leaf(representatives, via):
    """What the page calls moved is what moves, and nothing else."""
    for name in representatives:
        block = architectures.block(name)
        proof = ct.prove(block, via)
        found = roles(proof)
        assert [*found.states] == [path for path, _ in leaves(block)]
        moved = set()
        for path, leaf in leaves(block):
            own = set(map(str, leaf.own_parameters()))
            touched = own & set(map(str, proof.root.moved))
            assert (found.states[path] in ("input", "output", "shared")) == bool(touched), (name, leaf.describe())
            moved |= touched if found.states[path] != "shared" else set()
        assert moved == set(map(str, proof.root.moved))
        if via == "output":
            weighs = "I-self-weighted" in proof.rules  # its weights are steered on the input side by either theorem
            assert weighs or "input" not in found.states.values()


@pytest.mark.parametrize("name", ["gemma3", "llama", "gptj", "bert", "mixtral", "deepseek_v3"])
def test_input_side_leaves_give_what_the_target_gave_and_output_side_leaves_do_not(name):
    """The colours against numbers: the patched run's values at each leaf."""
    block = architectures.block(name)
    proof = ct.prove(block)
    params, v, v_target = ct.sample(block, tokens=(3,), seed=1)
    patch = proof.construct(params, v, v_target)
    runs = [ct.Trace(block, p, x) for p, x in ((patch.applied_to(params), v), (params, v_target))]
    for path, state in roles(proof).states.items():
        here, there = (np.asarray(run.output(path)) for run in runs)
        gap = np.abs(here - there).max() / np.abs(there).max()
        if state == "input":
            assert gap < 1e-11, path
        if state == "output":
            assert gap > 1e-3, path


def test_the_states_of_gemma_by_hand():
    block = architectures.block("gemma3")
    found = {leaf.describe(): roles(ct.prove(block)).states[path] for path, leaf in leaves(block)}
    assert found == {
        "identity": "fixed",
        "normalise (rms) pre_feedforward_layernorm": "fixed",
        "scale pre_feedforward_layernorm.weight": "own",
        "linear mlp.gate_proj.weight": "input",
        "activation gelu_tanh": "fixed",
        "linear mlp.up_proj.weight": "input",
        "linear mlp.down_proj.weight": "output",
        "normalise (rms) post_feedforward_layernorm": "undone",
        "scale post_feedforward_layernorm.weight": "output",
    }
    ball = roles(ct.prove(block, route="ball")).states
    assert [ball[path] for path in ((1, 4), (1, 5))] == ["undone", "undone"]
    frozen = ct.prove(block, frozen=["mlp.gate_proj.weight", "mlp.up_proj.weight"])
    assert roles(frozen).states[(1, 2, 1)] == "own"
    assert "Asked to stay: mlp.gate_proj.weight, mlp.up_proj.weight." in Page(proof_html(frozen, "gemma3")).text


def test_a_skip_that_reads_a_moved_parameter_is_said_to():
    mix = Linear(Param("mix", ("d", "d")))
    block = Sum((mix, mix >> Activation("silu") >> down))
    proof = ct.prove(block)
    assert set(map(str, proof.root.moved)) == {"mix", "mlp.down.weight"}
    assert [*roles(proof).states.values()] == ["shared", "input", "fixed", "output"]
    checked(proof_html(proof, "mine"), block)


def test_frames_and_cuts_are_those_of_the_derivation():
    proof = ct.prove(architectures.block("deepseek_v3"))
    found = roles(proof)
    assert [(s.path, s.start, s.stop) for s in found.spans] == [((1, 2), 0, 0), ((1, 2, 1), 0, 2)]
    assert found.cuts == {((1, 2, 1), 1)}
    assert roles(ct.prove(architectures.block("gemma3"))).cuts == {((1,), 3)}
    text = proof_html(proof, "deepseek_v3")
    assert text.count('class="frame through"') == 2
    assert text.count('class="cut"') == 1


def contrast(one: str, two: str) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2)."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(two)))
    return (high + 0.05) / (low + 0.05)


def test_good_contrast_and_no_state_by_colour_alone():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for fill, line, *_ in STATES.values():
        assert contrast(fill, "#1c2128") >= 7
        assert contrast("#ffffff", line) >= 4.5 or line == "#767d86"  # that one has no label
        assert contrast("#fcfcfd", line) >= 3
    from controllability.rendering.leaf_states import WORDS

    labels = [label for label, _ in WORDS.values()]
    assert len(labels) == len(set(labels))
