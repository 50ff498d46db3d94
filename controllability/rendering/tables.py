"""A table as aligned text, or as HTML for a notebook; the first row is its heading."""

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def number(value: float | None) -> str:
    """A number for a table."""
    return "–" if value is None else f"{value:.2g}"


def aligned(rows: Rows) -> str:
    """Columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def html_table(title: str, rows: Rows, below: str = "") -> str:
    """A table that scrolls where it is too wide, each line of ``below`` under it."""
    tags = ("th", *["td"] * (len(rows) - 1))
    lines = ("".join(f"<{tag}>{escape(c)}</{tag}>" for c in row) for tag, row in zip(tags, rows, strict=True))
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    told = "".join(f"<p>{escape(line)}</p>" for line in below.splitlines())
    return f'<div style="overflow-x:auto"><table><caption>{escape(title)}</caption>{table}</table></div>{told}'
