"""Each lesson as an executed notebook, from the lesson's own Markdown: ``python docs/course/build.py OUT`` or ``build(site)``.

A doctest example becomes a cell, and what it printed is stored in it.  It has to be what the page says, or nothing is written.
"""

from __future__ import annotations

import base64
import doctest
import io
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

DOCS = Path(__file__).resolve().parent.parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS  # as in pyproject.toml
SETUP = (
    '# Runs where the package is installed, from a checkout (it has no public address yet):  pip install . "torch<2.14"'
)


def lessons() -> list[Path]:
    """The lessons' pages, in order.

    >>> [page.name for page in lessons()][::7]
    ['lesson-1.md', 'lesson-8.md']
    """
    return sorted(DOCS.glob("lesson-*.md"))


class Recorder(doctest.DocTestRunner):
    """Runs a page's examples and keeps what each of them gave; the first that gives something else is an error."""

    def __init__(self) -> None:
        super().__init__(verbose=False, optionflags=FLAGS)
        self.got: list[str] = []

    def report_success(self, out: Any, test: Any, example: Any, got: str) -> None:
        self.got.append(got)

    def report_failure(self, out: Any, test: Any, example: Any, got: str) -> None:
        raise doctest.DocTestFailure(test, example, got)

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        raise doctest.UnexpectedException(test, example, exc_info)


def executed(text: str, name: str) -> tuple[list[doctest.Example], list[str]]:
    """The examples of a page and what each printed, run in one namespace; DocTestFailure where the page says something else.

    >>> [*zip(*executed(">>> 1 + 1\\n2\\n", "page"))][0][1]
    '2\\n'
    """
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, name, 0)
    recorder = Recorder()
    with patch.dict(os.environ, COLUMNS="100"):  # as wide as the pages are, wherever they are built
        recorder.run(test, out=io.StringIO().write, clear_globs=True)
    return test.examples, recorder.got


def notebook(page: Path) -> Any:
    """A page as a notebook that was run: Markdown cells, one code cell for each example that prints, with what it printed."""
    from nbformat import v4

    text = page.read_text(encoding="utf-8")
    examples, outputs = executed(text, page.name)
    waiting = iter(zip(examples, outputs, strict=True))
    cells, folded = [v4.new_code_cell(SETUP)], False
    for i, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.M | re.S)):
        if i % 2:
            cells += _code(v4, [next(waiting) for _ in doctest.DocTestParser().get_examples(part)], folded)
            continue
        folded = part.rfind("<details") > part.rfind("</details>")
        words = part.split("</details>", 1)[1] if part.lstrip().startswith("</details>") else part
        if words.strip():  # a fold cannot hold other cells: it ends with its own
            cells.append(_markdown(v4, words + "\n</details>" if folded else words))
    for number, cell in enumerate(cells):  # the same file from the same page
        cell["id"] = f"cell-{number}"
    for number, cell in enumerate([cell for cell in cells if cell["cell_type"] == "code"], 1):
        cell["execution_count"] = number
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def _code(v4: Any, block: list[tuple[doctest.Example, str]], folded: bool) -> list[Any]:
    """Cells of one block: a cell ends where something is printed, as a notebook shows what its last line gives."""
    cells, source = [], ""
    hidden = {"jupyter": {"source_hidden": True, "outputs_hidden": True}} if folded else {}
    for count, (example, got) in enumerate(block, 1):
        source += example.source
        if got or count == len(block):
            cells.append(v4.new_code_cell(source.rstrip("\n"), outputs=_outputs(v4, example, got), metadata={**hidden}))
            source = ""
        if example.exc_msg is not None:
            cells[-1]["metadata"]["tags"] = ["raises-exception"]
    return cells


def _outputs(v4: Any, example: doctest.Example, got: str) -> list[Any]:
    if not got:
        return []
    if example.exc_msg is None:
        return [v4.new_output("stream", name="stdout", text=got)]
    last = got[got.rindex("\nTraceback") if "\nTraceback" in got else 0 :]
    said = re.search(r"^(?:\w+\.)*(\w+): (.*)", last, flags=re.M | re.S)
    assert said is not None, last
    message = said[0].rstrip("\n")
    return [v4.new_output("error", ename=said[1], evalue=said[2].rstrip("\n"), traceback=message.split("\n"))]


def _markdown(v4: Any, text: str) -> Any:
    """Text with its picture in it, and links that lead from ``course/`` to the site."""
    pictures: dict[str, dict[str, str]] = {}

    def attached(match: re.Match[str]) -> str:
        pictures[match[2]] = {"image/svg+xml": base64.b64encode((DOCS / match[2]).read_bytes()).decode()}
        return f"![{' '.join(match[1].split())}](attachment:{match[2]})"

    text = re.sub(r"!\[([^\]]*)\]\(([\w-]+\.svg)\)", attached, text)
    text = re.sub(r"\]\((lesson-\d)\.md", r"](\1.ipynb", text)
    text = re.sub(r"\]\((\w[\w-]*)\.md", r"](../\1.html", text)
    text = text.replace('<details markdown="1">', "<details>")
    cell = v4.new_markdown_cell(text.strip("\n"))
    if pictures:
        cell["attachments"] = pictures
    return cell


def build(site: Path) -> list[Path]:
    """Write ``course/lesson-N.ipynb`` under the built site; returns the paths."""
    import nbformat

    folder = Path(site) / "course"
    made = {folder / f"{page.stem}.ipynb": notebook(page) for page in lessons()}
    folder.mkdir(parents=True, exist_ok=True)
    for path, found in made.items():
        nbformat.validate(found)
        nbformat.write(found, path)
    return [*made]


if __name__ == "__main__":
    print(*build(Path(sys.argv[1])), sep="\n")
