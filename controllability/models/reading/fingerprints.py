"""Telling models apart: the fingerprint of all weights, and a cheap look that notices changes of tensors and settings."""

import hashlib
import math
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import architectures
from architectures import quantised
from controllability.arrays.sharded import gathered, here
from controllability.errors import ControllabilityError
from controllability.models.hooks.carried_patches import state_of_model
from controllability.models.reading.model_facts import modules_of

Settings = dict[str, Any]  # name -> plain value, class or function

SIMPLE = (bool, int, str, type(None))
CONFIGS = {"config", "cfg", "args", "hparams"}
# what the config says of outputs, caches, dropout, losses or names changes no logit; nor does the attention kernel (eager, sdpa,
# flash): they compute one function up to rounding
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


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def stored(model: nn.Module, exchanged: bool = True, parameters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by name, once; a quantised one as the plain tensors that it consists of when it runs.

    ``exchanged`` says whether what an applied patch holds in place of a parameter counts too; without ``parameters``
    buffers alone are listed.
    """
    seen: set[int] = set()
    for prefix, module in modules_of(model):
        for held in (module._parameters, module._buffers) if parameters else (module._buffers,):
            for attribute, value in held.items():
                if value is None or id(value) in seen or _rewritten(module, attribute):
                    continue
                if not exchanged and held is module._parameters and not isinstance(value, nn.Parameter):
                    continue
                seen.add(id(value))
                name = f"{prefix}.{attribute}" if prefix else attribute
                if quantised.kind(value):
                    yield from quantised.pieces(name, module, quantised.as_run(module, value))
                else:
                    yield name, value


def _rewritten(module: nn.Module, attribute: str) -> bool:
    """Whether the module's own forward writes this buffer anew: rotary frequencies that depend on the length."""
    if not attribute.endswith("inv_freq"):
        return False
    kinds = getattr(module, "rope_type", "")
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes


@torch.no_grad()
def sampled(values: list[Tensor]) -> list[int]:
    """For each tensor the sum of some 64 entries spread over it, their bits read as integers: cheap, and different after
    almost any change.  Bits, because NaN is no value that equals itself, and is nevertheless unchanged.

    One copy a device and dtype, however many tensors there are.
    """
    sums = [0] * len(values)
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for index, value in enumerate(values):
        if value.numel() and not value.is_meta:
            groups.setdefault((value.device, value.dtype), []).append((index, _spread(here(value))))
    for group in groups.values():
        joint = torch.cat([picked for _, picked in group])
        bits = joint.view(_BITS[joint.element_size()]).cpu().numpy().astype(np.int64)
        starts = np.cumsum([0, *(len(picked) for _, picked in group[:-1])])
        for (index, _), total in zip(group, np.add.reduceat(bits, starts).tolist(), strict=True):
            sums[index] = total
    return sums


def _spread(value: Tensor) -> Tensor:
    """At least 64 entries of a tensor (all, if it has fewer), as a view where that is possible."""
    value = torch.view_as_real(value) if value.is_complex() else value  # rotary angles
    step = max(1, value.numel() // 64)
    if value.is_contiguous():
        return value.as_strided((value.numel() // step,), (step,), value.storage_offset())
    return value.reshape(-1)[::step]


looking = torch._C.DisableTorchFunction  # a context for many looks at tensors: modes like ``exact_mode`` would see each


class Look(NamedTuple):
    """What one look at a model saw: tensors by name (storage, or None: not yet where it will be; version; sample), and settings."""

    tensors: dict[str, tuple[int | None, int, int]] = {}
    settings: Settings = {}


def look_at(model: nn.Module, parameters: bool = True) -> Look:
    """A cheap look at every parameter, buffer and setting: torch counts in-place changes, so any of them shows.

    Changes behind torch's back (``p.data[...] = …``) show only if one of the 64 sampled entries changes.
    Vectors exchanged by an applied patch are left out: which patches are on the model is tracked by id.  Without
    ``parameters`` it is the buffers alone.
    """
    aliases = state_of_model(model).same_again
    held = dict(stored(model, False, parameters))
    tensors = {}
    with looking():
        for (name, value), sample in zip(held.items(), sampled(list(held.values())), strict=True):
            where, version = place(value)
            tensors[name] = (where, aliases.get((id(value), version), version), sample)
    return Look(tensors, settings_of(modules_of(model)) if parameters else {})


def place(value: Tensor) -> tuple[int | None, int]:
    """A tensor's storage and version; no storage, where the first forward has yet to pack a weight."""
    to_come = getattr(value, "to_come", None)
    if to_come is not None:
        return None, to_come
    value = here(value)
    return value.data_ptr(), 0 if value.is_inference() else value._version


def changes(seen: Look, now: Look) -> list[str]:
    """The names in ``seen`` of what is another now; that a weight was packed in its first forward since is no change.

    >>> packed = Look({"w": (4096, 0, 15)})
    >>> changes(Look({"w": (None, 0, 15)}), packed), changes(Look({"w": (512, 0, 15)}), packed)
    ([], ['w'])
    """
    found = []
    for name, before in seen.tensors.items():
        after = now.tensors.get(name)
        if after is None or after[1:] != before[1:] or before[0] not in (None, after[0]):
            found.append(name)
    return found + other_settings(seen.settings, now.settings)


def same_again(model: nn.Module, names: Iterable[str], before: Look) -> None:
    """Note that these parameters hold the bits they held when ``before`` was seen."""
    aliases = state_of_model(model).same_again
    for name, value in model.named_parameters():
        if name in names and not value.is_inference():
            aliases[id(value), here(value)._version] = before.tensors[name][1]


def _declared(model: nn.Module) -> str:
    """The blocks as they are read: with them activations, ε, routing, and whatever else the config decides there."""
    try:
        return "\n".join(repr(layer.block) for layer in architectures.read(model).layers)
    except ControllabilityError:
        return ""


def fingerprint(model: nn.Module, originals: dict[str, Tensor] | None = None) -> str:
    """SHA-256 over the blocks as they are read, and the name, dtype, shape and bytes of every parameter and buffer.

    ``originals`` stand in for parameters into which a patch is merged.
    """
    digest = hashlib.sha256(_declared(model).encode())
    digest.update("".join(f"{n} {s}\n" for n, p in model.named_parameters() if (s := quantised.settings(p))).encode())
    for name, value in stored(model):
        value = gathered((originals or {}).get(name, value).detach())
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.contiguous().reshape(-1).view(torch.uint8).cpu()
        for start in range(0, flat.numel(), 1 << 26):
            digest.update(flat[start : start + (1 << 26)].numpy().data)
    return digest.hexdigest()


def known_fingerprint(model: nn.Module) -> str:
    """The model's fingerprint, remembered as long as its parameters look the same."""
    glimpse = look_at(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != glimpse:
        known = (glimpse, fingerprint(model))
        _KNOWN[model] = known
    return known[1]
