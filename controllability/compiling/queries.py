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
    """A text and how many times it counts in a least-squares fit (an exact patch does not weigh).

    ``wordings`` are other texts for the same question: further queries with the same weight and answer.  ``answer`` is a text that belongs to the set
    behind the query, and is compared with what the model says itself.  A ``hard`` query is one that a fit has to reach.

    >>> Query("Where does Mia live ?", wordings=("In which city does Mia stay ?",), answer="Oslo").each()[1].text
    'In which city does Mia stay ?'
    """

    text: str
    weight: int = 1
    wordings: Sequence[str] = ()
    answer: str | None = None
    hard: bool = False

    def each(self) -> list["Query"]:
        """The query and its wordings, each a query of its own."""
        return [replace(self, text=text, wordings=()) for text in (self.text, *self.wordings)]


FIELDS = {"query": "text"} | {name: name for name in ("weight", "wordings", "answer", "hard")}


def read_queries(path: str | Path, what: str = "queries") -> tuple[list[Query], list[str]]:
    """(queries, warnings) of a UTF-8 file ("-": standard input): one query a line, blank lines ignored; ``.jsonl``: an object a line.

    Its fields are {"query": …, "weight": 1, "wordings": […], "answer": …, "hard": false}.  Each wording becomes a query of its own; a
    repeated text is kept once, with a warning.  Raises ``BadInput`` for a file that is missing, not UTF-8, without
    queries, or has a line that is not what it should be, and for two answers to one query.
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
    return [_checked(query, f"{what}[{i}]") for i, query in enumerate(found)]


def without_repeats(queries: Sequence[Query], what: str = "queries") -> tuple[list[Query], list[str]]:
    """Each text once, wordings as queries of their own, the first of its kind, and a warning for every further one.

    Raises ``BadInput`` where the same text is given two answers.
    """
    kept: dict[str, Query] = {}
    repeated: dict[str, int] = {}
    for query in [one for given in queries for one in given.each()]:
        key = query.text.strip()
        first = kept.setdefault(key, query)
        if first is query:
            continue
        refuse_contradiction(first, query)
        kept[key] = replace(first, answer=first.answer or query.answer)
        repeated[key] = repeated.get(key, 1) + 1
    notes = [f"the {what} hold {text!r} {count} times: it is taken once" for text, count in repeated.items()]
    return [*kept.values()], notes


def refuse_contradiction(one: Query, other: Query) -> None:
    """Raise ``BadInput`` where two queries that are the same are given different answers."""
    if one.answer and other.answer and one.answer.split() != other.answer.split():
        same = "" if one.text.strip() == other.text.strip() else f" (which has the tokens of {other.text!r})"
        raise BadInput(
            f"the query {one.text!r}{same} is given two answers, {one.answer!r} and {other.answer!r}: leave one of them out"
        )


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
    if unknown := sorted(set(data) - set(FIELDS)):
        *names, last = FIELDS
        raise BadInput(f"{where} has an unknown field {unknown[0]!r}: the fields are {', '.join(names)} and {last}")
    return _checked(Query(**{FIELDS[name]: value for name, value in data.items()}), f"{where}: the query")


def _checked(query: Any, where: str) -> Query:
    """A query whose every field is what it should be.  Raises ``BadInput``."""
    if not isinstance(query, Query):
        raise BadInput(f"{where} must be a text or a Query, got {type(query).__name__}")
    refuse_no_text(query.text, where)
    if isinstance(query.wordings, str) or not isinstance(query.wordings, Sequence):
        raise BadInput(f"{where}: wordings must be a list of texts, got {query.wordings!r:.80}")
    for i, text in enumerate(query.wordings):
        refuse_no_text(text, f"{where}: wordings[{i}]")
    if query.answer is not None:
        refuse_no_text(query.answer, f"{where}: the answer")
    if not isinstance(query.hard, bool):
        raise BadInput(f"{where}: hard must be true or false, got {query.hard!r:.80}")
    return replace(query, weight=_weight(query.weight, where), wordings=tuple(query.wordings))


def _weight(value: Any, where: str) -> int:
    number = isinstance(value, int | float | np.integer) and not isinstance(value, bool)
    if not number or not 1 <= value <= LARGEST_WEIGHT or value % 1:
        raise BadInput(f"{where}: a weight must be a whole number from 1 to {LARGEST_WEIGHT}, got {value!r}")
    return int(value)
