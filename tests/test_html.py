"""Pages of proofs and refusals: every leaf once, every link with its target, nothing from outside, nothing overstated."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from html import escape, unescape
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest

import architectures
import controllability as ct
from controllability import catalogue, checks
from controllability.cli.main import main
from controllability.components import Activation, Bias, Linear, Normalize, Sum, Times, gated, residual, rms_norm
from controllability.errors import BadInput, NotControllable
from controllability.interfaces import Param
from controllability.prover import Via
from controllability.rendering import graph, html
from controllability.rendering.graph import draw
from controllability.rendering.html import proof_html, refusal_html
from controllability.rendering.roles import refused_roles, roles
from controllability.rendering.shapes import Box, Junction, node_id
from controllability.rendering.style import STATES, STYLE
from controllability.trace import leaves

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "hr", "img", "link", "input"}
BY_HAND = ("gemma3", "llama", "mixtral", "gptj", "deepseek_v3", "gpt_oss", "bert", "granitemoeshared", "dbrx")
up, gate, down = (Linear(Param(f"mlp.{n}.weight", s)) for n, s in (("up", ("h", "d")), ("gate", ("h", "d")), ("down", ("d", "h"))))  # fmt: skip


class Page(HTMLParser):
    """A page, read: raises at a tag that is closed wrongly; collects ids, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.svg = ElementTree.fromstring(found[0]) if (found := re.findall(r"<svg.*?</svg>", text, re.S)) else None
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.stack.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids[value or ""] += 1
            if name == "href":
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack[-1] == tag, f"</{tag}> closes <{self.stack[-1]}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        """Everything that is read, styles and tooltips aside."""
        return " ".join(" ".join(self.words).split())


def checked(text: str, block) -> Page:
    """The promises that every page with a graph makes."""
    page = Page(text)
    assert max(page.ids.values()) == 1, "an id is used twice"
    for link in page.links:
        assert link.startswith("#"), f"{link} leads out of the page"
        assert link[1:] in page.ids, f"{link} has no target"
    assert page.svg is not None
    drawn = Counter(a.get("href") for a in page.svg.iter("{http://www.w3.org/2000/svg}a"))
    for path, leaf in leaves(block):
        assert drawn[f"#{node_id(path)}"] == 1, f"{leaf.describe()} is drawn {drawn[f'#{node_id(path)}']} times"
    outside = re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", text)
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\((?!#)", outside), "something from outside"
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {a for a in page.attributes if a.startswith("on") or a in ("src", "style")}
    return page


def refused(block, **options) -> NotControllable:
    with pytest.raises(NotControllable) as error:
        ct.prove(block, **options)
    return error.value


@pytest.fixture(scope="module")
def representatives():
    """One family of each shape that has a proof, and those that are looked at by hand."""
    shapes = catalogue.shapes(catalogue.rows())
    names = [names[0] for (_, _, verdict, _), names in shapes.items() if verdict == "patchable"]
    return sorted({*names, *BY_HAND})


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
            assert "input" not in found.states.values()


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


@pytest.mark.parametrize(
    ("level", "results", "expected"),
    [
        ("derived", ["passed"], "derived"),
        ("symbolic", ["passed", "passed"], "symbolic"),
        ("exact", ["passed"], "exact"),
        ("numeric", ["passed"], "numeric"),
        ("symbolic", ["passed", "skipped"], "derived"),
        ("symbolic", ["skipped", "passed"], "symbolic"),
        ("exact", ["failed"], "derived"),
        ("symbolic", ["failed", "passed"], "derived"),
    ],
)
def test_no_stronger_word_than_was_run(level, results, expected):
    found = [{"rule": f"rule {i}", "status": s, "method": f"method <{i}>"} for i, s in enumerate(results)]
    page = Page(text := proof_html(ct.prove(architectures.block("llama")), "llama", level, found))
    words = {name: said.partition(":")[0] for name, said in html.SAID.items()}
    assert [name for name, word in words.items() if word in page.text] == [expected]
    assert ("What is marked as skipped was not shown" in text) == ("skipped" in results)
    assert ("do not trust this proof" in text) == ("failed" in results)
    assert ("a perfect patch exists" in text) == ("failed" not in results)
    for row in found:
        assert f"{row['rule']} {row['status']} {row['method']}" in page.text


def test_the_levels_are_those_that_can_be_run():
    assert tuple(html.SAID) == checks.LEVELS
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
    assert main(["prove", "rwkv", "--format", "html"]) == 1
    out, err = capsys.readouterr()
    page = Page(out)
    assert page.text.startswith("rwkv: refused")
    assert "token shift" in page.text
    assert page.svg is None
    assert err == ""
    assert main(["prove", "rwkv", "--format", "html", "--json"]) == 1
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
    from controllability.rendering.roles import WORDS

    labels = [label for label, _ in WORDS.values()]
    assert len(labels) == len(set(labels))


# ---- with a browser, where one is installed

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
ASK = """<script>addEventListener("load", () => {
const shown = e => getComputedStyle(e).display !== "none" && e.getBoundingClientRect().height > 0;
const out = {panels: [...document.querySelectorAll(".panel")].filter(shown).map(e => e.id),
  hint: [...document.querySelectorAll(".hint")].filter(shown).length,
  wide: document.documentElement.scrollWidth - innerWidth, spills: []};
for (const a of document.querySelectorAll("svg a.node")) {
  const r = a.querySelector(".body").getBoundingClientRect();
  for (const t of a.querySelectorAll("text:not(.badge)")) { const b = t.getBoundingClientRect();
    if (b.left < r.left + 1 || b.right > r.right - 1 || b.top < r.top - 1 || b.bottom > r.bottom + 1) out.spills.push(t.textContent); }
  const p = a.querySelector(".pill"), w = a.querySelector(".badge");
  if (p) { const r = p.getBoundingClientRect(), b = w.getBoundingClientRect();
    if (b.left < r.left + 1 || b.right > r.right - 1) out.spills.push(w.textContent); } }
const first = document.querySelector("svg a.node.input");
if (first) { first.focus(); out.focus = document.activeElement === first; first.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true})); out.hash = location.hash;
  out.after = [...document.querySelectorAll(".panel")].filter(shown).map(e => e.id); }
