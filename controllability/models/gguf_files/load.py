"""A GGUF file as an ordinary model: its weights are unpacked by transformers, and nothing marks it as quantised."""

import importlib.util
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import architectures
from controllability.errors import BadInput
from controllability.models.gguf_files.head import read_head
from controllability.models.gguf_files.sound import refuse_oversized, refuse_unsound
from controllability.models.transformers_parts import part, reports_misfits

# lists that the weights and the config have no use for: transformers would turn each item into an object, three times,
# and takes them from the file by another way where it builds the tokenizer
UNUSED = ("scores", "token_type", "merges")
_ONE_AT_A_TIME = threading.Lock()  # the name that is exchanged belongs to the whole process


@contextmanager
def one_reading(path: Path) -> Iterator[None]:
    """Within this context ``gguf.GGUFReader`` of this file is made once and quickly, and transformers draws no bars.

    It takes 15 seconds for a vocabulary of 262,144 tokens, and transformers reads each file three times.
    """
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


MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path means: itself by its ending, or the only one of a directory without safetensors."""
    if not path.is_dir():
        return path if path.suffix.lower() == ".gguf" else None
    if any(path.glob("*.safetensors")):
        return None
    found = sorted(one for one in path.iterdir() if one.suffix.lower() == ".gguf" and not one.is_dir())
    if len(found) > 1:
        names = ", ".join(one.name for one in found[:8]) + (", …" if len(found) > 8 else "")
        raise BadInput(f"{path} holds {len(found)} GGUF files: name one of them, as {found[0]} ({names})")
    return found[0] if found else None


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(model, tokenizer, what transformers notes about missing weights) of a GGUF file, all its weights unpacked."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    head = read_head(path)
    refuse_missing_extra(path)
    refuse_unsound(path, head)
    path = path.absolute()
    with tempfile.TemporaryDirectory() as empty, one_reading(path):  # nothing beside the file is read in its place
        where: dict[str, Any] = {"gguf_file": str(path), "local_files_only": True}
        config = AutoConfig.from_pretrained(empty, **where)
        architectures.find(config.model_type)
        refuse_oversized(path, head, config)
        tokenizer = AutoTokenizer.from_pretrained(empty, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            empty, config=config, dtype=dtype, quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True, ignore_mismatched_sizes=True, **where,  # noted, and refused by name
        )  # fmt: skip
    model, notes = loaded
    _make_ordinary(model)
    return model, tokenizer, notes


def refuse_missing_extra(path: Path) -> None:
    """Raise ``BadInput`` where what reads GGUF is not installed."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(f'reading {path} needs the package {package}: in a checkout, pip install ".[gguf]"')
    if not reports_misfits():
        raise BadInput(
            f"reading {path} needs transformers 5.23: older ones load a file whose weights do not fit without a word"
        )


def _make_ordinary(model: Any) -> None:
    for mark in MARKS:
        if hasattr(model, mark):
            delattr(model, mark)
    for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name, value in model.named_parameters():
        if not torch.stack(torch.aminmax(value)).isfinite().all():  # NaN is passed on by both
            dtype = str(value.dtype).removeprefix("torch.")
            raise BadInput(f"the weights in the file are not finite in {dtype}: {name}")
