"""A survey on disk: a header, batches while it runs, one Parquet file a process when that is done.

A batch is there as a whole or not at all.  No file is changed, and one goes only when its rows stand in another; whoever reads takes a pair once.
"""

import json
import uuid
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from controllability.bounded_files import read_whole
from controllability.errors import BadInput, PatchError, in_a_line
from controllability.models.files.folders import written

HEADER, BATCHES = "survey.json", "batches"
COLUMNS = {
    "sample": "int64", "line": "int64", "id": "string", "layer": "int32", "call": "int32", "parameter": "string", "token": "int32",
    "rank": "int32", "norm": "float64", "relative_norm": "float64", "cosine_to_mean": "float64", "margin": "float64", "route": "string",
    "error": "string",
}  # fmt: skip


def require() -> None:
    """Raise ``BadInput`` without pyarrow."""
    if find_spec("pyarrow") is None:
        raise BadInput(
            "a survey is written as Parquet, with pyarrow, which is not installed (in a checkout: pip install '.[tables]')"
        )


def table(parts: Iterable[dict[str, list[Any]]]) -> Any:
    """A pyarrow table of columns put end to end; a column that a part lacks is null there."""
    import pyarrow  # type: ignore[import-not-found]

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    full = ({name: part.get(name) or [None] * len(part["sample"]) for name in COLUMNS} for part in parts)
    return pyarrow.concat_tables(pyarrow.table(each, schema=schema) for each in full)


def empty() -> Any:
    """A table without rows."""
    return table([{"sample": []}])


def in_order(tables: Iterable[Any]) -> Any:
    """The tables of different pairs as one, in the order of the data."""
    import pyarrow  # type: ignore[import-not-found]

    whole = pyarrow.concat_tables([empty(), *tables])
    return whole.take(whole["sample"].to_numpy().argsort(kind="stable"))


def begin(out: Path, header: dict[str, Any]) -> None:
    """Make the directory, or find it begun by the same survey.  Raises ``BadInput`` where something else is in it."""
    try:
        held = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    except OSError as error:
        raise PatchError(f"cannot use {out}: {error.strerror}") from None
    if HEADER not in held:
        if held:
            raise BadInput(f"{out} exists already and is neither empty nor a survey: it holds {held[0]}")
        with written(out / HEADER, HEADER) as folder:
            (folder / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
    known = header_of(out)
    if other := [name for name in header if known.get(name) != header[name]]:
        raise BadInput(
            f"{out} holds another survey: of {', '.join(other)} it says something else; give a new directory, or the same survey"
        )


def header_of(out: Path) -> dict[str, Any]:
    """What a survey says of itself.  Raises ``BadInput`` for a directory without one."""
    try:
        header = json.loads(read_whole(out / HEADER, 1 << 20))
        if header["format"] == 1 and isinstance(header["pairs"], int):
            return header
    except OSError as error:
        raise BadInput(f"{out} holds no survey: {HEADER}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise BadInput(f"{out / HEADER} is damaged, or of another version")


def write_batch(out: Path, index: int, found: Any) -> None:
    """Put the table of a batch there, as a whole or not at all."""
    _write(out / BATCHES / f"{index:06}.parquet", [found])


def _write(path: Path, tables: Iterable[Any]) -> None:
    from pyarrow.parquet import ParquetWriter  # type: ignore[import-not-found]

    try:
        with (
            written(path, "part") as folder,
            open(folder / "part", "wb") as stream,
            ParquetWriter(stream, empty().schema) as writer,
        ):
            for each in tables:
                writer.write_table(each)
    except PatchError as error:
        raise PatchError(f"{error}; what was written before stays, and the same survey goes on from there") from None


def tables(out: Path, columns: list[str] | None = None) -> list[Any]:
    """Every table that was written, each pair in one of them."""
    while True:  # another process may put batches together meanwhile
        with suppress(FileNotFoundError):
            files = [*sorted(out.glob("part-*.parquet")), *sorted((out / BATCHES).glob("*.parquet"))]
            return _once(_read(file, columns) for file in files)


def _once(found: Iterable[Any]) -> list[Any]:
    """The tables without the rows of pairs that an earlier one has."""
    import numpy

    kept, known = [], numpy.array([], dtype="int64")
    for each in found:
        numbers = each["sample"].to_numpy()
        fresh = ~numpy.isin(numbers, known)
        kept.append(each if fresh.all() else each.filter(fresh))
        known = numpy.union1d(known, numbers)
    return kept


def _read(file: Path, columns: list[str] | None = None) -> Any:
    from pyarrow import ArrowException  # type: ignore[import-not-found]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-not-found]

    try:
        with ParquetFile(file) as opened:
            if opened.schema_arrow.equals(empty().schema):
                return opened.read(columns)
    except FileNotFoundError:
        raise
    except (ArrowException, OSError) as error:
        raise PatchError(f"{file} is damaged ({in_a_line(error, 80)}): delete it, and run the survey again") from None
    raise PatchError(f"{file} is no table of a survey: take it out of this directory")


def written_pairs(out: Path) -> set[int]:
    """The numbers of the pairs that are written."""
    return {number for each in tables(out, ["sample"]) for number in each["sample"].to_pylist()}


def finish(out: Path, own: range, rank: int, world: int) -> None:
    """Put these batches into one file under a name of its own, and let them go when it is there."""
    files = [file for index in own if (file := out / BATCHES / f"{index:06}.parquet").exists()]
    known = {n for part in out.glob("part-*.parquet") for n in _read(part, ["sample"])["sample"].to_pylist()}
    fresh = [file for file in files if _read(file, ["sample"])["sample"][0].as_py() not in known]
    if fresh:
        _write(out / f"part-{rank:05}-of-{world:05}-{uuid.uuid4().hex[:8]}.parquet", map(_read, fresh))
    for file in files:
        file.unlink(missing_ok=True)
    with suppress(OSError):
        (out / BATCHES).rmdir()
