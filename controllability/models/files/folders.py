"""Folders written as a whole or not at all."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from controllability.errors import PatchError

fcntl: Any = import_module("fcntl") if os.name == "posix" else None
_UNFINISHED = re.compile(r"\.unfinished-[0-9a-f]{32}\Z")


def refuse_unusable(directory: Path, file: bool = False) -> None:
    """Raise ``PatchError`` unless ``written`` can make ``directory``, which must be new or empty (a ``file``: new).

    It is tried with nothing, and undone: rights, long names, mounts, full disks show before the work and not after it.
    """
    try:
        if directory.exists() and (file or not directory.is_dir() or any(directory.iterdir())):
            and_is = "" if file else " and is not an empty directory"
            raise PatchError(f"{directory} exists already{and_is}: nothing was written")
        if directory.exists() and directory.samefile("."):  # the shell that is in it would stand nowhere
            raise OSError(errno.EBUSY, "")
        with written(directory, kept=False):
            pass
    except OSError as error:
        raise _unwritable(directory, error) from None


@contextmanager
def written(directory: Path, file: str = "", kept: bool = True) -> Iterator[Path]:
    """A folder beside ``directory`` that takes its place when the context ends well, and is gone when it does not.

    With ``file`` it is the file of that name in it that takes the place.  Not ``kept``: it goes in any case, with the
    folders that were made for it.  Raises ``PatchError`` where the file system refuses.
    """
    target = Path(os.path.realpath(directory))  # where a link leads
    name = os.fsencode(target.name)[:200].decode("utf-8", "ignore")  # a name may have 255 bytes
    temporary = target.parent / f".{name}.unfinished-{uuid.uuid4().hex}"
    made, done, held = [path for path in (target, *target.parents) if not path.exists()], False, ExitStack()
    try:
        _remove_stale(target.parent)
        _begin(temporary, held)
        yield temporary
        _flush(temporary)
        if kept or os.path.lexists(target):  # a try of what is new leaves no empty folder there, also when it is killed
            os.replace(temporary / file, target)
        done = kept
    except Exception as error:
        raise _unwritable(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        held.close()
        for path in [] if done else made:
            with suppress(OSError):
                path.rmdir()


def _remove_stale(parent: Path) -> None:
    """Remove what processes that were killed have left unfinished in ``parent``: nobody holds its lock any more."""
    for path in parent.glob(".*.unfinished-*"):
        if _UNFINISHED.search(path.name):
            with suppress(OSError), _locked(path, wait=False) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """The lock of a folder, which the system opens when the process ends in any way; False where there are no locks.

    Raises ``OSError`` for what is no folder, and, unless it is to ``wait``, where another process holds the lock.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:  # some network file systems have none
            if isinstance(error, BlockingIOError):
                raise
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _begin(temporary: Path, held: ExitStack) -> None:
    """Make the folder, its lock held; anew where another process took it for a stale one before."""
    while not temporary.exists():
        temporary.mkdir(parents=True)
        with suppress(FileNotFoundError):
            held.enter_context(_locked(temporary, wait=True))


def _unwritable(directory: Path, error: Exception) -> Exception:
    """The error in words, or ``error`` itself where the file system has nothing to do with it."""
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers raise no OSError
    if isinstance(error, PatchError):  # of what was to be written in the folder that takes the place
        return PatchError(re.sub(r"\S*\.unfinished-\w+", lambda _: str(directory), str(error)))
    if rust is None and not isinstance(error, OSError):
        return error
    code = int(rust[1]) if rust else getattr(error, "errno", None)
    why = os.strerror(code) if code else str(error)
    if code == errno.EBUSY:
        why = f"it is the working directory or a mounted volume; give a new one in it, such as {directory / 'patch'}"
    return PatchError(f"cannot write to {directory}: {why}")


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
