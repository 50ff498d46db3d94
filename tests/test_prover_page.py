"""The prover's page in a browser, held against this Python word for word; and what it reads, without a browser."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import architectures
import controllability as ct
from controllability.components import Activation, Linear, residual
from controllability.interfaces import Param
from controllability.rendering.text import proof_text

ROOT = Path(__file__).parent.parent
PROVER = ROOT / "docs" / "prover"
sys.path.insert(0, str(ROOT / "docs"))
from prover import build, fetch  # noqa: E402
from prover.answers import Prover  # noqa: E402
from prover.examples import EXAMPLES, PALETTE  # noqa: E402
from prover.expressions import outline, read, written  # noqa: E402

pytestmark = pytest.mark.site

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOADING = 240_000  # ms, on a machine that is busy with other things; a free one takes seconds
DEEP = "residual(" * 60 + 'Linear(Param("W", ("d", "d")))' + ")" * 60
BAD = {
    "": "there is no expression",
    "residual(up >>": "does not parse",
    "residual(Linear(Param('W')": "does not parse",
    "Liner(Param('W'))": "line 1, column 1: there is no component Liner: did you mean Linear?",
    "Identity()\nresidual(Foo())": "before the last line only assignments are taken",
    "residual(\n  Foo())": "line 2, column 3: there is no component Foo",
    "up >> down": "nothing is called up",
    "Linear(3)": "Linear: weight must be Param; got 3",
    "Linear()": "missing 1 required positional argument: 'weight'",
    "Identity() >> 3": ">> stands between components, not beside 3",
    "Activation('none')": "unknown activation 'none'",
    "block('none')": "unknown architecture or model type 'none'",
    "Param('W', ('d',))": "the last line must be a component, and is Param",
    "a = Identity()\n" + "a = a >> a\n" * 60 + "a": "the block has more than 400 parts",
    "f = Identity()\n" + "f = f + f\n" * 60 + "f": "the block has more than 400 parts",
    "(" * 190 + "Identity()" + ")" * 10: "does not parse",
    'Activation("\\d")': "unknown activation",
    "# " + "x" * 20_000: "20,002 characters: at most 20,000 are read here",
    'residual(Linear(Param("a", (4, 3))) >> Linear(Param("b", (5, 6))))': "the sizes of the block do not fit",
}
DANGEROUS = (
    "__import__('os').system('touch x')", "open('x')", "(lambda: 1)()", "[c for c in (1,)]", "Linear.__init__", "Identity().__class__",
    "Linear(*(1,))", "Linear(**{})", "f'{1}'", "10**10**10", "'a' * 10", "(1,) * 10", "1 if 1 else 2", "(x := Identity())", "Identity()[0]", "not 1",
    "import os\nIdentity()", "def f(): pass\nIdentity()", "a.b = Identity()\na", "a[0] = 1\nIdentity()", "del a\nIdentity()", "slice(1)(2)", "b'x'", "...",
)  # fmt: skip


def told(text: str, **options) -> str:
    """What this Python's package says to a question of the page, asked here without the page's ``Prover``."""
    try:
        frozen = [name for name in [options.pop("frozen", "")] if name]
        return proof_text(ct.prove(read(text), frozen=frozen, **options), 100)
    except ct.NotControllable as refused:
        return str(refused)
    except ct.BadInput as error:
        return f"BadInput: {error}"


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_block_gets_one_clear_error(text):
    answer = Prover().prove(text)
    assert answer["outcome"] == "error"
    assert answer["text"].startswith("BadInput: ")
    assert BAD[text] in answer["text"]
    assert "\n" not in answer["text"]


@pytest.mark.parametrize("text", DANGEROUS)
def test_nothing_but_the_grammar_is_read(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ct.BadInput):
        read(text)
    assert not [*tmp_path.iterdir()]


def test_every_family_is_written_as_text_that_is_read_back():
    for name in architectures.names():
        block = architectures.block(name)
        assert read(written(block)) == block, name
        assert {str(p): p.shape for p in read(written(block)).parameters()} == {
            str(p): p.shape for p in block.parameters()
        }


def test_a_block_that_is_read_is_the_one_that_python_makes():
    up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
    text = 'up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))\n'
    assert read(text + 'residual(up >> Activation("gelu") >> down)') == residual(up >> Activation("gelu") >> down)
    assert read(text + "up * up + down >> down") == (up * up + down) >> down


def test_a_remedy_can_be_asked_for_as_it_is_written():
    for title, text, options in EXAMPLES:
        answer = Prover().prove(text, **options)
        wanted = {"Refused": "refused", "Error": "error"}.get(title.partition(":")[0], "proved")
        assert answer["outcome"] == wanted, title
        assert answer["text"] == told(text, **options)
        for remedy in answer.get("remedies", ()):
            assert Prover().prove(remedy["expression"], **remedy["options"])["outcome"] == "proved", remedy["change"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_tree_on_the_page_is_the_text_that_the_package_writes():
    blocks = [read(text) for _, text, _ in EXAMPLES if not told(text).startswith("BadInput")]
    blocks += [read(text) for _, text in PALETTE] + [architectures.block(name) for name in architectures.names()]
    code = "const {textOf} = require(process.argv[1]); const trees = JSON.parse(require('fs').readFileSync(0)); console.log(JSON.stringify(trees.map(textOf)))"
    given = json.dumps([outline(block) for block in blocks])
    done = subprocess.run(
        ["node", "-e", code, str(PROVER / "composer.js")], input=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [written(block) for block in blocks]


def test_the_zip_proves_by_itself_without_numpy(tmp_path):
    """All that the page needs of the package is in the zip, and it is the same at each build."""
    first, second = tmp_path / "core.zip", tmp_path / "again.zip"
    build.core(first)
    build.core(second)
    assert first.read_bytes() == second.read_bytes()
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('numpy', 'scipy', 'torch', 'matplotlib'))); sys.path.insert(0, sys.argv[1])\n"
        "import json, prover.answers as answers; assert '.zip' in answers.__file__; asked = answers.Prover()\n"
        "found = [asked.prove('block(\"gemma3\")'), asked.form(), asked.check(), asked.outline('block(\"llama\")')]\n"
        "print(json.dumps([found[0]['text'], found[1]['document'], found[2]['level'], found[3]['expression']]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(first)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    proof = ct.prove(architectures.block("gemma3"))
    assert json.loads(done.stdout) == [
        proof_text(proof, 100),
        proof.to_latex(),
        "symbolic",
        written(architectures.block("llama")),
    ]


def test_another_file_than_the_one_that_was_pinned_is_not_taken(tmp_path):
    for name in fetch.SUMS:
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(SystemExit, match=f"{name}: its SHA-256 is .*nothing was written"):
            fetch.checked(tmp_path / name)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def served(folder: Path) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The page as it is built, with Python for the browser where it can be had."""
    if not (PROVER / "pyodide" / "files.json").exists():
        done = subprocess.run([sys.executable, str(PROVER / "fetch.py")], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Pyodide cannot be had here: {(done.stderr.strip() or 'fetch.py failed').splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("site")
    if (katex := ROOT / "docs/site/katex").is_dir():
        shutil.copytree(katex, folder / "site/katex")
    build.build(folder)
    return folder


class Page:
    """The page, open: what was asked of the server, and what the console said."""

    def __init__(self, browser, folder: Path, **options) -> None:
        self.server = served(folder)
        self.origin = f"http://127.0.0.1:{self.server.server_port}/"
        self.page = browser.new_page(**options)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else 0)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(self.origin + "prover/index.html")

    def close(self) -> None:
        self.page.close()
        self.server.shutdown()

    def state(self, wanted: str) -> None:
        self.page.wait_for_selector(f"body[data-state={wanted}]", timeout=LOADING)

    def text(self, selector: str) -> str:
        return self.page.text_content(selector) or ""

    def prove(self, text: str, options: dict | None = None) -> str:
        page, options = self.page, options or {}
        page.fill("#expression", text)
        page.select_option("#via", options.get("via", "input-output"))
        page.select_option("#route", options.get("route", "auto"))
        page.fill("#frozen", options.get("frozen", ""))
        page.set_checked("#jointly", options.get("jointly", False))
        page.click("#prove")
        self.state("answered")
        return self.text("#text")


@pytest.fixture(scope="module")
def opened(browser, site):
    page = Page(browser, site, viewport={"width": 1280, "height": 900})
    yield page
    page.close()
    assert page.errors == []
    first = [url.rsplit("/", 1)[-1] for url in page.asked]
    assert first.count("sympy.zip") == first.count("core.zip"), "SymPy is loaded once by each Python that is started"
    assert first.index("core.zip") < first.index("sympy.zip")
    assert [url for url in page.asked if not url.startswith((page.origin, "data:", "about:"))] == []


def test_the_answers_are_those_of_this_python_word_for_word(opened):
    for title, text, options in EXAMPLES:
        assert opened.prove(text, options) == told(text, **options), title
        outcome = opened.page.get_attribute("#answer", "data-outcome")
        assert outcome == Prover().prove(text, **options)["outcome"], title
        if outcome == "proved" and not options.get("jointly"):
            proof = ct.prove(read(text), **options)
            assert opened.text("#formulas .source") == proof.to_latex(), title
            assert opened.page.locator("#formulas > .formula, #formulas > pre").count() >= len(proof.root.moved)


def test_a_block_is_refused_with_culprit_and_hint_and_the_hint_is_done(opened):
    text = 'residual(Linear(Param("W", ("d", "d"))) >> Activation("tanh"))'
    said = opened.prove(text)
    assert "culprit: activation tanh" in said
    opened.page.click("#remedies button:has-text('add a bias after activation tanh')")
    opened.page.wait_for_selector("#answer[data-outcome=proved]", timeout=LOADING)
    opened.state("answered")
    assert "Bias(" in opened.page.input_value("#expression")
    assert opened.text("#text") == told(opened.page.input_value("#expression"))


def test_the_symbolic_check_says_what_this_python_says(opened):
    for title in ("Gated, with norms (Gemma)", "Mixture of experts", "A soft-cap can be undone"):
        _, text, options = next(each for each in EXAMPLES if each[0] == title)
        opened.prove(text, options)
        opened.page.click("#check")
        opened.state("checked")
        rows = [
            [cell.text_content() for cell in row.query_selector_all("td")]
            for row in opened.page.query_selector_all("#rows tr")
        ]
        wanted = [[row[key] for key in ("rule", "status", "method")] for row in ct.prove(read(text), **options).check()]
        untimed = functools.partial(re.sub, r" \([\d.]+ s\)$", "")
        assert [[*map(untimed, row)] for row in rows] == [[*map(untimed, row)] for row in wanted], title
        assert opened.text("#said").startswith("Checked symbolically")
        assert opened.text("#status") == "Level: symbolic."


def test_a_check_that_needs_numbers_says_so(opened):
    opened.prove(EXAMPLES[0][1], {"jointly": True})
    opened.page.click("#check")
    opened.state("checked")
    assert "computes with arrays of explicit size" in opened.text("#said")


@pytest.mark.parametrize("text", [*BAD, *DANGEROUS[:3]])
def test_bad_input_is_the_packages_own_error_on_the_page(opened, text):
    assert opened.prove(text) == Prover().prove(text)["text"]
    assert opened.page.get_attribute("#answer", "data-outcome") == "error"


def test_nesting_is_bounded_by_an_error_and_not_by_the_end_of_python(opened):
    for text in (DEEP, DEEP.replace("residual(", "Fixed(")):
        said = opened.prove(text)
        assert said.startswith(("patchable", "prove via", "BadInput: ")), said
    assert opened.prove(EXAMPLES[0][1]).startswith("patchable")


def test_a_block_is_composed_from_parts(opened):
    page = opened.page
    page.click("#examples button:has-text('One linear map')")
    page.locator("#composer select.add").last.select_option(label="bias")
    assert page.input_value("#expression") == 'residual(Linear(Param("W", ("d", "d"))) >> Bias(Param("b", ("d",))))'
    page.locator("#composer input").first.fill("V")
    page.click("#composer button[title='put into a residual'] >> nth=0")
    wanted = 'residual(residual(Linear(Param("V", ("d", "d")))) >> Bias(Param("b", ("d",))))'
    assert page.input_value("#expression") == wanted
    page.click("#prove")
    opened.state("answered")
    assert opened.text("#text") == told(wanted, via="output")
    page.locator("#composer button[title=remove]").last.click()
    assert page.input_value("#expression") == 'residual(residual(Linear(Param("V", ("d", "d")))))'


def test_stop_ends_what_takes_too_long_and_the_next_press_works(opened):
    opened.prove(EXAMPLES[0][1])
    long = "\n".join([f'f{i} = residual(Linear(Param("W{i}", ("d", "d"))) >> Activation("gelu") >> Linear(Param("V{i}", ("d", "d"))))' for i in range(50)])  # fmt: skip
    opened.page.fill("#expression", long + "\n" + " >> ".join(f"f{i}" for i in range(50)))
    opened.page.evaluate("document.body.dataset.state = 'waiting'")
    opened.page.click("#prove")
    opened.page.click("#stop")
    opened.state("ended")
    assert opened.text("#status").startswith("Stopped.")
    assert opened.prove(EXAMPLES[0][1]) == told(EXAMPLES[0][1])


def test_without_python_for_the_browser_one_line_says_how_to_get_it(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for file in PROVER.iterdir():
        if file.is_file():
            shutil.copyfile(file, tmp_path / "elsewhere" / file.name)
    build.build(tmp_path / "site")
    page = Page(browser, tmp_path / "site")
    page.page.click("#prove")
    page.state("missing")
    assert "docs/prover/fetch.py" in page.text("#status")
    assert "\n" not in page.text("#status")
    page.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    if npm is None:
        pytest.skip("npm is not installed")
    done = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"]
    )
    file = folder / "node_modules/axe-core/axe.min.js"
    if done.returncode or not file.exists():
        pytest.skip("axe-core cannot be had: no registry")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_axe_finds_nothing_serious(opened, axe, width, scheme):
    page = opened.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    for title, text, options in (EXAMPLES[1], EXAMPLES[4], EXAMPLES[7], EXAMPLES[10]):
        opened.prove(text, options)
        if page.get_attribute("#answer", "data-outcome") == "proved":
            page.click("#check")
            opened.state("checked")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, title
        page.evaluate(axe)
        found = page.evaluate(
            "async () => (await axe.run(document, {resultTypes: ['violations']})).violations"
            ".filter(v => ['serious', 'critical'].includes(v.impact)).map(v => [v.id, v.nodes[0].html])"
        )
        assert found == [], title
