"""Patches of many (context, query) pairs as one table, batch by batch; what is written is never computed again."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controllability.errors import BadInput, ControllabilityError, in_a_line
from controllability.instrument import survey_files as files
from controllability.instrument.pairs import Pair, batches, digest, read_pairs
from controllability.instrument.states import padded
from controllability.models.hooks.carried_patches import refuse_carried, uncompiled
from controllability.models.patch_model import patch_model
from controllability.models.patches.parts import Parts
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import known_fingerprint
from controllability.models.sweep.target_run import Progress, silent


@dataclass(frozen=True, eq=False, repr=False)
class Survey:
    """``table`` (pyarrow): the rows of ``mp.frame()`` of every pair in the order of the data, ``sample`` its number, ``line`` and ``id``
    where it stands; ``errors``: of each pair without a patch {sample, line, id, error}; ``pairs``: how many there are in the data.
    """

    table: Any
    errors: list[dict[str, Any]]
    pairs: int

    def __repr__(self) -> str:
        return (
            f"Survey({self.table.num_rows:,} rows, {self.done:,} of {self.pairs:,} pairs, {len(self.errors):,} errors)"
        )

    @property
    def done(self) -> int:
        """How many pairs are in the table or among the errors."""
        return len(self.table["sample"].unique()) + len(self.errors)

    def frame(self) -> Any:
        """The table as a ``pandas.DataFrame`` where pandas is installed, else as a list of dicts."""
        return self.table.to_pandas() if find_spec("pandas") else self.table.to_pylist()

    @staticmethod
    def of(tables: Iterable[Any], pairs: int) -> "Survey":
        """Tables of different pairs put in the order of the data."""
        whole = files.in_order(tables)
        good, bad = (whole.filter(mask) for mask in (whole["error"].is_null(), whole["error"].is_valid()))
        return Survey(good.drop_columns("error"), bad.select(["sample", "line", "id", "error"]).to_pylist(), pairs)


def survey(
    model: nn.Module, tokenizer: Any, rows: str | Path | Iterable[Any], out: str | Path | None = None, batch: int = 16,
    scope: str = "each", positions: str = "keep", via: str = "input-output", route: str = "secular", place: str | None = None,
    progress: Progress = silent,
) -> Survey:  # fmt: skip
    """The patches of many (context, query) pairs as a table: the rows of ``mp.frame()``, in Parquet files.

    ``rows``: a UTF-8 file with {"context": TEXT, "query": TEXT, "id": NAME} a line (other fields are passed over), or such mappings.  ``out``: a
    directory, new, empty or of the same survey, which then goes on: a batch is written as a whole or not at all, and never computed again.  None
    keeps the table in memory.  ``batch`` pairs of about the same length are one run; a pair that cannot be patched is an
    error with its line and reason, and stops nothing.  ``scope`` is "each" or "last"; ``positions`` as in ``encode``; ``via``, ``route``
    and ``place`` as in ``patch_model`` ("auto" chooses one route for a batch).  Under ``torchrun`` or ``accelerate launch`` each process takes its share
    of the batches.  Needs pyarrow.  More: docs/surveys.md.

    The model is left as it was.  Raises ``BadInput`` for rows of which none can be used, for options that no pair could be patched with
    (``NotControllable`` likewise), and for a directory of another survey; ``PatchError`` where it cannot be written.  Source: new.

    >>> import controllability as ct
    >>> model, tokenizer = ct.load_model("embedded")
    >>> pairs = [{"context": "Mia lives in Oslo .", "query": "Where does Mia live ?"}, {"context": "", "query": "Who ?"}]
    >>> found = ct.survey(model, tokenizer, pairs)  # doctest: +SKIP
    >>> found.table.num_rows, found.errors[0]["error"]  # doctest: +SKIP
    (60, 'the context is empty')
    """
    files.require()
    if out is not None and not str(out).strip():
        raise BadInput("out is empty: give a directory")
    model, options = uncompiled(model), {"scope": scope, "via": via, "route": route, "place": place}
    _refuse_options(model, options, batch, positions)
    pairs = read_pairs(rows, tokenizer, positions)
    plan = batches(pairs, batch)
    if out is None:
        return Survey.of(_tables(model, list(enumerate(plan)), options, progress), len(pairs))
    header = {
        "format": 1, "model": known_fingerprint(model), "data": digest(pairs), "pairs": len(pairs), "batch": batch,
        "positions": positions, **options,
    }  # fmt: skip
    rank, world = process()
    folder = Path(out)
    files.begin(folder, header)
    written = files.written_pairs(folder)
    own = [*enumerate(plan)][rank::world]
    left = [(index, each) for index, each in own if each[0].number not in written]
    done = sum(len(each) for _, each in own) - sum(len(each) for _, each in left)
    for (index, _), table in zip(left, _tables(model, left, options, progress, done), strict=True):
        files.write_batch(folder, index, table)
    files.finish(folder, range(rank, len(plan), world), rank, world)
    return read_survey(folder, partial=True)


def read_survey(directory: str | Path, partial: bool = False) -> Survey:
    """What ``survey`` has written, of all its processes, in the order of the data.

    ``partial`` takes what there is of a survey that is not complete.  Raises ``BadInput`` for a directory of something else and for a survey that
    is not complete, ``PatchError`` for damaged files.

    >>> # ct.read_survey("found").table
    """
    files.require()
    folder = Path(directory)
    pairs = files.header_of(folder)["pairs"]
    found = Survey.of(files.tables(folder), pairs)
    if found.done < pairs and not partial:
        raise BadInput(
            f"{folder}: {pairs - found.done} of {pairs} pairs are not written yet: run the same survey again, or take what there is with partial=True"
        )
    return found


def _refuse_options(model: nn.Module, options: dict[str, Any], batch: Any, positions: str) -> None:
    """Raise now what every pair would raise."""
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise BadInput(f"batch must be a whole number from 1 on, got {batch!r}")
    for name, value, known in (
        ("scope", options["scope"], ("each", "last")),
        ("positions", positions, ("keep", "reset")),
    ):
        if value not in known:
            raise BadInput(f"unknown {name} {value!r}: choose {' or '.join(known)}")
    refuse_carried(model, "a survey")
    checked_reading(model, place=options["place"]).proofs(options["via"], options["route"])


def process() -> tuple[int, int]:
    """(which process, of how many), as torchrun and accelerate say.  Raises ``BadInput``."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if told == [None, None]:
        return 0, 1
    try:
        rank, world = (int(value or "") for value in told)
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world:
        raise BadInput(
            f"RANK={told[0]} and WORLD_SIZE={told[1]} in the environment are no number of a process and of processes"
        )
    return rank, world


