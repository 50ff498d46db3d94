"""The (context, query) pairs of a survey as tokens, in batches; what is wrong with a pair stands in its place."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from controllability.bounded_files import opened
from controllability.errors import BadInput, in_a_line, printable
from controllability.models.loading import encode

LARGEST = 1 << 30  # bytes of a data file
WINDOW = 16  # batches whose pairs are put in order of length, so that little is padding


class Pair(NamedTuple):
    """A pair by its ``number`` and ``line``: the tokens of its target and its source, and the source's first position; or its ``error``."""

    number: int
    line: int
    id: str | None
    target: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    start: int = 0
    error: str | None = None


def read_pairs(rows: str | Path | Iterable[Any], tokenizer: Any, positions: str) -> list[Pair]:
    """Of a JSON-lines file, or of mappings {"context": …, "query": …, "id": …}.  Raises ``BadInput`` where there is none to be used."""
    is_file = isinstance(rows, str | Path)
    if not is_file and (isinstance(rows, bytes | Mapping) or not isinstance(rows, Iterable)):
        raise BadInput(f"give the name of a JSON-lines file, or a list of mappings, got {type(rows).__name__}")
    given = _lines(Path(rows)) if isinstance(rows, str | Path) else enumerate(rows, 1)
    pairs = [_pair(number, line, row, tokenizer, positions) for number, (line, row) in enumerate(given)]
    where = str(rows) if is_file else "rows"
    if not pairs:
        raise BadInput(f'{where} holds no pairs: write one a line, {{"context": "…", "query": "…"}}')
    if is_file and all(pair.error for pair in pairs):
        raise BadInput(f"{where} holds no pair that can be used; line {pairs[0].line}: {pairs[0].error}")
    return pairs


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its object, or a ``ValueError``) of every line that is not blank."""
    try:
        with opened(path, LARGEST) as (stream, _):
            for line, raw in enumerate(stream, 1):
                if raw.strip():
                    yield line, _object(raw)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None


def _object(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"it is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}")
    except json.JSONDecodeError as error:
        return ValueError(f"it is not JSON: {error.msg}, character {error.pos}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits
        return ValueError(f"it is not JSON that can be read: {in_a_line(error, 80)}")


def _pair(number: int, line: int, row: Any, tokenizer: Any, positions: str) -> Pair:
    name = row.get("id") if isinstance(row, Mapping) else None
    pair = Pair(number, line, None if name is None else str(name))
    try:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, Mapping):
            raise ValueError(f"it is no object but {type(row).__name__}")
        for field in ("context", "query"):
            if not isinstance(row.get(field), str):
                raise ValueError(f"its {field} is no text" if field in row else f"it has no {field}")
            row[field].encode()
        target, source = encode(tokenizer, row["context"], row["query"], positions)
    except UnicodeEncodeError as error:
        return pair._replace(error=f"character {error.start} of a text is half of a surrogate pair")
    except ValueError as error:  # BadInput is one
        return pair._replace(error=printable(str(error)))
    ids = (tuple(given["input_ids"][0].tolist()) for given in (target, source))
    return Pair(number, line, pair.id, *ids, start=int(source["position_ids"][0, 0]))


def batches(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Every pair once, ``size`` of about the same length together."""
    found = []
    for at in range(0, len(pairs), WINDOW * size):
        window = sorted(pairs[at : at + WINDOW * size], key=lambda pair: len(pair.target))
        found += [window[i : i + size] for i in range(0, len(window), size)]
    return found


def digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 over the pairs as tokens, with their names."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(f"{json.dumps(pair[:-1])}\n".encode())
    return found.hexdigest()
