"""What a model's function depends on besides its tensors: its config, and the classes and plain attributes of its modules.  (new)

What the config says of outputs, caches, dropout, losses or names changes no logit and is left out; so is the attention kernel
(eager, sdpa, flash): they compute one function up to rounding.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Settings = dict[str, Any]  # name -> plain value, class or function

SIMPLE = (bool, int, str, type(None))
CONFIGS = {"config", "cfg", "args", "hparams"}
HARMLESS = {
    *vars(nn.Module()), "forward", "generation_config", "kernel_config", "gradient_checkpointing", "chunk_size_feed_forward",
    "use_cache", "return_dict", "use_return_dict", "dtype", "torch_dtype", "architectures", "transformers_version", "name_or_path",
    "problem_type", "id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "max_seq_len_cached", "inplace",
    "initializer_range", "all_tied_weights_keys", "kwargs", "peft_config", "scale_grad_by_freq", "sparse", "quantization_config",
    "in_features", "out_features", "num_embeddings", "embedding_dim", "normalized_shape", "_name_or_path", "_commit_hash",
    "state_dict", "save_pretrained",  # refused while a patch is applied
}  # fmt: skip
HARMLESS_PARTS = re.compile(
    "^(output_|targeted_|_is_hf|_attn_impl|_experts_impl|_output_|_post_init)|dropout|pdrop|loss|cache"
)
_NOTHING: Any = object()


def settings_of(modules: Iterable[tuple[str, nn.Module]]) -> Settings:
    """The settings of modules, by name; a module's own is its class, or the forward that was put in its place.

    >>> settings_of([("act", nn.LeakyReLU(0.5))])
    {'act': <class 'torch.nn.modules.activation.LeakyReLU'>, 'act.negative_slope': 0.5}
    """
    found: Settings = {}
    seen: set[int] = set()
    counts: dict[Any, bool] = {}  # whether a name counts: this is done at every look, on thousands of attributes

    def take(prefix: str, held: Mapping[Any, Any], tensors: bool = True) -> None:
        for name, value in held.items():
            if name not in counts:
                counts[name] = name not in HARMLESS and not HARMLESS_PARTS.search(str(name))
            if not counts[name]:
                continue
            if isinstance(value, Tensor) and not tensors:  # a weight that a record of bitsandbytes holds packed
                continue
            if type(value) in SIMPLE:
                found[f"{prefix}{name}"] = value
            elif callable(value) and str(name)[:1] == "_":  # what refuses copies while a patch is applied
                continue
            elif isinstance(value, dict | SimpleNamespace):
                take(f"{prefix}{name}.", value if isinstance(value, dict) else vars(value))
            elif (plain := _value(value)) is not _NOTHING:
                found[f"{prefix}{name}"] = plain
            elif id(value) not in seen and (name in CONFIGS or hasattr(value, "to_dict") or is_dataclass(value)):
                seen.add(id(value))
                take(f"{prefix}{name}.", getattr(value, "__dict__", {}), not is_dataclass(value))
                found[f"{prefix}{name}.attention"] = _attention(getattr(value, "_attn_implementation", None))

    for name, module in modules:
        held = vars(module)
        forward = None if "_hf_hook" in held else held.get("forward")  # accelerate wraps it
        if getattr(forward, "__qualname__", "").endswith(".tp_forward"):  # so does transformers, on several devices
            forward = None
        found[name or "the model"] = type(module) if forward is None else _value(forward)
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            take(f"{name}." if name else "", held)
    return found


def _value(value: Any) -> Any:
    """A value that can be compared and does not hold the model; ``_NOTHING`` for others."""
    if type(value) in SIMPLE or isinstance(value, int | str | type | BuiltinFunctionType):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # NaN is not equal to itself
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc":
        value = torch.as_tensor(value)
    if isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided:
        flat = value.detach().reshape(-1)
        shown = flat[:: max(1, len(flat) // 16)].tolist()
        return _value(shown[0]) if len(flat) == 1 else f"{str(shown)[1:-1]} of {tuple(value.shape)}"
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        values = [_value(each) for each in value]
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]  # peft says "a" or ["a"]
        return _NOTHING if _NOTHING in values else values
    if isinstance(value, partial):
        return [_value(value.func), str(value.args), str(value.keywords)]
    if not callable(value) or isinstance(value, nn.Module | Tensor):
        return _NOTHING
    if isinstance(value, FunctionType) and not value.__closure__:
        return value
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]  # one may be the model
    return [getattr(value, "__qualname__", type(value).__qualname__), *(c for c in cells if type(c) in SIMPLE)]


def _attention(name: Any) -> Any:
    """Which function computes attention: nothing for transformers' own, which agree; one of the caller's is another."""
    known = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    function = known.get(name) if isinstance(name, str) else None
    return None if getattr(function, "__module__", "transformers").startswith("transformers") else _value(function)


def in_words(value: Any) -> Any:
    """A setting as a file holds it: classes and functions by their names."""
    if isinstance(value, list):
        return [in_words(each) for each in value]
    return getattr(value, "__qualname__", value)


def other_settings(before: Settings, now: Settings) -> list[str]:
    """What is another setting now, with both values; names that only one of the two has say nothing.

    >>> other_settings({"eps": 1e-6, "act": "ReLU"}, {"eps": 1e-5, "act": nn.ReLU})
    ['eps (1e-06, now 1e-05)']
    """
    return [
        f"{name} ({in_words(value)}, now {in_words(now[name])})"
        for name, value in before.items()
        if name in now and value not in (now[name], in_words(now[name])) and in_words(value) != now[name]
    ]
