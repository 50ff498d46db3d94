"""Queries as people write them: one a line in a text file, or JSON lines with a weight."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controllability.errors import BadInput
from controllability.texts import read_text

LARGEST_WEIGHT = 100


@dataclass(frozen=True)
class Query:
    """A text and how many times it counts in a least-squares fit (an exact patch does not weigh)."""

    text: str
    weight: int = 1


def read_queries(path: str | Path, what: str = "queries") -> tuple[list[Query], list[str]]:
    """(queries, warnings) of a UTF-8 file ("-": standard input): one query a line, blank lines ignored; ``.jsonl``: {"query": …, "weight": 1}.

    A repeated query is kept once, with a warning.  Raises ``BadInput`` for a file that is missing, not UTF-8, without
    queries, or has a line that is not what it should be.
    """
    path, lines = Path(path), read_text(path, f"the {what} file").splitlines()
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        found = [_from_json(line, f"{path}, line {i}") for i, line in numbered]
    else:
        found = [Query(line) for _, line in numbered]
    if not found:
        raise BadInput(f"the {what} file {path} is empty: write one text a line")
    return without_repeats(found, what)


def refuse_no_text(text: Any, what: str) -> None:
    """Raise ``BadInput`` for what is no text, an empty one, or one with half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(text, str):
        raise BadInput(f"{what} must be a text, got {type(text).__name__}")
    if not text.strip():
        raise BadInput(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} cannot be written as UTF-8: character {error.start} is {text[error.start]!a}") from None


def as_queries(items: Iterable[str | Query], what: str = "queries") -> list[Query]:
    """Queries given from Python.  Raises ``BadInput`` for what is neither a text nor a ``Query``, and for empty texts."""
    if isinstance(items, str):
        raise BadInput(f"{what}: give a list of texts, got a single text")
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise BadInput(f"{what}: give a list of texts, got {type(items).__name__}")
    found = [Query(item) if isinstance(item, str) else item for item in items]
    for i, query in enumerate(found):
        if not isinstance(query, Query):
            raise BadInput(f"{what}[{i}] must be a text or a Query, got {type(query).__name__}")
        refuse_no_text(query.text, f"{what}[{i}]")
    return [replace(query, weight=_weight(query.weight, f"{what}[{i}]")) for i, query in enumerate(found)]


def without_repeats(queries: Sequence[Query], what: str = "queries") -> tuple[list[Query], list[str]]:
    """Each text once, the first of its kind, and a warning for every further one."""
    kept: dict[str, Query] = {}
    repeated: dict[str, int] = {}
    for query in queries:
        key = query.text.strip()
        if key in kept:
            repeated[key] = repeated.get(key, 1) + 1
        kept.setdefault(key, query)
    notes = [f"the {what} hold {text!r} {count} times: it is taken once" for text, count in repeated.items()]
    return [*kept.values()], notes


def refuse_overlap(queries: Iterable[Query], heldout: Iterable[Query]) -> None:
    """Raise ``BadInput`` when a held-out query is one of the queries: it would say nothing of what generalises."""
    known = {query.text.strip() for query in queries}
    shared = [query.text.strip() for query in heldout if query.text.strip() in known]
    if shared:
        more = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
        raise BadInput(f"the held-out query {shared[0]!r}{more} is one of the queries: leave it out of one of the two")


def _from_json(line: str, where: str) -> Query:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("query"), str) or not data["query"].strip():
        raise BadInput(f'{where} has no query: write {{"query": "…"}}')
    if unknown := sorted(set(data) - {"query", "weight"}):
        raise BadInput(f"{where} has an unknown field {unknown[0]!r}: the fields are query and weight")
    refuse_no_text(data["query"], f"{where}: the query")
    return Query(data["query"], _weight(data.get("weight", 1), where))


def _weight(value: Any, where: str) -> int:
    number = isinstance(value, int | float | np.integer) and not isinstance(value, bool)
    if not number or not 1 <= value <= LARGEST_WEIGHT or value % 1:
        raise BadInput(f"{where}: a weight must be a whole number from 1 to {LARGEST_WEIGHT}, got {value!r}")
    return int(value)
