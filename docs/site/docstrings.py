"""Docstrings as Markdown: a doctest in one is fenced, so that it is set as a session.  Read by mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the tests import every file here, the site's own packages or not
    Extension = object


def fenced(text: str) -> str:
    """Put fences around each doctest: a paragraph that begins with a prompt.

    >>> fenced("Adds.\\n\\n>>> 1 + 1\\n2\\n\\nThat is all.")
    'Adds.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n\\nThat is all.'
    """
    paragraphs = re.split(r"\n[ \t]*\n", text)
    return "\n\n".join(_session(p) if p.lstrip().startswith(">>>") else p for p in paragraphs)


def _session(paragraph: str) -> str:
    lines = re.sub(r"[ \t]*# doctest:.*", "", paragraph).split("\n")
    return "\n".join(("```pycon", *(line.replace("<BLANKLINE>", "") for line in lines), "```"))


class Doctests(Extension):
    """Changes every docstring before it is rendered."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called by Griffe for each object that it has read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
