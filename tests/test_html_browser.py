"""Pages in a browser, where one is installed: links open their panels, texts stay in their boxes, colours are painted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html import unescape

import numpy as np
import pytest
from pages import representative_names

import architectures
import controllability as ct
from controllability.rendering.css import STATES, STYLE
from controllability.rendering.html import proof_html

representatives = pytest.fixture(scope="module")(representative_names)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
@pytest.mark.parametrize("width", [1300, pytest.param(700, marks=pytest.mark.slow)])
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
@pytest.mark.parametrize("width", [1300, pytest.param(700, marks=pytest.mark.slow)])
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


@needs_browser
@pytest.mark.parametrize("name", [pytest.param("gemma3", marks=pytest.mark.slow), "deepseek_v3"])
def test_a_page_prints_whole(tmp_path, name):
    """Nothing that is printed scrolls: what it cuts off would not be on the paper."""
    text = proof_html(ct.prove(architectures.block(name)), name)
    cut = """<script>addEventListener("load", () => { document.body.dataset.out = JSON.stringify({
      cut: [...document.querySelectorAll("aside, .canvas, .wide, main")].filter(e =>
        e.scrollWidth > e.clientWidth + 1 || (getComputedStyle(e).overflowY !== "visible" && e.scrollHeight > e.clientHeight + 1)).map(e => e.className || e.tagName),
      wide: document.documentElement.scrollWidth - innerWidth,
      panels: document.querySelectorAll(".panel").length - [...document.querySelectorAll(".panel")].filter(e => e.getBoundingClientRect().height > 0).length
    }); });</script>"""

    def printed(page: str) -> dict:
        on_paper = page.replace("@media print", "@media all").replace("@media screen", "@media not all")
        seen = browse(tmp_path, on_paper.replace("</body>", cut + "</body>"), "--dump-dom", "--window-size=760,1000")
        return json.loads(unescape(re.search(r'data-out="([^"]*)"', seen)[1]))

    assert printed(text) == {"cut": [], "wide": 0, "panels": 0}
    assert printed(text.replace("max-height:none;overflow:visible", ""))["cut"]


@needs_browser
@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3"])
def test_a_page_fits_a_telephone(tmp_path, name):
    text = proof_html(ct.prove(architectures.block(name)), name)
    ask = """<script>addEventListener("load", () => { const d = frames[0].document; document.body.dataset.out = JSON.stringify({
      wide: d.documentElement.scrollWidth - 390, graph: d.querySelector("svg").getBoundingClientRect().width,
      letters: [...d.querySelectorAll("svg text.kind")].map(e => e.getBoundingClientRect().height)}); });</script>"""
    from html import escape

    frame = f'<!doctype html><body><iframe style="width:390px;height:800px;border:0" srcdoc="{escape(text)}"></iframe>{ask}</body>'
    seen = json.loads(unescape(re.search(r'data-out="([^"]*)"', browse(tmp_path, frame, "--dump-dom"))[1]))
    natural = float(re.search(r'<svg[^>]* width="([\d.]+)"', text)[1])
    assert seen["wide"] <= 0
    assert 0.79 * natural < seen["graph"] < 0.85 * natural  # smaller than on a wide screen, and still to be read
    assert min(seen["letters"]) > 9
    if name == "gemma3":
        assert seen["graph"] <= 390


@needs_browser
def test_a_page_has_a_dark_form(tmp_path):
    from matplotlib.image import imread

    def light(*options: str) -> float:
        picture = tmp_path / "page.png"
        browse(
            tmp_path, proof_html(ct.prove(architectures.block("llama")), "llama"), f"--screenshot={picture}", *options
        )
        return float(np.median(imread(picture)[..., :3]))

    assert light() == 1
    assert light("--blink-settings=preferredColorScheme=0") < 0.15
