"""The explorable's own scripts, in node, beside the package: the same numbers, refusals and limits."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from explorable_page import DRIVER, MAPS, NODE, ROUTES, built, cases, in_browser, in_node, in_python, part
from test_html_browser import needs_browser

import architectures
import controllability as ct
from controllability.interfaces import leaves
from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.joint_scale import joint_scale

pytestmark = pytest.mark.site

needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
CASES = cases()
EXACT = 1e-12


@pytest.fixture(scope="module")
def exact_model():
    return ct.load_model("embedded", dtype="float64")


@pytest.fixture(scope="module")
def packages(exact_model):
    """The package's own answers, each computed once."""
    return cache(lambda i: in_python(*exact_model, CASES[i]))


@pytest.fixture(
    scope="module", params=[pytest.param(in_node, marks=needs_node), pytest.param(in_browser, marks=needs_browser)]
)
def answers(request, tmp_path_factory):
    """The page's answers, by node and by a browser."""
    return request.param(tmp_path_factory.mktemp("explorable"), CASES)


def apart(found, wanted) -> float:
    found, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (found, wanted))
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def differences(found: dict, wanted: dict, case: dict) -> dict[str, float]:
    """The relative difference of every number that both have."""
    out = {f"logits {name}": apart(found["logits"][name], value) for name, value in wanted["logits"].items()}
    for run, layers in wanted["nodes"].items():
        for i, nodes in enumerate(layers):
            out |= {f"{run} {i} {path}": apart(found["nodes"][run][i][path], value) for path, value in nodes.items()}
    for i, layer in enumerate(wanted.get("report", ())):
        mine = found["report"][i]
        if case["route"] == "scale":
            assert mine["amplification"] is None  # the package then tells the condition of a sum, the page nothing
        else:
            out[f"amplification {i}"] = apart([mine["amplification"]], [layer.amplification])
        out[f"spread {i}"] = apart([found["spread"][i]], [wanted["spread"][i]])
        for margin in layer.margins:
            (name,) = (name for name, where in MAPS.items() if where in margin["where"])
            if margin["margin"] is not None:
                out[f"margin {i} {name}"] = apart([mine["margins"][name]], [margin["margin"]])
    return out | sizes(found, wanted)


def sizes(found: dict, wanted: dict) -> dict[str, float]:
    """The same of the changes' sizes: every parameter that the package moves, and none besides."""
    out, moved = {}, set()
    for row in wanted.get("sizes", ()):
        (name,) = (name for name, where in MAPS.items() if where in row["parameter"])
        mine = found["sizes"][row["layer"]][name]
        moved.add((row["layer"], name))
        out[f"size {row['layer']} {name}"] = apart([mine["norm"]], [row["norm"]])
        out[f"relative size {row['layer']} {name}"] = apart([mine["relative"]], [row["relative_norm"]])
    mine = {(i, name) for i, layer in enumerate(found.get("sizes", ())) for name in layer if layer[name]["norm"]}
    assert mine == moved
    return out


def magnified(case: dict, wanted: dict) -> float:
    """What the route does to a rounding error: "scale" divides by small activations, and its Δm/m says how small."""
    if case["route"] != "scale":
        return 1.0
    return max(row["relative_norm"] for row in wanted["sizes"] if MAPS["scale"] in row["parameter"])


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i]['route']}-{CASES[i]['via']}")
def test_the_numbers_are_the_packages(exact_model, packages, answers, i):
    case, found, wanted = CASES[i], answers[i], packages(i)
    assert found["ids"] == wanted["ids"]
    off = differences(found, wanted, case)
    if "refused" in wanted:
        assert case["route"] == "ball"
        assert abs(found["refused"]["margin"] / wanted["refused"].margin - 1) < 1e-10  # 1 − mean(u²) cancels
        assert f"in layer {wanted['refused'].layer + 1} " in found["refused"]["message"]
    else:
        assert "refused" not in found
        assert apart(found["logits"]["sweep"], wanted["logits"]["target"][-1]) < EXACT
        assert apart(found["logits"]["patched"][-1], wanted["logits"]["target"][-1]) < EXACT
    bound = EXACT * magnified(case, wanted)
    assert {name: value for name, value in off.items() if value > bound} == {}
    if "joint" in wanted:
        joint(found["joint"], wanted["joint"], exact_model[0])


