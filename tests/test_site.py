"""The site: what its pages promise about the code; and, marked ``site``, the build itself, read back and looked at in a browser."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import outcome
from site_pages import CHROMIUM, axe, broken, look, pages, unreached

import architectures
import controllability as ct
from controllability import components, errors
from controllability.checks import LEVELS
from controllability.cli.arguments import PLACES, STRENGTHS, VIA
from controllability.cli.docs import address
from controllability.rules import RULES
from controllability.solvers.norm_scale import ROUTES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PARTS = {"explorable.html": "explorable", "prover/index.html": "prover"}  # built by programs of their own
BUILT_ELSEWHERE = [link for link, folder in PARTS.items() if not (DOCS / folder / "build.py").exists()]


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def script(name: str) -> Any:
    """A file of docs/site as a module."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------ pages and code


def test_every_rule_is_proved_beside_its_code_and_its_test():
    proofs, anchors = text("theory-proofs.md"), script("hooks").anchored(text("reference.md"))
    linked = dict(re.findall(r"\[([^\]]+)\]\(reference\.md#([a-z0-9-]+)\)", proofs))
    assert {rule.name for rule in RULES} <= set(linked)
    for name, anchor in linked.items():
        assert f'<span id="{anchor}"></span>{name} |' in anchors, name
    stated = re.findall(r"^> executed by (.*?)(?=\n\n|\Z)", proofs, re.S | re.M)
    for rule in RULES:
        near = next(line for line in stated if f"[{rule.name}](" in line)
        assert type(rule).__module__.replace(".", "/") + ".py" in near, f"{rule.name} is elsewhere"
        assert "tests/" in near, rule.name


def test_what_the_proofs_name_exists():
    proofs = text("theory-proofs.md")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", proofs)
    assert len(named) > 40
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"
    for path in re.findall(r"`(controllability/[\w/.]+)`", proofs):
        assert (ROOT / path).exists(), path


def test_the_glossary_has_every_word_that_an_option_or_a_rule_takes():
    defined = {word for line in re.findall(r"^### (.*)$", text("glossary.md"), re.M) for word in line.split(", ")}
    places = {place.replace("-", "_") for place in PLACES}
    body = text("glossary.md")
    assert {"context", "side condition", "margin", "culprit", "near-tie", "target run", "certificate"} <= defined
    for word in {
        *ROUTES,
        *LEVELS,
        *STRENGTHS,
        *VIA,
        *places,
        "each",
        "last",
        "all",
        "kept rms",
        "moved rms",
        "enlarged",
    }:
        assert word in defined or f"`{word}`" in body, word
    assert "controllable through" in defined
    words = " ".join(f"{rule.when} {rule.statement}" for rule in RULES)
    for term in ("input-controllable", "output-controllable", "bijection", "near-tie", "controllable through"):
        assert term in words and term in defined, term


def test_the_interface_pages_list_every_public_name():
    listed = re.findall(r"^::: ([\w.]+)$", text("api.md"), re.M)
    assert {f"controllability.{name}" for name in ct.__all__} <= set(listed)
    listed = re.findall(r"^::: controllability\.components\.(\w+)$", text("api-components.md"), re.M)
    public = {n for n, v in vars(components).items() if inspect.isclass(v) or inspect.isfunction(v)}
    assert sorted(listed) == sorted(public)
    listed = re.findall(r"^::: architectures\.(\w+)$", text("api-architectures.md"), re.M)
    assert {"names", "find", "block", "read", "register", "StatePoint", "View"} <= set(listed)
    assert all(hasattr(architectures, name) for name in listed)


def test_no_page_is_left_out_of_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"^ +- ([\w-]+\.md)$", navigation, re.M)
    assert len(listed) == len(set(listed))
    assert {path.name for path in DOCS.glob("*.md")} <= set(listed)


@pytest.mark.site
def test_the_picture_shows_what_the_model_answers():
    drawn, picture = text("idea.svg"), script("picture")
    answers = picture.answers()
    assert answers[0] == answers[2] != answers[1]
    shown = re.sub(r"within \d+e-\d+", "within", drawn)
    assert shown == re.sub(r"within \d+e-\d+", "within", picture.picture(*answers))
    assert answers[3] < 1e-4
    assert float(re.findall(r"within (\d+e-\d+)", drawn)[0]) < 1e-4


# ------------------------------------------------------------------------------------ errors and their pages


def raised() -> list[type]:
    return [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ControllabilityError)]


@pytest.mark.parametrize("kind", raised(), ids=lambda c: c.__name__)
def test_every_error_names_a_page_that_exists(kind):
    name, _, anchor = kind.page.partition("#")
    source = DOCS / Path(name).with_suffix(".md")
    headings = re.findall(r"^#+ (.*)$", source.read_text(), re.M)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    assert not anchor or anchor in slugs


