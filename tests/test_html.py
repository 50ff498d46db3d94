"""Pages of proofs and refusals: every leaf once, every link with its target, nothing from outside, nothing overstated."""

from __future__ import annotations

import json
import re
import time
from html import escape
from xml.etree import ElementTree

import pytest
from pages import Page, checked, down, gate, refused, representative_names, up

import architectures
import controllability as ct
from controllability import checks
from controllability.cli.main import main
from controllability.components import Activation, Bias, Linear, Normalize, Times, gated, residual, rms_norm
from controllability.errors import BadInput, NotControllable
from controllability.interfaces import Param
from controllability.rendering.html import proof_html, refusal_html
from controllability.rendering.leaf_states import refused_roles

representatives = pytest.fixture(scope="module")(representative_names)


def test_every_shape_has_a_page_quickly(representatives):
    assert len(representatives) > 40
    spent = 0.0
    for name in representatives:
        block = architectures.block(name)
        proof = ct.prove(block)
        started = time.perf_counter()
        text = proof_html(proof, name)
        spent += time.perf_counter() - started
        page = checked(text, block)
        assert page.text.startswith(f"{name}: a perfect patch exists")
        for param in proof.root.moved:
            assert f"<code>{escape(str(param))}</code>" in text, param
        for condition in proof.conditions:
            assert escape(condition.statement) in text
        tree = text[text.index('id="derivation"') :]
        assert tree.count("<details") == sum(1 for _ in proof.root.walk())
    assert spent < 10


@pytest.mark.parametrize(
    ("level", "results", "expected"),
    [
        ("derived", ["passed"], "derived"),
        ("symbolic", ["passed", "passed"], "symbolic"),
        ("exact", ["passed"], "exact"),
        ("numeric", ["passed"], "numeric"),
        ("symbolic", ["passed", "skipped"], "derived"),
        ("symbolic", ["skipped", "passed"], "derived"),
        ("exact", ["failed"], "derived"),
        ("symbolic", ["failed", "passed"], "derived"),
    ],
)
def test_no_stronger_word_than_was_run(level, results, expected):
    found = [{"rule": f"rule {i}", "status": s, "method": f"method <{i}>"} for i, s in enumerate(results)]
    page = Page(text := proof_html(ct.prove(architectures.block("llama")), "llama", level, found))
    words = {name: said.partition(":")[0] for name, said in checks.SAID.items()}
    assert [name for name, word in words.items() if word in page.text] == [expected]
    assert ("What is marked as skipped was not shown" in text) == ("skipped" in results)
    assert ("do not trust this proof" in text) == ("failed" in results)
    assert ("a perfect patch exists" in text) == ("failed" not in results)
    for row in found:
        assert f"{row['rule']} {row['status']} {row['method']}" in page.text


def test_the_levels_are_those_that_can_be_run():
    assert tuple(checks.SAID) == checks.LEVELS
    with pytest.raises(BadInput, match="unknown level 'certain'"):
        proof_html(ct.prove(architectures.block("llama")), "llama", "certain")


def test_everything_is_escaped():
    bad = '<script>alert("1")</script>&\'"><b onclick=x>'
    block = residual(
        Linear(Param(bad + ".weight", ("h", "d"))) >> Activation("silu") >> Linear(Param("down", ("d", "h")))
    )
    row = {"rule": bad, "status": "passed", "method": bad}
    page = checked(proof_html(ct.prove(block), bad, "numeric", [row]), block)
    assert page.tags["script"] == 0
    assert page.text.startswith(f"{bad}: a perfect patch exists")
    ends = block.terms[1] >> Activation("tanh")
    error = refused(residual(ends))
    error.reason, error.hint = bad, bad
    assert Page(refusal_html(bad, residual(ends), error)).text.count(bad) >= 3


def test_a_long_list_of_look_alikes_keeps_names_apart():
    long = (
        "model.language_model.decoder.layers.feed_forward_networks.{}.the_very_long_name_of_an_inner_projection.weight"
    )
    one, two = (Linear(Param(long.format(i))) for i in "ab")
    block = residual(gated(one, two, Activation("silu")) >> down)
    text = proof_html(ct.prove(block), "mine")
    checked(text, block)
    nodes = [n for n in re.findall(r"<a .*?</a>", text) if 'class="name"' in n]
    shown = ["".join(re.findall(r'<text class="name"[^>]*>([^<]*)<', node)) for node in nodes]
    assert len(shown) == len(set(shown)) == 3


