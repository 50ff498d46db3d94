"""Files from outside: what they are and how large is looked at before anything is read, and each is opened once."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

JSON = 1 << 28  # bytes of a description: far above any real one
OTHERS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


@contextmanager
def opened(path: Path, most: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """(stream, its size in bytes) of a regular file, or of a link to one, of at most ``most`` bytes.

    Raises ``OSError``, whose ``strerror`` says what it is instead: opening a pipe would wait for somebody who writes.
    """
    _refuse_special(os.stat(path))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        _refuse_special(status)  # it may be another one since
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, at most {most:,} are read")
        yield stream, status.st_size


def read_whole(path: Path, most: int = JSON) -> bytes:
    """What such a file holds.  Raises ``OSError``, as ``opened`` does."""
    with opened(path, most) as (stream, size):
        return stream.read(size)


def _refuse_special(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        other = OTHERS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {other} and no regular file")
