"""Where the pages are: what CONTROLLABILITY_DOCS names, the site that a checkout was built into, its sources, or nowhere."""

import argparse
import os
from pathlib import Path

from controllability.cli.output import Output
from controllability.errors import ControllabilityError

HOW = "they are built in a checkout: pip install -e '.[docs]' && mkdocs build --strict; CONTROLLABILITY_DOCS names another place"


def address(page: str = "index.html", root: Path = Path(__file__).parents[2]) -> str | None:
    """The URL of a page, or its source in the checkout ``root``; None where there is neither."""
    name, mark, anchor = page.partition("#")
    if named := os.environ.get("CONTROLLABILITY_DOCS"):
        whole = named if "://" in named else Path(named).absolute().as_uri()
        return f"{whole.removesuffix('/index.html').rstrip('/')}/{page}"
    if not (root / "mkdocs.yml").is_file():
        return None
    built, source = root / "site" / name, (root / "docs" / name).with_suffix(".md")
    return built.as_uri() + mark + anchor if built.is_file() else str(source)


def page_of(error: Exception) -> list[str]:
    """The line that names the page that explains an error; none where there are no pages."""
    where = address(error.page) if isinstance(error, ControllabilityError) else None
    return [f"  page:    {where}"] if where else []


def docs(args: argparse.Namespace, output: Output) -> int:
    """Print where the site begins, or how it is built."""
    where = address()
    built = where is not None and not where.endswith(".md")
    output.result({"page": where, "built": built, "how": HOW})
    output.text(str(where) if built else f"the pages are not built; {HOW}")
    return 0
