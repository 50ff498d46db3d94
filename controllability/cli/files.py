"""The files that a command takes its texts from, and where its result goes."""

import argparse
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from controllability.cli.arguments import TEXTS, TextFile
from controllability.cli.output import Output
from controllability.errors import BadInput, printable
from controllability.texts import STDIN, read_text


def read_texts(args: argparse.Namespace) -> None:
    """Put the texts themselves where ``args`` name files, or standard input.  Raises ``BadInput``."""
    given = [x for value in vars(args).values() for x in (value if isinstance(value, list) else [value])]
    if given.count(STDIN) > 1:
        raise BadInput("standard input (-) is named twice, and can be read once")
    for name in {*TEXTS} & {*vars(args)}:
        value = getattr(args, name)
        setattr(args, name, [_text(x, name) for x in value] if isinstance(value, list) else _text(value, name))


def _text(value: str, name: str) -> str:
    if not isinstance(value, TextFile) and value != STDIN:
        return value
    return re.sub(r"\r?\n\Z", "", read_text(value, f"the {name}"))  # the end of the last line is no part of the text


def new_path(given: str | None, option: str = "--out", file: bool = False) -> Path | None:
    """What an option names.  Raises ``BadInput`` or ``PatchError`` now for what would fail when the work is done."""
    if given is None:
        return None
    from controllability.models.files.folders import refuse_unusable  # with torch, which takes seconds

    if not given.strip():
        raise BadInput(f"{option} is empty: give a {'file' if file else 'directory'}")
    refuse_unusable(Path(given), file)
    return Path(given)


@contextmanager
def printed_to(given: str | None, output: Output) -> Iterator[None]:
    """What is printed in this context goes to a new file, and a JSON object to stdout as well."""
    path = new_path(given, file=True)
    if path is None:
        yield
        return
    from controllability.models.files.folders import written

    with redirect_stdout(io.StringIO()) as printed:
        yield
    if text := printed.getvalue():
        with written(path, "text") as folder:
            (folder / "text").write_text(text, encoding="utf-8", errors="backslashreplace")
        print(text if output.as_json else printable(f"saved to {path}") + "\n", end="")
