"""The commands ``attribute``, ``dynamics`` and ``inspect``, and the page that they write."""

from __future__ import annotations

import json
import re

import pytest
from commands import PATCH, one_line, outcome, status_of
from test_html_browser import browse, needs_browser

TEXTS = ("--context", "Mia lives in Oslo . Leo lives in Rome .", "--query", "Where does Leo live ?")


def written(folder):
    assert {path.name for path in folder.iterdir()} == {"study.png", "study.html"}
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    return (folder / "study.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [(), ("--order", "all", "--ablations", "3"), ("--chunks", "token", "--order", "backward", "--dtype", "float64")],
)
def test_attribute(capsys, tmp_path, options):
    status, data, _, err = outcome(
        capsys, "attribute", "embedded", *TEXTS, *options, "--out", tmp_path / "out", "--json"
    )
    assert (status, err) == (0, "")
    best = max(data["chunks"], key=lambda chunk: chunk["shares"]["layer 1"])
    assert {"Leo", "Rome"} & {*best["text"].split()} and data["answer"] == "Rome" and data["residual"] < 1e-14
    page = written(tmp_path / "out")
    assert not re.search(r"(src|href)=|url\(|https?://", page), "the page is self-contained"
    assert all(f"{100 * chunk['shares']['all layers']:.0f}%" in page for chunk in data["chunks"]), (
        "shares are written, not only coloured"
    )
    numbers = json.loads(re.search(r'id="numbers">(.*?)</script>', page)[1])
    assert list(numbers) == ["all layers", "layer 0", "layer 1", "layer 2"]


def test_dynamics(capsys, tmp_path):
    status, data, _, _ = outcome(
        capsys, "dynamics", "embedded", *TEXTS, "--chunks", "sentence", "--out", tmp_path / "out", "--json"
    )
    assert status == 0 and len(data["rows"]) == 6 and data["loss"][0] > 5 > 0.1 > data["loss"][2]
    assert "How the patch grows" in written(tmp_path / "out")
    status, data, *_ = outcome(capsys, "dynamics", "embedded", *TEXTS, "--skip-gradients", "--json")
    assert status == 0 and "step" not in data["rows"][0]


def test_inspect(capsys, tmp_path):
    assert status_of(*PATCH, "--out", tmp_path / "patch") == 0
    capsys.readouterr()
    status, data, _, _ = outcome(capsys, "inspect", tmp_path / "patch", "--out", tmp_path / "out", "--json")
    assert status == 0 and data["scope"] == "each" and {row["layer"] for row in data["rows"]} == {0, 1, 2}
    assert "parameter by parameter" in written(tmp_path / "out")
    status, _, out, _ = outcome(capsys, "inspect", tmp_path / "patch")
    assert status == 0 and "down_proj" in out


@pytest.mark.parametrize(("arguments", "words"), [
    (("attribute", "embedded", *TEXTS, "--order", "all", "--permutations", "3"), ("2 chunks have 2 orders",)),
    (("attribute", "embedded", *TEXTS, "--chunks", "line"), ("one chunk",)),
    (("attribute", "embedded", *TEXTS, "--ablations", "-1"), ("ablations",)),
    (("dynamics", "embedded", *TEXTS, "--order", "all"), ("invalid choice",)),
    (("inspect", "nowhere"), ("nowhere",)),
])  # fmt: skip
def test_wrong_usage_is_one_line(capsys, tmp_path, arguments, words):
    status, _, out, err = outcome(capsys, *arguments, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    one_line(err, *words)
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_left_alone(capsys, tmp_path):
    (tmp_path / "mine").write_text("mine")
    status, _, _, err = outcome(capsys, "attribute", "embedded", *TEXTS, "--out", tmp_path)
    assert status == 2 and "is not an empty directory" in err and [p.name for p in tmp_path.iterdir()] == ["mine"]


def framed(page, width):
    """A page in a frame of this width: no window is narrower than 500 pixels."""
    return (
        f'<!doctype html><body><template id="seen"></template><iframe id="frame" width="{width}" height="800" style="border:0"></iframe>'
        f"<script>document.getElementById('frame').srcdoc={json.dumps(page).replace('</', '<' + chr(92) + '/')}</script></body>"
    )


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser(capsys, tmp_path, width):
    """The slider chooses the layer: numbers, marks and colours follow; nothing is wider than the window."""
    hostile = (
        "--context",
        'Mia <b onclick="x()">lives</b> in Oslo . Leo lives in Rome .',
        "--query",
        "Where does Leo live ?",
    )
    assert status_of("attribute", "embedded", *hostile, "--ablations", "0", "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "study.html").read_text(encoding="utf-8")
    assert "<b onclick" not in text.split("<main>")[1]
    step = (
        "<script>const s=document.getElementById('which');s.value=2;s.dispatchEvent(new Event('input'));"
        "document.body.dataset.wide=document.documentElement.scrollWidth>innerWidth;document.body.dataset.width=innerWidth;"
        "parent.document.getElementById('seen').content.append(document.documentElement.cloneNode(true))</script></body>"
    )
    shown = browse(tmp_path, framed(text.replace("</body>", step), width), "--window-size=1400,900", "--dump-dom")
    shown = shown.partition('<template id="seen">')[2]
    assert f'data-width="{width}"' in shown
    assert '<output id="said">layer 1</output>' in shown
    share = json.loads(re.search(r'id="numbers">(.*?)</script>', text)[1])["layer 1"]
    best = re.search(r'class="chunk best"[^>]*>(.*?)<sup>(.*?)</sup>', shown)
    assert "Rome" in best[1] and best[2] == f"{100 * max(share):.0f}%" and 'data-wide="false"' in shown
