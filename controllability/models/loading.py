"""Loading a model directory safely, and turning texts into the two runs' inputs."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

import architectures
from controllability.bounded_files import JSON, opened
from controllability.errors import BadInput, ReadingError, in_a_line
from controllability.models.gguf_files.head import read_head
from controllability.models.gguf_files.load import gguf_in, load_gguf
from controllability.models.tokens import going_on, with_special
from controllability.texts import read_text

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str, dtype: str = "float32", trust_remote_code: bool = False, device: str | None = None
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a directory written by ``save_pretrained``, a GGUF file, or a Hub id.

    ``"embedded"`` is the package's own trained model (``"./embedded"`` a directory of that name).  ``dtype`` is float64,
    float32, bfloat16 or float16; ``device`` one of torch's, None the CPU.
    Only safetensors and GGUF are loaded, the former where a directory holds both.  Raises ``BadInput`` when something
    is missing, truncated or inconsistent, for a device that is not there, and for model types that are not registered.

    >>> model, tokenizer = load_model("embedded", dtype="float64")
    >>> model.dtype, model.training
    (torch.float64, False)
    """
    from transformers import logging as hf_logging

    if dtype not in DTYPES:
        raise BadInput(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    try:
        (torch.zeros(1, device=device) + 1).item()  # "meta" is a device, and computes nothing
    except Exception as error:  # no such name, not built in, no driver, no such number: each of another kind
        raise BadInput(f"device {device!r} cannot be used: {in_a_line(error, 150)}; cpu always can") from None
    name = str(embedded_directory()) if name == "embedded" else name
    folder = Path(name)
    file = gguf_in(folder)
    local = file is not None or folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and file is None:
        _refuse_incomplete(folder)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):  # one line of ours says what went wrong
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        if file is not None:
            model, tokenizer, notes = load_gguf(file, DTYPES[dtype])
            model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = name
        else:
            model, tokenizer, notes = _load_directory(name, DTYPES[dtype], local, trust_remote_code)
        model = model if device in (None, "cpu") else model.to(device)
    except (BadInput, ReadingError):
        raise
    except Exception as error:  # whatever transformers, tokenizers, gguf or safetensors raise about bad files
        what = f"the model {name}" if local else f"model (no directory {name} here, and as a Hub id it failed)"
        raise BadInput(f"cannot load {what}: {in_a_line(error) or type(error).__name__}") from None
    _refuse_mismatch(name, notes)
    return model.eval(), tokenizer


def on_device(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """The same inputs with their tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def model_type(name: str) -> str:
    """What a model directory, its ``config.json``, or a GGUF file calls its family.  Raises ``BadInput``.

    >>> model_type("embedded")
    'gemma3_text'
    """
    path = embedded_directory() if name == "embedded" else Path(name)
    if file := gguf_in(path):
        return str(read_head(file).facts.get("general.architecture")).replace("moe", "_moe").replace("-", "_")
    config = _config(path if path.is_file() else path / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path} holds no config of a model: it names no model_type")
    return config["model_type"]


def _config(path: Path) -> Any:
    if not path.parent.exists():
        raise BadInput(f"model directory {path.parent} does not exist")
    if not path.is_file():
        raise BadInput(f"{path.parent} holds no model: config.json is missing, and so is a GGUF file")
    text = read_text(path, "the config", 16)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is corrupt or truncated: {error}") from None


def _load_directory(name: str, dtype: torch.dtype, local: bool, trust_remote_code: bool) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    config = AutoConfig.from_pretrained(name, **options)
    architectures.find(config.model_type)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    options |= {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    return loaded[0], tokenizer, loaded[1]


def _refuse_incomplete(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is not a directory, and no GGUF file by its name (NAME.gguf)")
    _config(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} holds no weights in safetensors format, and no GGUF file; pickled weights are not loaded"
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        # transformers would build an empty tokenizer of the model's family without a word
        raise BadInput(f"{folder} holds no tokenizer: save one with tokenizer.save_pretrained({str(folder)!r})")
    for file in folder.iterdir():  # transformers would wait at a pipe
        try:
            with opened(file, JSON if file.suffix in (".json", ".txt", ".jinja") else None):
                pass
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EFBIG) and not file.is_dir():
                raise BadInput(f"cannot read {file}: {error.strerror}") from None


def _refuse_mismatch(name: str, notes: Any) -> None:
    said = {"missing_keys": "lacks", "mismatched_keys": "has another shape for", "unexpected_keys": "has unknown"}
    for key, what in said.items():
        keys = (notes.get(key) if isinstance(notes, dict) else getattr(notes, key, ())) or ()
        # each a name, or (name, its shape, the shape wanted)
        if found := [str(x[0] if isinstance(x, tuple) else x) for x in keys]:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise BadInput(f"the weights in {name} do not fit its config: the file {what} {', '.join(found[:3])}{more}")


def encode(tokenizer: Any, context: str, query: str, positions: str = "keep") -> tuple[dict[str, Any], dict[str, Any]]:
    """(target, source) inputs: context and query tokenised separately, special tokens with the context.

    Nothing is put between them: if a space belongs there, write it at the start of the query or at the end of the context.
    ``positions="keep"`` gives the query the positions it has in the target, "reset" starts at 0.
    Each holds tensors (1, T) of token ids, the source of position ids too.  Raises ``BadInput`` for an empty text.

    >>> _, tokenizer = load_model("embedded")
    >>> target, source = encode(tokenizer, "Mia lives in Oslo .", "Where does Mia live ?")
    >>> target["input_ids"].shape, source["position_ids"].tolist()
    (torch.Size([1, 11]), [[6, 7, 8, 9, 10]])
    """
    for role, text in (("context", context), ("query", query)):
        if not text.strip():
            raise BadInput(f"the {role} is empty")
    end = len(context.rstrip(" "))  # a space before a word belongs to the word's token
    before, lead = with_special(tokenizer, context[:end])
    asked = going_on(tokenizer, context[end:] + query, before[:lead])
    if not before or not asked:
        raise BadInput(f"the {'query' if before else 'context'} has no tokens in this vocabulary")
    target = {"input_ids": torch.tensor([before + asked])}
    start = len(before) if positions == "keep" else 0
    source = {"input_ids": torch.tensor([asked]), "position_ids": torch.arange(start, start + len(asked))[None]}
    return target, source


def embedded_directory() -> Path:
    """Where the package's own trained model lies."""
    return Path(os.path.dirname(__file__)).parent / "embedded" / "model"
