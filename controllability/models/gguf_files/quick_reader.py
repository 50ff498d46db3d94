"""The file reader of the package gguf, once for all who ask for it while a model is loaded, and quicker with long lists.

``gguf.GGUFReader`` takes 15 seconds for a vocabulary of 262,144 tokens, and transformers reads each file three times.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from controllability.models.transformers_parts import part

# lists that the weights and the config have no use for: transformers would turn each item into an object, three times,
# and takes them from the file by another way where it builds the tokenizer
UNUSED = ("scores", "token_type", "merges")
_ONE_AT_A_TIME = threading.Lock()  # the name that is exchanged belongs to the whole process


@contextmanager
def one_reading(path: Path) -> Iterator[None]:
    """Within this context ``gguf.GGUFReader`` of this file is made once, and transformers draws no bars."""
    import gguf

    theirs = part("modeling_gguf_pytorch_utils")
    with _ONE_AT_A_TIME:
        usual, bars = gguf.GGUFReader, getattr(theirs, "tqdm", None)
        made: list[Any] = []

        def reader(asked: Any, *options: Any, **more: Any) -> Any:
            if options or more or Path(asked) != path:
                return usual(asked, *options, **more)
            if not made:
                made.append(_quick(usual)(asked))
                for name in UNUSED:
                    made[0].fields.pop(f"tokenizer.ggml.{name}", None)
            return made[0]

        gguf.GGUFReader = reader  # type: ignore
        theirs.tqdm = lambda items, **_: items  # type: ignore
        try:
            yield
        finally:
            gguf.GGUFReader, theirs.tqdm = usual, bars  # type: ignore


def _quick(usual: Any) -> Any:
    """The reader as it is, but for lists: cut out of the file by NumPy without a check for each item."""
    from gguf import GGUFValueType as Kind

    class QuickReader(usual):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != Kind.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            item, count = Kind(int(kind[0])), int(length[0])
            begin = orig_offs + 12
            if item in self.gguf_scalar_to_np and count:
                values = np.asarray(self._get(begin, self.gguf_scalar_to_np[item], count))
                parts = [kind, length, *values.reshape(count, 1)]
                return 12 + values.nbytes, parts, list(range(2, count + 2)), [Kind.ARRAY, item]
            if item == Kind.STRING and count:
                texts, end = _texts(np.asarray(self.data), begin, count)
                return end - orig_offs, [kind, length, *texts], list(range(3, 2 * count + 3, 2)), [Kind.ARRAY, item]
            return super()._get_field_parts(orig_offs, raw_type)

    return QuickReader


def _texts(data: Any, at: int, count: int) -> tuple[list[Any], int]:
    """The length and the bytes of each text in turn, and where the last one ends."""
    found = []
    for _ in range(count):
        length = data[at : at + 8].view(np.uint64)
        end = at + 8 + int(length[0])
        found += [length, data[at + 8 : end]]
        at = end
    return found, at
