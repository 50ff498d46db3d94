"""Generation as three columns that grow token by token: contextual, patched, without."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from controllability.cli.output import number
from controllability.models.generation.steps import GeneratedToken, Generation
from controllability.rendering.text import printable

COLUMNS = {"target": "contextual", "patched": "patched", "unpatched": "without"}
STYLES = {"patched": "bold red", "unpatched": "yellow"}
AROUND = 6  # lines of the live view that are not a sample's: the heading, what is left out, the numbers
A_PROMPT = 3  # lines that a sample needs at least: prompt, text, space


@dataclass
class Transcript:
    """What was generated so far: ``samples[b]`` are the tokens of prompt b, each a row of texts, ids and numbers."""

    prompts: Sequence[str]
    asked: int
    samples: list[list[dict[str, Any]]]
    steps: list[GeneratedToken] = field(default_factory=list)

    def add(self, step: GeneratedToken, rows: list[dict[str, Any] | None]) -> None:
        """One more step; no row for a prompt that has ended."""
        self.steps.append(step)
        for sample, row in zip(self.samples, rows, strict=True):
            if row is not None:
                sample.append(row)

    @property
    def summary(self) -> Generation:
        """The steps so far as a generation: agreement, errors, seconds."""
        return Generation(torch.empty(0), torch.empty(len(self.samples)), tuple(self.steps), "", "")


def numbers(transcript: Transcript) -> str:
    """The lines below the columns."""
    found, count = transcript.summary, sum(map(len, transcript.samples))
    same, seconds = count - len(found.mismatches), found.seconds_per_token
    return (
        f"token {len(transcript.steps)} of {transcript.asked}   agreement {found.agreement:.1%} ({same} of {count})   "
        f"KL max {number(found.kl_max)}\n"
        f"largest logit error   patched {number(found.max_logit_error)}   without {number(found.max_logit_error_unpatched)}\n"
        f"seconds per token   contextual {number(seconds['target'])}   patched {number(seconds['patched'])}"
    )


def side_by_side(transcript: Transcript, console: Console, height: int | None = None) -> RenderableType:
    """The three columns, one part a prompt, as wide as ``console``; ``height`` lines at most show the latest tokens."""
    samples = list(zip(transcript.prompts, transcript.samples, strict=True))
    room, left_out = None, 0
    if height is not None:
        count = max(1, min(len(samples), (height - AROUND) // A_PROMPT))
        lines = max(1, (height - AROUND) // count - A_PROMPT + 1)
        room = max(1, lines * (console.width // 3 - 2) * 4 // 5)  # words that do not fit leave a line unfilled
        samples, left_out = samples[:count], len(samples) - count
    parts: list[RenderableType] = [_row(*(Text(title, "bold") for title in COLUMNS.values()))]
    for b, (prompt, tokens) in enumerate(samples):
        if b:
            parts.append(Text(""))
        name = f"prompt {b + 1}: " if len(transcript.prompts) > 1 else "prompt: "
        parts.append(Text(name + _end(shown(prompt, console), console.width - len(name), console), style="dim"))
        parts.append(_columns(tokens, console, room))
    if left_out:
        parts.append(Text(f"and {left_out} more prompts", style="dim"))
    return Group(*parts)


def _columns(tokens: list[dict[str, Any]], console: Console, room: int | None) -> Table:
    pieces = {name: [_piece(token, name, console) for token in tokens] for name in COLUMNS}
    start = max(_start(column, room) for column in pieces.values())  # the same tokens stand in each column
    lead = shown("…", console, "...") if start else ""
    cells = (Text.assemble(lead, *column[start:]) for column in pieces.values())
    return _row(*(cell[1:] if cell.plain.startswith(" ") else cell for cell in cells))


def _row(*cells: Text) -> Table:
    table = Table.grid(*(Column(ratio=1, overflow="fold") for _ in cells), expand=True, padding=(0, 2, 0, 0))
    table.add_row(*cells)
    return table


def _end(text: str, width: int, console: Console) -> str:
    """The end of a text that is longer than ``width`` cells: the question is there."""
    if cell_len(text) <= width:
        return text
    lead = shown("…", console, "...")
    while text and cell_len(lead + text) > width:
        text = text[max(1, (cell_len(lead + text) - width) // 2) :]
    return lead + text


def _start(pieces: list[tuple[str, str]], room: int | None) -> int:
    """The first token from which on everything fits into ``room`` cells."""
    used = 0
    for i in reversed(range(len(pieces))):
        used += cell_len(pieces[i][0])
        if room is not None and used > room:
            return min(i + 1, len(pieces) - 1)
    return 0


def _piece(token: dict[str, Any], name: str, console: Console) -> tuple[str, str]:
    """A token's text and style; one that is not the contextual model's has a sign as well as a colour."""
    text = shown(token[name], console)
    if token[f"{name}_id"] == token["target_id"]:
        return text, ""
    word = text.lstrip(" ")
    return text[: len(text) - len(word)] + shown("≠", console, "!=") + word, STYLES[name]


def shown(text: str, console: Console, instead: str | None = None) -> str:
    """The text as this terminal can show it: line breaks and signs that it lacks as their codes, or as ``instead``."""
    text = printable(text)
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        coded = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
        return coded if instead is None else instead
    return text


def plain_console(stderr: bool = False) -> Console:
    """A console for which a text in brackets is a text."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def live_view(transcript: Transcript) -> Iterator[Any]:
    """On a terminal, a function that shows the transcript as it is by now on stderr; it leaves nothing behind."""
    console = plain_console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda: None
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show() -> None:
            columns = side_by_side(transcript, console, console.height)
            live.update(Group(columns, Text(numbers(transcript))), refresh=True)

        yield show
