"""What the catalogue says of every architecture: all of them are proved once a session, not once a test."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import architectures
from controllability.cli import catalogue


@functools.cache
def every_row() -> list[dict[str, Any]]:
    return catalogue.rows()


@functools.cache
def patchable_families() -> dict[str, list[str]]:
    """The first family of each shape that has a proof -> all families of that shape."""
    return {names[0]: names for shape, names in catalogue.shapes(every_row()).items() if shape[2] == "patchable"}


def one_of_each_shape(model_types: Iterable[str]) -> set[str]:
    """Of these the first of each shape."""
    shape = {name: first for first, names in patchable_families().items() for name in names}
    found: dict[str, str] = {}
    for model_type in model_types:
        found.setdefault(shape[architectures.find(model_type).name], model_type)
    return set(found.values())
