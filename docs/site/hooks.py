"""What MkDocs does not do by itself: pages from files of the repository, proof pages, prompts, anchors of rules.

Everything is a function of text, or of MkDocs' own objects that are passed in: this file imports without MkDocs.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # page -> file at the top
BUILDERS = ("course", "explorable", "prover")  # docs/NAME/build.py: build(site) writes its own files


def prompts(text: str) -> str:
    """A doctest becomes what a reader wants to see: a session, without marks for the test runner.

    >>> prompts("```python\\n>>> 1 + 1\\n2\\n\\n```")
    '```pycon\\n>>> 1 + 1\\n2\\n```'
    """

    def session(found: re.Match[str]) -> str:
        body = re.sub(r"[ \t]*# doctest:.*", "", found[1])
        return f"```pycon\n{body.replace('<BLANKLINE>', '').rstrip()}\n```"

    return re.sub(r"^```python\n(>>> .*?)^```$", session, text, flags=re.S | re.M)


def from_the_top(text: str) -> str:
    """Links of a file at the top of the repository, as they are between pages.

    >>> from_the_top("[theory](docs/theory.md#2-rules), [how](CONTRIBUTING.md), [terms](LICENSE)")
    '[theory](theory.md#2-rules), [how](contributing.md), terms'
    """
    for page, file in COPIED.items():
        text = text.replace(f"]({file})", f"]({page})")
    text = re.sub(r'((?:src|srcset|href)="|\]\()docs/', r"\1", text)
    return re.sub(r"\[([^\]]*)\]\(LICENSE\)", r"\1", text)


def anchored(text: str) -> str:
    """Rows of the rule tables, so that other pages can point at a rule.

    >>> anchored("| I-linear | input | z ↦ W z |")
    '| <span id="i-linear"></span>I-linear | input | z ↦ W z |'
    """
    row = r"^\| ([A-Z]-[a-z-]+|theorem-\w+)( jointly)? (?=\| (input|output|through) \|)"
    seen: set[str] = set()

    def name(found: re.Match[str]) -> str:
        anchor = (found[1] + (found[2] or "")).lower().replace(" ", "-")
        if anchor in seen:
            return found[0]
        seen.add(anchor)
        return f'| <span id="{anchor}"></span>{found[1]}{found[2] or ""} '

    return re.sub(row, name, text, flags=re.M)


def with_notebook(text: str, lesson: str) -> str:
    """A lesson with the way to its notebook under its title, which is a file of the site and no page.

    >>> with_notebook("# Lesson 1: x\\n\\n**Goal.**", "lesson-1")
    '# Lesson 1: x\\n\\n<a href="course/lesson-1.ipynb" download>This lesson as a notebook</a>\\n\\n**Goal.**'
    """
    title, rest = text.split("\n", 1)
    return f'{title}\n\n<a href="course/{lesson}.ipynb" download>This lesson as a notebook</a>\n{rest}'


def readme() -> str:
    """The README behind its first heading and picture; the start page says the rest in its own words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return from_the_top(text[text.index("On a fresh machine") :])


def on_files(files: Any, config: Any) -> Any:
    """Add pages that have their text elsewhere, and the proof pages of the gallery."""
    from mkdocs.structure.files import File

    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from gallery import pages

    for page, file in COPIED.items():
        text = from_the_top((ROOT / file).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    for name, text in pages():
        files.append(File.generated(config, f"gallery/{name}.html", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text that MkDocs turns into a page."""
    from gallery import table

    name = page.file.src_uri
    if name == "index.md":
        markdown = markdown.replace("<!-- README -->", readme())
    if name == "gallery.md":
        markdown = markdown.replace("<!-- GALLERY -->", table())
    if name == "reference.md":
        markdown = anchored(markdown)
    if re.fullmatch(r"lesson-\d\.md", name):
        markdown = with_notebook(markdown, name.removesuffix(".md"))
    if name == "api-components.md":  # a component's formula is its code
        markdown = re.sub(
            r"^(::: .*)$", r"\1\n    options: {show_source: true, merge_init_into_class: false}", markdown, flags=re.M
        )
    return prompts(markdown)


def on_post_build(config: Any) -> None:
    """The parts that are built by programs of their own, packages of docs/."""
    sys.path.insert(0, str(DOCS))
    for part in BUILDERS:
        if (DOCS / part / "build.py").exists():
            import_module(f"{part}.build").build(Path(config.site_dir))
