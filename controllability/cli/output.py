"""What the commands print: tables and progress for people, one JSON object for scripts."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from controllability.cli.streams import spelt
from controllability.errors import NotControllable, SideConditionFailed, printable
from controllability.rendering.tables import number as number

Progress = Callable[[str, int, int], None]


class Output:
    """stdout carries the result, stderr everything else."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.quiet = False  # no bars: one process of several shows its own

    def result(self, data: dict[str, Any]) -> None:
        """The JSON object, when JSON was asked for.  Non-finite numbers are a failure, not text."""
        if self.as_json:
            print(json.dumps(data, indent=1, allow_nan=False))

    def text(self, text: str) -> None:
        """Plain text for people; nothing in it drives the terminal."""
        if not self.as_json:
            print(printable(text, but="\n\t"))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table for people; where its words do not fit the terminal, the cells of a row stand below each other."""
        if self.as_json:
            return
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table

        from controllability.rendering.text import wrapped

        console = Console(markup=False, emoji=False, highlight=False)  # a name in brackets is no style
        shown = lambda cell: spelt(printable(cell, but="\n"), console.encoding)  # noqa: E731
        columns, *rows = [[*map(shown, row)] for row in (columns, *rows)]
        title, longest = printable(title), list[int]()
        for column in zip(columns, *rows, strict=True):
            longest.append(max(cell_len(word) for cell in column for word in cell.split() or [""]))
        if sum(longest) + 3 * len(columns) > console.width:
            below = ["\n".join(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True)) for row in rows]
            lines = [line for part in (title, *below) for line in (*part.splitlines(), "")]
            shorter = (wrapped(line, console.width, "", "  ", whole=True) for line in lines)
            print("\n".join(text for parts in shorter for text in parts).rstrip())
            return
        table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
        whole = (max(map(cell_len, column)) for column in zip(columns, *rows, strict=True))
        # a heading gives way before what it is above
        apart = "\n" if sum(whole) + 3 * len(columns) > console.width else " "
        for column, width in zip(columns, longest, strict=True):
            table.add_column(column.replace(" ", apart), min_width=width)
        for row in rows:
            table.add_row(*row)
        console.print(table)

    def refusal(self, error: NotControllable | SideConditionFailed, **of: str) -> None:
        """A refusal as a result, after what it is ``of``: scripts get its parts."""
        if isinstance(error, NotControllable):
            parts = {"verdict": "refused", "culprit": error.culprit, "reason": error.reason, "hint": error.hint}
            self.result(of | parts)
        else:
            proof = {"certificate": error.certificate.to_dict()} if error.certificate is not None else {}
            self.result(proof | {
                "verdict": "condition failed", "culprit": error.where, "reason": error.statement, "hint": error.hint,
                "layer": error.layer, "position": error.position,
                "margin": error.margin if error.margin is not None and math.isfinite(error.margin) else None,
            })  # fmt: skip

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner on stderr around work without steps to count."""
        from rich.console import Console
        from rich.text import Text

        if self.quiet or not sys.stderr.isatty():
            yield
            return
        with Console(stderr=True).status(Text(printable(what))):
            yield

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar a stage on stderr: ``progress(stage, done, total)``."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda stage, done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn

        left = TimeRemainingColumn(elapsed_when_finished=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left)
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, completed=done)
                bars.update(tasks[stage], completed=done, total=total)

            yield report
