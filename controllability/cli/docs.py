"""Where the pages are: the address that CONTROLLABILITY_DOCS names, the site that a checkout was built into, its sources, or nowhere."""

import argparse
import os
from pathlib import Path

from controllability.cli.output import Output
from controllability.errors import ControllabilityError

VARIABLE = "CONTROLLABILITY_DOCS"
HOW = f"they are built in a checkout of the source: pip install -e '.[docs]' && mkdocs build --strict; {VARIABLE} names another place"


def address(page: str = "index.html", root: Path = Path(__file__).parents[2]) -> str | None:
    """Where a page of the site is, ``root`` being the checkout: a URL, or the source of the page; None where there is neither.

    >>> address("refusals.html#no-proof", Path("nowhere")) is None
    True
    """
    name, _, anchor = page.partition("#")
    end = f"#{anchor}" * bool(anchor)
    if named := os.environ.get(VARIABLE):
        whole = named if "://" in named else Path(named).absolute().as_uri()
        return f"{whole.rstrip('/').removesuffix('/index.html')}/{page}"
    if not (root / "mkdocs.yml").is_file():
        return None
    built, source = root / "site" / name, (root / "docs" / name).with_suffix(".md")
    return built.as_uri() + end if built.is_file() else str(source)


def page_of(error: Exception) -> list[str]:
    """The line that names the page that explains an error; none where there are no pages."""
    where = address(error.page) if isinstance(error, ControllabilityError) else None
    return [f"  page:    {where}"] if where else []


def docs(args: argparse.Namespace, output: Output) -> int:
    """Print where the site begins, or how it is built."""
    where = address()
    output.result({"page": where, "built": where is not None and not where.endswith(".md"), "how": HOW})
    if where is None or where.endswith(".md"):
        output.text(f"the pages are not built; {HOW}" + f"\nsource: {where}" * bool(where))
    else:
        output.text(where)
    return 0