def test_a_page_changes_no_message():
    error = errors.NotControllable("tanh", "it is bounded", "end with a map")
    assert error.page.startswith("refusals.html") and "page" not in str(error)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "refusals.md").touch()
    (tmp_path / "mkdocs.yml").touch()
    return tmp_path


def test_a_page_is_where_it_was_built_else_its_source_else_nowhere(checkout, monkeypatch):
    monkeypatch.delenv("CONTROLLABILITY_DOCS", raising=False)
    page = "refusals.html#no-proof"
    assert address(page, checkout) == str(checkout / "docs" / "refusals.md")
    (checkout / "site").mkdir()
    (checkout / "site" / "refusals.html").touch()
    assert address(page, checkout) == (checkout / "site" / "refusals.html").as_uri() + "#no-proof"
    (checkout / "mkdocs.yml").unlink()
    assert address(page, checkout) is None, "a folder named site beside an installed package is somebody else's"
    monkeypatch.setenv("CONTROLLABILITY_DOCS", "https://pages.example/docs/")
    assert address(page, checkout) == "https://pages.example/docs/refusals.html#no-proof"
    monkeypatch.setenv("CONTROLLABILITY_DOCS", str(checkout / "site" / "index.html"))
    assert address(page, checkout) == (checkout / "site" / "refusals.html").as_uri() + "#no-proof"


def test_the_command_says_where_or_how(capsys, monkeypatch):
    monkeypatch.setenv("CONTROLLABILITY_DOCS", "https://pages.example")
    assert outcome(capsys, "docs")[::2] == (0, "https://pages.example/index.html\n")
    monkeypatch.setattr("controllability.cli.docs.address", lambda: None)
    status, _, out, _ = outcome(capsys, "docs")
    assert status == 0 and "mkdocs build --strict" in out and "CONTROLLABILITY_DOCS" in out
    assert outcome(capsys, "docs", "--json")[1]["built"] is False


def test_a_refusal_ends_with_the_line_that_names_its_page(capsys, monkeypatch):
    monkeypatch.setenv("CONTROLLABILITY_DOCS", "https://pages.example")
    monkeypatch.setenv("COLUMNS", "30")
    status, _, _, err = outcome(capsys, "prove", "gemma3", "--route", "ball", "--jointly")
    assert status == 1
    assert err.splitlines()[-1] == "  page:    https://pages.example/refusals.html#no-proof", (
        "whole, in a narrow terminal too"
    )
    monkeypatch.setattr("controllability.cli.docs.address", lambda page: None)
    assert "page:" not in outcome(capsys, "prove", "gemma3", "--route", "ball", "--jointly")[3]


# ------------------------------------------------------------------------------------ the build


