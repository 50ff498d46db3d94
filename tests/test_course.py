"""The course: what every lesson has, that its pictures and notebooks are what its text and code say, and how long it takes."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from course import build, pictures  # noqa: E402

LESSONS = [ROOT / "docs" / f"lesson-{n}.md" for n in range(1, 9)]
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)
FOLD = re.compile(r'^<details markdown="1">\n<summary>Solution \d</summary>\n\n(.*?)^</details>$', re.M | re.S)
lesson = pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)


def part(text: str, heading: str) -> str:
    """What stands below a heading."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


@lesson
def test_every_lesson_has_its_parts_in_order(page):
    text = page.read_text()
    headings = re.findall(r"^#+ .*", text, re.M)
    assert re.fullmatch(rf"# Lesson {page.stem[-1]}: .+", headings[0])
    assert headings[-2:] == ["## A common mistake", "## Exercises"]
    assert [h[:5] for h in headings[1:-2]] == [f"## {n}." for n in range(1, len(headings) - 2)]
    goal = re.search(r"\*\*Goal\.\*\* (.*)", text)
    assert goal and goal[1].count(".") == 1 and goal[1].endswith("."), "one sentence"
    assert text.index("**Goal.**") < text.index("**Assumed.** ") < text.index("\n## 1.")
    following = LESSONS[LESSONS.index(page) + 1 :]
    assert not following or f"]({following[0].name})" in text.splitlines()[-1], "it says what comes next"


