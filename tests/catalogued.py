"""What the catalogue says of every architecture: all of them are proved once a session, not once a test."""

from __future__ import annotations

import functools
from typing import Any

from controllability.cli.catalogue import rows, shapes  # themselves: tests replace what the module holds


@functools.cache
def every_row() -> list[dict[str, Any]]:
    return rows()


@functools.cache
def patchable_families() -> dict[str, list[str]]:
    """The first family of each shape that has a proof -> all families of that shape."""
    return {names[0]: names for shape, names in shapes(every_row()).items() if shape[2].startswith("patchable")}