def test_a_refusal_marks_the_culprit():
    block = residual(rms_norm("norm") >> gated(gate, up, Activation("silu")) >> down >> Activation("tanh"))
    error = refused(block)
    text = refusal_html("mine", block, error)
    page = checked(text, block)
    assert page.text.startswith("mine: refused No derivation was found")
    assert page.svg is not None
    assert page.text.count(error.reason) == page.text.count(error.hint) == 2  # in the head and in its panel
    marked = [a.get("href") for a in page.svg.iter("{http://www.w3.org/2000/svg}a") if "culprit" in a.get("class", "")]
    assert marked == ["#node-1-4"]
    assert "exists" not in page.text.replace("not a proof that none exists", "")


def test_a_culprit_with_parts_gets_a_frame_and_several_are_said():
    middle = Activation("silu") >> Activation("gelu")
    block = residual(up >> middle >> down >> middle)
    inner = refused_roles(block, middle.describe())
    assert [(s.path, s.start, s.stop) for s in inner.spans] == [((1,), 1, 3), ((1,), 4, 6)]
    error = NotControllable(middle.describe(), "a reason", "a hint")
    text = refusal_html("mine", block, error)
    checked(text, block)
    assert "Several parts have this description" in text
    product = gated(gate, up, Activation("silu"))
    block = residual(product >> down)
    text = refusal_html("mine", block, NotControllable(product.describe(), "a reason", "a hint"))
    checked(text, block)
    assert text.count('class="frame culprit"') == 1
    assert "Several parts" not in text
    assert Page(text).text.count("a reason") == 2


def test_the_command_prints_both(capsys):
    assert main(["prove", "gemma3", "--level", "numeric", "--format", "html"]) == 0
    page = checked(capsys.readouterr().out, architectures.block("gemma3"))
    assert "Checked numerically" in page.text
    assert "whole block passed residual" in page.text
    assert main(["prove", "rwkv", "--place", "feed-forward", "--format", "html"]) == 1
    out, err = capsys.readouterr()
    page = Page(out)
    assert page.text.startswith("rwkv: refused")
    assert "token shift" in page.text
    assert page.svg is None
    assert err == ""
    assert main(["prove", "rwkv", "--place", "feed-forward", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "refused"


def test_a_refusal_of_a_registered_block_has_a_graph(capsys):
    @architectures.register("ends-in-tanh", layer_class="TanhLayer")
    def build(view):
        return residual(up >> Activation("tanh"))

    try:
        assert main(["prove", "ends-in-tanh", "--format", "html"]) == 1
        page = checked(capsys.readouterr().out, residual(up >> Activation("tanh")))
        assert "activation tanh" in page.text
    finally:
        architectures.unregister("ends-in-tanh")


BREAK = {
    "a panel is lost": lambda t: t.replace('id="node-1-2-1"', ""),
    "an id twice": lambda t: t.replace('id="node-1-2-1"', 'id="node-1-1"'),
    "a leaf is drawn twice": lambda t: re.sub(r'(<a class="node input".*?</a>)', r"\1\1", t, count=1),
    "a leaf is not drawn": lambda t: re.sub(r'<a class="node output".*?</a>', "", t, count=1),
    "an open tag": lambda t: t.replace("</section>", "", 1),
    "a tag in the graph closed wrongly": lambda t: t.replace("</text>", "</tspan>", 1),
    "a font from outside": lambda t: t.replace("</style>", "@import 'x.css'</style>"),
    "a picture from outside": lambda t: t.replace("</main>", "<p>https://example.org</p></main>"),
    "a script": lambda t: t.replace("</main>", "<script>1</script></main>"),
    "a handler": lambda t: t.replace("<main>", '<main onclick="x()">'),
}


@pytest.mark.parametrize("broken", BREAK)
def test_a_broken_page_is_noticed(broken):
    block = architectures.block("llama")
    text = proof_html(ct.prove(block), "llama")
    checked(text, block)
    changed = BREAK[broken](text)
    assert changed != text
    with pytest.raises((AssertionError, ElementTree.ParseError)):
        checked(changed, block)


def test_blocks_of_one_column_have_a_page():
    for block in (residual(up >> Times(2) >> down), residual(up >> down >> Bias(Param("b", ("d",))) >> Normalize())):
        checked(proof_html(ct.prove(block), "mine"), block)
