"""Texts from files and from standard input: UTF-8, of bounded size."""

import sys
from pathlib import Path

from controllability.errors import BadInput

STDIN = "-"


def read_text(path: str | Path, what: str, largest: int = 64) -> str:
    """The text in a file or a pipe, or on standard input ("-"), without a byte-order mark; at most ``largest`` MiB.

    Raises ``BadInput``, in which ``what`` names it, for what cannot be read, is too long or is not UTF-8.
    """
    what, most = f"{what} {'on standard input' if str(path) == STDIN else path}", largest * 2**20
    try:
        if str(path) != STDIN:
            with open(path, "rb") as file:
                raw = file.read(most + 1)
        elif sys.stdin is None:
            raise ValueError("it is closed")
        else:  # a notebook's holds text
            raw = getattr(sys.stdin, "buffer", sys.stdin).read(most + 1)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {what}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > most:
        raise BadInput(f"{what} is larger than {largest} MiB")
    try:
        return raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