def test_marks_of_the_test_runner_are_not_shown():
    hooks, docstrings = script("hooks"), script("docstrings")
    source = "```python\n>>> f()  # doctest: +ELLIPSIS\na\n<BLANKLINE>\nb\n\n```\n\n```python\nx = 1\n```"
    assert hooks.prompts(source) == "```pycon\n>>> f()\na\n\nb\n```\n\n```python\nx = 1\n```"
    assert "doctest:" not in docstrings.fenced("Adds.\n\n>>> f()  # doctest: +SKIP\n2")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as one command builds it."""
    pytest.importorskip("mkdocs", reason="the site's own packages are not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def read(site):
    return {path: page for path, page in pages(site).items() if path.name != "404.html"}


@pytest.mark.site
def test_every_page_is_reached_and_every_link_leads_somewhere(site, read):
    made = "explorable.html: #"  # places that a script of that page makes
    elsewhere = tuple(BUILT_ELSEWHERE or ["\n"])
    wrong = [line for line in broken(read) if not line.startswith(made) and not line.endswith(elsewhere)]
    assert wrong == []
    assert unreached(read, site / "index.html") == []
    assert len(read) > 40 and (site / "index.html") in read


@pytest.mark.site
def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="x">a</h1><a href="#x"></a><a href="b.html#y"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text("<h1>b</h1>")
    assert broken(pages(tmp_path)) == ["a.html: b.html#y", "a.html: c.html"]
    assert unreached(pages(tmp_path), tmp_path / "b.html") == ["a.html"]


@pytest.mark.site
def test_titles_headings_and_pictures(read):
    for path, page in read.items():
        assert page.title and page.language == "en", path.name
        assert page.headings.count(1) == 1 and page.headings[0] == 1, path.name
        assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False)), (
            f"{path.name}: a level is skipped"
        )
        assert all(page.pictures), f"{path.name}: a picture without words"


@pytest.mark.site
def test_nothing_is_loaded_from_elsewhere(site, read):
    loaded = [link for page in read.values() for link in page.loads if link.startswith(("http", "//"))]
    assert loaded == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.site
def test_it_is_small(site):
    assert sum(path.stat().st_size for path in site.rglob("*") if "prover" not in path.parts) < 40 * 2**20


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with api.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(scope="module")
def auditor(tmp_path_factory):
    return axe(tmp_path_factory.mktemp("axe")) or pytest.skip("axe-core cannot be had: no npm, or no registry")


@pytest.mark.site
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_pages_are_sound_from_disk(site, read, browser, auditor, scheme, width):
    """No request leaves, no error, no overflow, no serious finding of axe-core.  The prover needs a server, and has tests of its own."""
    looked = {p: look(browser, p, scheme, width, auditor) for p in read if "prover" not in p.relative_to(site).parts}
    assert {path.name: found for path, found in looked.items() if found} == {}


@pytest.mark.site
@pytest.mark.parametrize(("scheme", "width"), [("light", 400), ("dark", 1280)])
def test_no_page_scrolls_sideways(site, read, browser, scheme, width):
    looked = {p: look(browser, p, scheme, width) for p in read if "prover" not in p.relative_to(site).parts}
    assert {path.name: found for path, found in looked.items() if found} == {}


@pytest.mark.site
def test_a_look_finds_what_is_wrong(tmp_path, browser, auditor):
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><html lang="en"><title>t</title><body style="background:#fff"><p style="color:#ddd">pale</p>'
        '<div style="width:900px;height:1px"></div><img src="https://pages.example/x.png"><script>nothing()</script>'
    )
    found = " ".join(look(browser, page, "light", 400, auditor))
    for wrong in ("request: https://pages.example", "error: ", "overflow: ", "color-contrast", "image-alt"):
        assert wrong in found, wrong


@pytest.mark.site
def test_search_answers_from_disk_and_mathematics_is_set(site, browser):
    tab = browser.new_page()
    tab.goto((site / "theory.html").as_uri())
    assert tab.locator(".katex").count() > 300 and tab.locator(".arithmatex:not(:has(.katex))").count() == 0
    tab.click(".md-search__input")
    tab.keyboard.type("Farkas", delay=30)
    tab.wait_for_selector(".md-search-result__link", timeout=30_000)
    assert "Farkas" in tab.locator(".md-search-result__list").inner_text()
    tab.close()


@pytest.mark.site
@pytest.mark.parametrize("word", ["margin", "token", "position"])
def test_search_prefers_the_glossary(site, browser, word):
    tab = browser.new_page()
    tab.goto((site / "index.html").as_uri())
    tab.click(".md-search__input")
    tab.keyboard.type(word, delay=30)
    tab.wait_for_selector(f".md-search-result__link[href*='h={word}']", timeout=30_000)
    assert f"glossary.html?h={word}#{word}" in tab.locator(".md-search-result__link").nth(1).get_attribute("href")
    tab.close()


@pytest.mark.site
def test_a_session_is_copied_without_prompts_and_outputs(site, browser):
    tab = browser.new_page()
    tab.goto((site / "lesson-2.html").as_uri())
    tab.evaluate("document.addEventListener('copy', (event) => (window.copied = event.target.value))")
    for block, wanted in ((1, 'params = {"W": np.array'), (2, "chain = W >> Activation"), (-1, "delta = np.array")):
        tab.locator("[data-clipboard-target]").nth(block).dispatch_event("click")
        copied = tab.evaluate("window.copied")
        assert wanted in copied and not re.search(r"^(>>>|\.\.\.|True|\()", copied, re.M)
        compile(copied, "copied", "exec")
    tab.close()


@pytest.mark.site
def test_every_lesson_links_its_notebook_under_its_title(site, read):
    for n in range(1, 9):
        page = read[site / f"lesson-{n}.html"]
        assert f"course/lesson-{n}.ipynb" in page.links and (site / "course" / f"lesson-{n}.ipynb").is_file()


@pytest.mark.site
def test_the_gallery_holds_the_package_s_own_pages(site):
    gallery = script("gallery")
    assert len(gallery.FAMILIES) == 10
    for name in gallery.FAMILIES:
        page = (site / "gallery" / f"{name}.html").read_text(encoding="utf-8")
        assert f"<h1>{name}: a perfect patch exists</h1>" in page and "gallery.html" in page
        assert json.dumps(name) and f"gallery/{name}.html" in (site / "gallery.html").read_text(encoding="utf-8")
