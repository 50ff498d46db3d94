"""A GGUF file as an ordinary model: its weights are unpacked by transformers, and nothing marks it as quantised."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

import architectures
from controllability.errors import BadInput
from controllability.models.gguf_files.head import read_head
from controllability.models.gguf_files.quick_reader import one_reading
from controllability.models.gguf_files.sound import refuse_oversized, refuse_unsound
from controllability.models.transformers_parts import reports_misfits

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
            raise BadInput(f'reading {path} needs the package {package}: pip install "controllability[gguf]"')
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
