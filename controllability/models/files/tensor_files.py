"""Files of tensors (safetensors), and the JSON files beside them, from outside."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from controllability.bounded_files import opened, read_whole
from controllability.errors import PatchError, in_a_line

HEAD = 100 << 20  # bytes of a head that safetensors itself reads


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """(tensors, notes, SHA-256 of the file) of a safetensors file, opened once; its head says how long it must be.

    Raises ``PatchError`` for what cannot be read, is no such file, or is larger than the memory of this machine.
    """
    try:
        with opened(path, _memory()) as (stream, size):
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, HEAD):
                raise ValueError(f"its head says that it is {length:,} bytes long")
            head = json.loads(stream.read(length))
            notes = head.pop("__metadata__", {})
            announced = 8 + length + max((tensor["data_offsets"][1] for tensor in head.values()), default=0)
            if size != announced:
                raise ValueError(f"it has {size:,} bytes, and its head announces {announced:,}")
            stream.seek(0)
            raw = stream.read(size)
        return dict(sorted(load(raw).items())), notes, hashlib.sha256(raw).hexdigest()
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever JSON and safetensors raise about a damaged file
        raise PatchError(f"{path} is corrupt or truncated: {in_a_line(error, 200)}") from None


def read_json(path: Path, missing: str) -> Any:
    """What a JSON file holds.  Raises ``PatchError``: ``missing`` where there is none, or why it cannot be read."""
    try:
        return json.loads(read_whole(path))
    except (FileNotFoundError, NotADirectoryError):
        raise PatchError(missing) from None
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise PatchError(f"{path} is corrupt or truncated: {error}") from None


def _memory() -> int | None:
    """The bytes of memory of this machine, where the system says so."""
    known = getattr(os, "sysconf_names", {}).keys() >= {"SC_PHYS_PAGES", "SC_PAGE_SIZE"}
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
