"""Standard output and error of a command, also where they are closed, full or broken."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from controllability.errors import printable


def open_missing() -> None:
    """Give the numbers 0 to 2 to nothing where they are closed: else the next file that is opened would be stderr."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def say(*lines: object) -> None:
    """Lines on stderr, if anybody reads there; nothing in them drives the terminal."""
    with suppress(OSError, ValueError):
        print(*(printable(" ".join(str(line).splitlines())) for line in lines), sep="\n", file=sys.stderr, flush=True)


def drop_unwritten() -> None:
    """What stdout does not take is dropped: the interpreter would try once more at its end, and exit with 120."""
    try:
        print(end="", flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
