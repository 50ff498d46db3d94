"""The README of an index page: nothing lies beside it there, so links to files are their text.  All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def standing_alone(text: str) -> str:
    """Markdown without relative links."""
    return re.sub(r"!?\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    long_description=standing_alone((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
