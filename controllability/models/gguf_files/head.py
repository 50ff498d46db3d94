"""The head of a GGUF file: what it says of itself and where its tensors lie.

Every count and length is held against the size of the file before anything is read or allocated by it.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from controllability.bounded_files import opened
from controllability.errors import BadInput

MAGIC, VERSIONS = b"GGUF", (2, 3)
# far above any real file, and little enough to be read item by item
MOST_BYTES, MOST_ITEMS, MOST_ENTRIES, MOST_TEXT, MOST_AXES = 1 << 26, 1 << 22, 1 << 16, 1 << 20, 4
MOST_WORD = 1 << 11  # a text in a list, such as a token: deriving merges takes the square of its length
TEXT, LIST = 8, 9
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor: its sizes (the fastest first), the number of its type, and where it begins in the data."""

    name: str
    sizes: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Head:
    """What a GGUF file says of itself: ``facts`` are numbers and texts, ``lengths`` the number of items of each list."""

    size: int
    data_start: int
    tensors: tuple[TensorPlace, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)


def read_head(path: Path) -> Head:
    """The head of the file.  Raises ``BadInput`` for what is no GGUF file, or ends too early, or says impossible things."""
    try:
        with opened(path) as (file, size):
            data = file.read(MOST_BYTES)
    except FileNotFoundError:
        raise BadInput(f"the GGUF file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the GGUF file {path}: {getattr(error, 'strerror', None) or error}") from None
    return _Reading(path, data, size).head()


class _Reading:
    """The bytes of the head, and how far they have been read."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size, self.at, self.items = path, data, size, 0, 0

    def head(self) -> Head:
        if not self.size:
            self.refuse("it is empty")
        if self.data[:4] != MAGIC:
            self.refuse("it does not begin with the letters GGUF")
        self.at = 4
        (version,) = self.numbers("I")
        if not version & 0xFFFF:
            self.refuse("it is big-endian; convert it with gguf_convert_endian of the package gguf")
        if version not in VERSIONS:
            self.refuse(f"its version is {version}; 2 and 3 are read")
        tensors, entries = self.numbers("QQ")
        self.enough_for(tensors, 32, "tensors")  # a name's length, a number of axes, one size, a type, an offset
        self.enough_for(entries, 13, "entries")  # a key's length, a type, one byte
        facts: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(entries):
            key = self.text()
            if key in facts or key in lengths:
                self.refuse(f"the key {key!r} stands in it twice")
            (kind,) = self.numbers("I")
            if kind == LIST:
                lengths[key] = self.list(key)
            else:
                facts[key] = self.text() if kind == TEXT else self.number(kind, key)
        places = tuple(self.tensor() for _ in range(tensors))
        return Head(self.size, self.data_start(facts), places, facts, lengths)

    def refuse(self, why: str) -> NoReturn:
        raise BadInput(f"{self.path} is no GGUF file that can be read: {why}")

    def take(self, count: int) -> int:
        """Where the next ``count`` bytes begin; they are read by that."""
        begin, end = self.at, self.at + count
        if end > self.size:
            raise BadInput(
                f"{self.path} is truncated: it has {self.size:,} bytes, and its head alone needs more; get the file again"
            )
        if end > len(self.data):
            self.refuse(f"its metadata takes more than {MOST_BYTES:,} bytes")
        self.at = end
        return begin

    def enough_for(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.at:
            raise BadInput(
                f"{self.path} is truncated or corrupt: it announces {count:,} {what}, more than its {self.size:,} bytes can hold"
            )
        if count > MOST_ENTRIES:
            self.refuse(f"it announces {count:,} {what}; at most {MOST_ENTRIES:,} are read")

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))

    def number(self, kind: int, key: str) -> int | float:
        if kind not in FORMS:
            self.refuse(f"{key!r} has the unknown type {kind}")
        return self.numbers(FORMS[kind])[0]

    def text(self, most: int = MOST_TEXT) -> str:
        (length,) = self.numbers("Q")
        if most < length <= self.size - self.at:
            self.refuse(f"a text of {length:,} bytes stands in its metadata; at most {most:,} are read here")
        begin = self.take(length)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"the text at byte {begin:,} is not UTF-8")

    def list(self, key: str) -> int:
        kind, count = self.numbers("IQ")
        if kind not in FORMS and kind != TEXT:
            self.refuse(f"{key!r} is a list of {'lists' if kind == LIST else f'the unknown type {kind}'}")
        least = 8 if kind == TEXT else struct.calcsize(f"<{FORMS[kind]}")
        if count * least > self.size - self.at:
            raise BadInput(
                f"{self.path} is truncated or corrupt: {key!r} announces {count:,} items, more than its {self.size:,} bytes can hold"
            )
        self.items += count
        if self.items > MOST_ITEMS:
            self.refuse(f"its metadata lists more than {MOST_ITEMS:,} items")
        if kind == TEXT:
            for _ in range(count):
                self.text(MOST_WORD)
        else:
            self.take(count * least)
        return count

    def tensor(self) -> TensorPlace:
        name = self.text(MOST_WORD)
        (axes,) = self.numbers("I")
        if not 1 <= axes <= MOST_AXES:
            self.refuse(f"the tensor {name!r} has {axes:,} axes; 1 to {MOST_AXES} are possible")
        sizes = self.numbers("Q" * axes)
        kind, offset = self.numbers("IQ")
        return TensorPlace(name, sizes, kind, offset)

    def data_start(self, facts: dict[str, Any]) -> int:
        alignment = facts.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            self.refuse(f"general.alignment is {alignment!r}, which is no power of two")
        return -(-self.at // alignment) * alignment