document.body.dataset.out = JSON.stringify(out);
});
</script>"""


def browse(tmp_path, text: str, *options: str, at: str = "") -> str:
    """What the browser prints for a page."""
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    assert CHROMIUM is not None
    profile = tmp_path / f"profile-{time.monotonic_ns()}"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *options, f"{file.as_uri()}{at}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def asked(tmp_path, text: str, width: int, at: str = "") -> dict:
    """The answers of ``ASK``, a script that only the test adds."""
    seen = browse(
        tmp_path, text.replace("</body>", ASK + "</body>"), "--dump-dom", f"--window-size={width},1600", at=at
    )
    found = re.search(r'data-out="([^"]*)"', seen)
    assert found
    return json.loads(unescape(found[1]))


@needs_browser
@pytest.mark.parametrize("width", [1300, 700])
def test_a_link_opens_its_panel_and_the_page_does_not_scroll_sideways(tmp_path, width):
    text = proof_html(ct.prove(architectures.block("gemma3")), "gemma3")
    plain = asked(tmp_path, text, width)
    assert (plain["panels"], plain["hint"]) == ([], 1)
    assert plain["wide"] <= 0
    assert plain["focus"]
    assert plain["after"] == [plain["hash"].removeprefix("#")] == ["node-1-2-0-0"]  # a click opens the panel
    opened = asked(tmp_path, text, width, "#node-1-5")
    assert (opened["panels"], opened["hint"]) == (["node-1-5"], 0)
    broken = asked(tmp_path, text.replace(".panel:target{display:block}", ""), width, "#node-1-5")
    assert broken["panels"] == []


@needs_browser
def test_no_text_leaves_its_box_in_any_shape(tmp_path, representatives):
    graphs = []
    for name in representatives:
        for via in ("input-output", "output"):
            graphs += re.findall(r"<svg.*?</svg>", proof_html(ct.prove(architectures.block(name), via), name), re.S)
    page = f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><body>{"".join(graphs)}</body>'
    assert asked(tmp_path, page, 1300)["spills"] == []
    wide = page.replace(">linear<", ">linear, and a description that is much too long for its box<", 1)
    assert len(asked(tmp_path, wide, 1300)["spills"]) == 1


@needs_browser
@pytest.mark.parametrize("width", [1300, 700])
def test_the_screenshot_is_not_blank(tmp_path, width):
    from matplotlib.image import imread

    def colours(text: str) -> dict[str, int]:
        picture = tmp_path / "page.png"
        browse(tmp_path, text, f"--screenshot={picture}", f"--window-size={width},1600")
        pixels = (imread(picture)[..., :3] * 255).round().astype(int)
        assert pixels.shape[1] == width
        found, counts = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_counts=True)
        return {f"#{colour:06x}": int(count) for colour, count in zip(found, counts, strict=True)}

    seen = colours(proof_html(ct.prove(architectures.block("gemma3")), "gemma3"))
    for state in ("input", "output", "undone"):
        assert seen[STATES[state][0]] > 3000, state
    assert list(colours("<!doctype html><title>nothing</title>")) == ["#ffffff"]


def test_blocks_of_one_column_have_a_page():
    for block in (residual(up >> Times(2) >> down), residual(up >> down >> Bias(Param("b", ("d",))) >> Normalize())):
        checked(proof_html(ct.prove(block), "mine"), block)
