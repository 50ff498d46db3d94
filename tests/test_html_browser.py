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