def _tables(
    model: nn.Module, left: list[tuple[int, list[Pair]]], options: dict[str, Any], progress: Progress, done: int = 0
) -> Iterator[Any]:  # fmt: skip
    """The table of each batch; ``done`` pairs were before."""
    total = done + sum(len(each) for _, each in left)
    progress("pairs", done, total)
    for _, each in left:
        good = [pair for pair in each if pair.error is None]
        parts = [_failed(pair, pair.error) for pair in each if pair.error is not None]
        yield files.table(parts + (_solved(model, good, options) if good else []))
        done += len(each)
        progress("pairs", done, total)


def _solved(model: nn.Module, pairs: list[Pair], options: dict[str, Any]) -> list[dict[str, list[Any]]]:
    """The columns of a batch; where it fails those of its halves, so that one pair alone is to blame."""
    device = next(model.parameters()).device
    target, source = (
        padded([[*ids] for ids in side], device) for side in zip(*((p.target, p.source) for p in pairs), strict=True)
    )
    steps = torch.arange(source["input_ids"].shape[1])
    last = torch.tensor(
        [[len(pair.source) - 1] for pair in pairs]
    )  # padding has no position of its own, which might be none of the model's
    source["position_ids"] = (torch.tensor([[pair.start] for pair in pairs]) + steps.minimum(last)).to(device)
    try:
        found = Parts(patch_model(model, target, source, **options)).columns()
    except (ControllabilityError, torch.OutOfMemoryError) as error:
        if len(pairs) == 1:
            return [_failed(pairs[0], in_a_line(error))]
        half = len(pairs) // 2
        return _solved(model, pairs[:half], options) + _solved(model, pairs[half:], options)
    of = [pairs[sample] for sample in found["sample"]]
    return [found | {"sample": [p.number for p in of], "line": [p.line for p in of], "id": [p.id for p in of]}]


def _failed(pair: Pair, why: str | None) -> dict[str, list[Any]]:
    return {"sample": [pair.number], "line": [pair.line], "id": [pair.id], "error": [why]}