def joint(found: dict, wanted: dict, model) -> None:
    """One patch for several questions: the same logits, the same first maps, the same least cost of the scale.

    The cost is flat at its minimum, and the package's solver ends where it is flat: the scales themselves agree to half as many
    digits.  So does what enters the norm, √(ε/(1 − p)), where 1 − p cancels.
    """
    assert set(wanted["routes"]) == {"kept rms"}
    for mine, patched, target in zip(found["logits"], wanted["logits"], wanted["target"], strict=True):
        assert max(apart(mine, patched), apart(mine, target)) < EXACT
    off = sizes(found, wanted)
    assert {
        name: value for name, value in off.items() if value > (EXACT if name.endswith(("gate", "up")) else 1e-6)
    } == {}
    for i, (mine, theirs) in enumerate(zip(found["scales"], wanted["scales"], strict=True)):
        m = 1 + model.model.layers[i].post_feedforward_layernorm.weight.detach()
        costs = [
            float((m.abs() * (s**2 + 0.01 / s**2)).sum())
            for s in ((torch.as_tensor(x, dtype=m.dtype) + m) / m for x in (mine, theirs))
        ]
        assert abs(costs[0] / costs[1] - 1) < EXACT
        assert apart(mine, theirs) < 1e-6


@needs_node
def test_a_small_difference_of_epsilon_is_seen(exact_model, tmp_path):
    """The comparison can fail: an ε that is off by a thousandth, 1e-9 in all, is seen."""
    data = part("data").replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.001e-06')
    assert data != part("data")
    (found,) = in_node(tmp_path, CASES[1:2], data)
    off = differences(found, in_python(*exact_model, CASES[1]), CASES[1])
    assert off["logits target"] > EXACT and off["size 1 down"] > EXACT


def run_script(tmp_path, script: str):
    """What an expression gives behind the page's scripts, in node."""
    file = tmp_path / "script.js"
    file.write_text(
        f"{part('core')}\n{DRIVER}\nconst data = {part('data')};\nconsole.log(JSON.stringify({script}));",
        encoding="utf-8",
    )
    return json.loads(subprocess.run([NODE, str(file)], check=True, timeout=120, capture_output=True, text=True).stdout)


@needs_node
def test_a_scale_that_does_not_exist_is_refused_and_one_that_does_is_the_packages(tmp_path):
    m, q = np.array([0.5, -2.0, 1.0, 3.0]), np.array([1.0, 4.0])
    good = np.array([[3.0, 1.0, 2.0, 1.0], [1.0, 2.0, 2.0, 5.0]])
    bad = np.array(
        [[1.0, 2.0, 3.0, 1.0], [2.0, 4.0, 6.0, 2.1]]
    )  # four times the first, but for a little: four times its size
    expected = joint_scale(good, m, q, 1e-6, keep_rms=True)
    with pytest.raises(Infeasible):
        joint_scale(bad, m, np.array([1.0, 0.1]), 1e-6, keep_rms=True)

    def ask(G, r2):
        rows = f"{json.dumps(G.tolist())}.map((row) => Float64Array.from(row))"
        call = f"jointScale({rows}, Float64Array.from({m.tolist()}), {json.dumps([float(x) for x in r2])}, 1e-6)"
        return run_script(
            tmp_path,
            f"(() => {{ try {{ const f = {call}; return [Array.from(f.scale), f.before.map((y) => Array.from(y))]; }} catch (e) {{ return e.message; }} }})()",
        )

    scale, before = ask(good, q)
    assert apart(scale, expected.scale) < 1e-7
    y = np.array(before)
    assert np.allclose(np.array(scale) * y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6), good, rtol=1e-12)
    assert ask(bad, [1.0, 0.1]).startswith("no norm scale serves all 2 tokens")


BAD = {
    "unknown": ("mia lives in Berlin .", "Where does Leo live ?", "does not know “mia” (did you mean “Mia”?), “Berlin”"),
    "special": ("<eos> Mia lives in Oslo .", "Where does Mia live ?", "“<eos>”"),
    "prototype": ("constructor lives in Oslo .", "Where does Mia live ?", "“constructor”"),
    "no facts": ("  \n ", "Where does Mia live ?", "There are no facts yet"),
    "no question": ("Mia lives in Oslo .", " ", "There is no question yet"),
    "nobody": ("Mia lives in Oslo .", "Where does ?", "The question names nobody. Ask about one person, for example: Where does Mia live ?"),
    "too long": ("Mia lives in Oslo . " * 51, "Where does Mia live ?", "are 261 tokens, and this model has room for 256. Take away 5"),
}  # fmt: skip


