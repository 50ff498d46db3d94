"""Folders written as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controllability.errors import PatchError


def refuse_occupied(directory: Path) -> None:
    """Raise ``PatchError`` unless ``directory`` can be created, or is an empty directory."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists():
        raise PatchError(f"{directory} exists already and is not an empty directory: nothing was written")


@contextmanager
def written(directory: Path) -> Iterator[Path]:
    """A folder beside ``directory`` that takes its place when the context ends well, and is gone when it does not.

    Raises ``PatchError`` where the file system refuses.
    """
    temporary = directory.parent / f".{directory.name}.unfinished-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, directory)
    except OSError as error:
        raise PatchError(f"cannot write to {directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
