"""The README of an index page: its links lead to the repository, as nothing lies beside it there.  All else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
SOURCE = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]


def absolute(text: str) -> str:
    """Markdown with every relative link made absolute; pictures are linked raw."""
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{SOURCE}/raw/main/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{SOURCE}/blob/main/", text)


setup(
    long_description=absolute((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