@needs_node
def test_bad_texts_are_refused_in_a_sentence_and_unusual_ones_noted(tmp_path):
    asked = [[context, question] for context, question, _ in BAD.values()]
    told = run_script(tmp_path, f"{json.dumps(asked)}.map((texts) => readTexts(data, ...texts).problems)")
    for (name, (*_, sentence)), problems in zip(BAD.items(), told, strict=True):
        assert len(problems) == 1 and sentence in problems[0], (name, problems)
    fits = "Mia lives in Oslo . " * 50 + "Mia lives"
    asked = [
        ["Mia lives in Oslo.\nLeo has a cat.", "Where does Mia live?"],
        ["Mia lives in Oslo .", "Where does Leo live ?"],
        ["Mia lives in Oslo .", "Mia ?"],
        [fits, "Where does Mia"],
    ]
    told = run_script(
        tmp_path,
        f"{json.dumps(asked)}.map((texts) => {{ const r = readTexts(data, ...texts); return [r.problems, r.notes]; }})",
    )
    assert [problems for problems, _ in told] == [[], [], [], []]
    plain, stranger, odd, long = (notes for _, notes in told)
    assert plain == []  # full stops need no space before them
    assert "say nothing about Leo" in stranger[0]
    assert "not one of the eight ways of asking" in odd[0]
    assert "50 facts" in long[0]


@needs_node
def test_of_two_contradictory_facts_the_one_that_the_model_takes_is_named(exact_model, tmp_path):
    model, tokenizer = exact_model
    context = "Leo lives in Rome . Mia has a cat . Leo lives in Oslo . Mia has a cat ."
    (clash,) = run_script(
        tmp_path, f"contradictions(data, factsIn(data, wordsOf({json.dumps(context)})))"
    )  # said twice is none
    assert clash == {"name": "Leo", "relation": "city", "values": ["Rome", "Oslo"], "question": "Where does Leo live ?"}
    with torch.no_grad():
        target, _ = ct.encode(tokenizer, context, clash["question"])
        word = tokenizer.decode(model(**target).logits[0, -1].argmax())
    said = run_script(
        tmp_path,
        f"(() => {{ const r = readTexts(data, {json.dumps(context)}, 'Where does Leo live ?'); return wordOf(data, best(run(readModel(data), [...r.context, ...r.question]).logits.at(-1))); }})()",
    )
    assert said == word


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.ids += [value for name, value in attrs if name == "id"]


def test_the_page_is_one_small_file_that_asks_for_nothing(tmp_path):
    (file,) = built().build(tmp_path / "site")
    assert file == tmp_path / "site" / "explorable.html"
    assert file.stat().st_size <= 6_000_000
    text = file.read_text(encoding="utf-8")
    read = Links(text)
    assert {link for link in read.found if not link.startswith("#")} == {
        "data:,",
        "index.html",
        "lesson-3.html",
        "lesson-4.html",
    }
    assert len(read.ids) == len(set(read.ids))
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    assert not re.search(r"(?i)https?:|@import|url\((?!#)|\bfetch\(|XMLHttpRequest|WebSocket|importScripts", outside)
    assert set(ROUTES) == set(re.findall(r'<option value="(\w+)">', text)) - {"output"}
    for name in MAPS.values():
        assert name.rpartition(".")[2] in text


@needs_node
def test_every_box_of_the_graph_has_a_value_and_words(tmp_path):
    drawn = set(re.findall(r'<a class="node[^"]*" href="#node-?([\d-]*)"', built().graph_markup()))
    words = built().read("pictures.js")
    names = run_script(tmp_path, f"(() => {{ {words}\nreturn Object.keys(NODES); }})()")
    values = run_script(tmp_path, "Object.keys(run(readModel(data), [2, 4]).nodes[0][0])")
    inside = {"-".join(map(str, path)) for path, _ in leaves(architectures.block("gemma3"))}
    assert drawn == set(values) == set(names) == {*inside, "1-2", ""}