def test_words_are_linked_to_the_glossary_once_where_the_course_first_uses_them():
    text = BLOCK.sub("", "".join(page.read_text() for page in LESSONS))
    links = re.findall(r"\]\(glossary\.md#([\w-]+)\)", text)
    entries = re.findall(r"^### (.*)", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    anchors = {re.sub(r"[^\w]+", "-", entry.lower()) for entry in entries}
    assert len(links) == len(set(links)) and set(links) <= anchors
    assert set(links) >= {
        "token",
        "attention",
        "weights",
        "position",
        "hint",
        "rule",
        "block",
        "channel",
        "frozen",
        "tap",
    }
    assert "feed-forward block" not in text.lower(), "one name: feed-forward half"
    for word in ("derivation", "near-tie", "logits", "perfect patch", "sensitivity"):
        before = text[: text.index(f"glossary.md#{word.replace(' ', '-')})")]
        assert len(re.findall(word, before, re.I)) == 1, word


@lesson
def test_the_common_mistake_is_answered_in_the_packages_own_words(page):
    mistake = part(page.read_text(), "A common mistake")
    examples = doctest.DocTestParser().get_examples("".join(BLOCK.findall(mistake)))
    said = [
        e for e in examples if "controllability.errors." in (e.exc_msg or "") or re.match("wrong patch|drifts", e.want)
    ]
    assert said, "no refusal of the package is shown"


@lesson
def test_every_exercise_has_a_folded_solution_that_is_tested(page):
    exercises = part(page.read_text(), "Exercises")
    asked, folds = re.findall(r"^\*\*(\d)\.\*\* ", exercises, re.M), FOLD.findall(exercises)
    assert 2 <= len(asked) <= 3 and asked == [str(n) for n in range(1, len(asked) + 1)]
    assert len(folds) == len(asked) == exercises.count("<details") == exercises.count("</details>")
    for fold in folds:
        assert any(e.want for e in doctest.DocTestParser().get_examples(fold)), "a solution that checks nothing"
    assert exercises.count(">>> ") == "".join(folds).count(">>> "), "no solution outside its fold"


def minutes(text: str) -> float:
    """Reading time: 150 words of text, or 10 lines of input, a minute; solutions and what is printed are not counted."""
    text = FOLD.sub("", text)
    return len(BLOCK.sub("", text).split()) / 150 + len(re.findall(r"^(?:>>>|\.\.\.)", text, re.M)) / 10


@lesson
def test_a_lesson_takes_at_most_ten_minutes(page):
    assert minutes(page.read_text()) <= 10
    assert minutes("word " * 1500 + "\n>>> 1\n") > 10, "the formula can say no"


@lesson
def test_one_picture_with_words_for_who_cannot_see_it(page):
    found = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", page.read_text())
    assert [name for _, name in found] == [f"{page.stem}.svg"]
    assert len(found[0][0].split()) >= 20, "say what is seen"


NUMBER = re.compile(r'(?<=[" ,])-?\d+\.\d+')


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_their_code_draws(name):
    """Words and shapes to the letter; places to a third of a unit, opacities to 0.02: another machine rounds otherwise."""
    stored = (ROOT / "docs" / f"{name.replace('_', '-')}.svg").read_text()
    drawn = pictures.PICTURES[name]().svg()
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", stored)
    for new, old in zip(NUMBER.findall(drawn), NUMBER.findall(stored), strict=True):
        assert abs(float(new) - float(old)) <= (0.02 if abs(float(old)) <= 1 else 0.3)
    assert "<title>" in stored and "prefers-color-scheme: dark" in stored


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_words_in_pictures_can_be_read_in_light_and_dark():
    from course.drawing import DARK, LIGHT

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for colours in (LIGHT, DARK):
        for name in ("ink", "soft", "source", "target", "patch", "other"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name


# ------------------------------------------------------------------------------------------- notebooks


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    nbformat = pytest.importorskip("nbformat", reason="nbformat writes the notebooks: pip install -e '.[docs]'")
    paths = build.build(tmp_path_factory.mktemp("site"))
    assert [path.relative_to(path.parents[1]).as_posix() for path in paths] == [
        f"course/lesson-{n}.ipynb" for n in range(1, 9)
    ]
    return [nbformat.read(path, as_version=4) for path in paths]


@pytest.mark.parametrize("n", range(8))
def test_a_notebook_holds_the_lesson_and_what_its_cells_gave(notebooks, n):
    """Every example is in a cell, its output is what the page says, and the text is all there."""
    text, cells = LESSONS[n].read_text(), notebooks[n].cells
    code = [cell for cell in cells if cell.cell_type == "code"][1:]
    examples = doctest.DocTestParser().get_examples(text)
    assert "\n".join(cell.source for cell in code) == "".join(e.source for e in examples).rstrip("\n")
    wanted = [e for e in examples if e.want]
    given = [cell.outputs[0] for cell in code if cell.outputs]
    for example, output in zip(wanted, given, strict=True):
        if output.output_type == "error":
            assert build.doctest.OutputChecker().check_output(
                example.exc_msg, "\n".join(output.traceback) + "\n", build.FLAGS
            )
            assert output.ename == re.match(r"[\w.]*?(\w+):", example.exc_msg)[1]
        else:
            assert build.doctest.OutputChecker().check_output(example.want, output.text, build.FLAGS)
    words = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for line in BLOCK.sub("", text).splitlines():
        if not re.search(r"\]\(|details|!\[", line) and line.strip():
            assert line in words or " ".join(line.split()) in words, line
    assert words.count("<details>") == words.count("</details>") == text.count("<details")
    assert "attachment:" in words and not re.search(r"\]\(\w[\w-]*\.md", words)
    assert str(ROOT) not in str(cells), "no path of the machine that built it"


@pytest.mark.parametrize("n", range(8))
def test_cells_can_be_run_one_by_one(notebooks, n):
    """As a kernel does: a cell's last expression is shown."""
    names: dict = {}
    for cell in notebooks[n].cells:
        if cell.cell_type != "code":
            continue
        tree, shown = ast.parse(cell.source), io.StringIO()
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        try:
            with contextlib.redirect_stdout(shown):
                exec(compile(tree, "cell", "exec"), names)
                if last is not None:
                    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
                    if value is not None:
                        print(repr(value))
        except Exception as error:
            assert cell.outputs[0].ename == type(error).__name__
            assert cell.metadata["tags"] == ["raises-exception"]
        else:
            assert bool(shown.getvalue()) == bool(cell.outputs)
            assert not cell.outputs or build.doctest.OutputChecker().check_output(
                cell.outputs[0].text, shown.getvalue(), build.FLAGS
            )


def test_a_narrow_terminal_does_not_change_a_page(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    build.executed(LESSONS[2].read_text(), "lesson-3.md")


def test_a_page_that_says_something_else_stops_the_build(tmp_path, monkeypatch):
    pytest.importorskip("nbformat")
    page = tmp_path / "lesson-1.md"
    monkeypatch.setattr(build, "lessons", lambda: [page])
    for text, stopped in ((">>> 1 + 1\n3\n", doctest.DocTestFailure), (">>> 1 / 0\n", doctest.UnexpectedException)):
        page.write_text(f"# One\n\n```python\n{text}\n```\n")
        with pytest.raises(stopped):
            build.build(tmp_path / "site")
    assert not (tmp_path / "site").exists(), "nothing half-written"


def test_folded_cells_are_hidden_and_others_are_not(notebooks):
    hidden = [
        c.metadata.get("jupyter", {}).get("source_hidden", False) for c in notebooks[2].cells if c.cell_type == "code"
    ]
    assert hidden == sorted(hidden) and 3 <= sum(hidden) < len(hidden), "the solutions, which come last"


# --------------------------------------------------------------------------------------------- teaching


def test_the_timetable_has_ninety_minutes_and_covers_the_first_four_lessons():
    text = (ROOT / "docs" / "teach.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", part(text, "Timetable"), re.M)
    assert sum(int(length) for length, _ in rows) == 90
    assert all(f"(lesson-{n}.md)" in " ".join(what for _, what in rows) for n in range(1, 5))
    assert "side condition" in part(text, "Typical wrong answers")
