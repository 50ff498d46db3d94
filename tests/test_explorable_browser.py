"""The explorable in a browser: every state is walked through, at two widths, light and dark, with good texts and bad ones."""

from __future__ import annotations

import json
from html import escape

import pytest
from explorable_page import HERE, left, page
from test_explorable import BAD
from test_html_browser import browse, needs_browser

pytestmark = pytest.mark.site

WALK = (HERE / "explorable_walk.js").read_text(encoding="utf-8")
LISTEN = """<script>window.trouble = [];
addEventListener("error", (event) => window.trouble.push(event.message));
addEventListener("unhandledrejection", (event) => window.trouble.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => window.trouble.push(words.join(" "));</script>"""
TEXTS = [[name, *texts[:2]] for name, texts in BAD.items()]


def walked(tmp_path, *options: str, frame: int | None = None) -> dict:
    """What the walk saw, in a window or in a frame as wide as a telephone."""
    script = f"<script>const BAD = {json.dumps(TEXTS)};\n{WALK}</script>"
    text = page().replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{script}</body>")
    if frame:
        text = f'<!doctype html><body><iframe style="width:{frame}px;height:900px;border:0" srcdoc="{escape(text)}"></iframe>'
    return left(browse(tmp_path, text, "--dump-dom", "--virtual-time-budget=60000", *options))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return walked(tmp_path_factory.mktemp("walk"), "--window-size=1280,900")


@needs_browser
def test_nothing_goes_wrong_and_nothing_leaves_the_machine(seen):
    assert seen["trouble"] == []
    assert seen["requests"] == []


@needs_browser
def test_the_answer_breaks_without_the_context_and_returns_with_the_patch(seen):
    words = seen["words"]
    assert words["start"] == words["patched"] == words["again"] == "Rome" != words["without"]
    assert seen["unseen"] == "?"  # nothing is shown before it was asked for
    assert float(seen["without"]) > 1 > 1e-12 > float(seen["patched"])
    assert words["no part"] == words["without"]
    assert min(float(seen["half"]), float(seen["two"])) > 0.01
    assert (seen["gone"], seen["rows"], seen["kept"]) == (21, 12, "next")
    assert seen["step"].startswith("Step 3 of 5")


@needs_browser
def test_every_route_returns_the_answer_or_says_why_not(seen):
    inside, down, scale = "#node-1-2-0-0 #node-1-2-1", "#node-1-3", "#node-1-5"
    for name, answer in seen["routes"].items():
        route, via = name.split()
        if route == "ball":
            assert answer.startswith("There is no patch by this route: in layer 2 ")
            continue
        error, moved = answer
        assert float(error) < (1e-9 if route == "scale" else 1e-12)
        alone = {("scale", "input-output"): f"{down} {scale}", ("scale", "output"): scale}
        usual = f"{inside} {down} {scale}" if via == "input-output" else f"{down} {scale}"
        assert moved == alone.get((route, via), usual)
    assert (seen["fallen"], seen["stays"], seen["returned"]) == ("source", "source", "patched")
    assert set(seen["shown"].values()) == {"patched"}, "every control shows what it changes"
    assert seen["empty"].startswith("The table of sizes is empty")
    assert seen["after"] is True  # without a patch there is none to apply


@needs_browser
def test_the_routes_are_compared_by_lesson_4_s_measure(seen):
    """And the page's words about them hold on its own example."""
    means = {name: [float(x) for x in row] for name, row in seen["means"].items() if name != "ball"}
    assert seen["bold"] == ["ball"] and seen["means"]["ball"][0].startswith("no patch: in layer 2")
    assert set(means) == {"no patch", "balanced", "uniform", "secular", "scale"}
    most = {name: max(row) for name, row in means.items()}
    assert max(most["uniform"], most["secular"]) < 1.6 * most["balanced"] and most["scale"] > 100 * most["balanced"]


@needs_browser
def test_a_person_of_whom_the_facts_say_nothing_has_no_answer_that_comes_back(seen):
    assert "right or wrong, and not only the word" in seen["stranger"] and "The answer is back" not in seen["stranger"]


@needs_browser
def test_a_box_of_the_graph_tells_its_numbers(seen):
    assert seen["node"].startswith("Matrix “gate”")
    assert "256" in seen["node"] and seen["moved"]
    assert seen["curves"] == 9 + 1  # nine boxes, and one in full


@needs_browser
def test_a_kept_patch_fails_elsewhere_and_a_joint_one_does_not(seen):
    assert seen["wanted"] == ["Oslo", "Rome", "dog", "cat"]
    marks = [mark[:1] for mark in seen["keptMarks"]]
    assert marks[1] == "✓" and "✗" in marks
    assert "One patch, one question" in seen["keptWords"]
    assert seen["jointMarks"] == ["✓ Oslo", "✓ Rome", "✓ dog", ""]  # the first three are ticked
    assert "exact at all" in seen["jointWords"]
    assert "No question is ticked" in seen["none"]
    assert "5 questions are ticked" in seen["many"]


@needs_browser
def test_bad_texts_leave_a_sentence_and_a_whole_page(seen):
    for name, (*_, sentence) in BAD.items():
        messages, said, rows = seen["bad"][name]
        assert sentence in messages
        assert said == "The model has nothing to answer yet: see the message in section 1."
        assert rows == 0, f"{name}: numbers of an earlier text stand beside the message"
    assert (
        "contradict each other about Leo: Rome and Oslo. Asked “Where does Leo live ?”, the model takes"
        in seen["clash"]
    )
    assert seen["words"]["clash"] in ("Rome", "Oslo")
    assert f"takes {seen['words']['clash']}." in seen["clash"]
    for i in range(4):
        assert float(seen["words"][f"with {i}"]) < 1e-12


@needs_browser
def test_it_can_be_used_by_keyboard_and_heard(seen):
    assert (seen["unreached"], seen["nameless"]) == (0, [])
    assert seen["headings"][0] == 1 and all(
        b - a <= 1 for a, b in zip(seen["headings"], seen["headings"][1:], strict=False)
    )
    for region in ("said", "node", "merged", "step"):
        assert f'id="{region}" aria-live="polite"' in page()
    for region in ("messages", "refusal"):
        assert f'id="{region}" role="alert"' in page()


@needs_browser
def test_no_state_overflows_a_window_or_a_telephone(tmp_path, seen):
    narrow = walked(tmp_path, "--blink-settings=preferredColorScheme=0", "--force-prefers-reduced-motion", frame=400)
    assert narrow["trouble"] == []
    for one in (seen, narrow):
        assert len(one["wide"]) > 20
        assert [name for name, wide in one["wide"] if wide > 0] == []
    assert {name: word for name, word in narrow["words"].items() if "random" not in name and "with " not in name} == {
        name: word for name, word in seen["words"].items() if "random" not in name and "with " not in name
    }
    assert (seen["back"], narrow["back"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 29)")
    assert (seen["moves"], narrow["moves"]) == ("0.25s", "0s")
