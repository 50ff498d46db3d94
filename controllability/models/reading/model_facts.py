"""Facts that a model states about itself: its modules, embedding, text config, cache, position limit; and what keeps it from being run."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import BadInput
from controllability.models.transformers_parts import hands_on_states


def position_limit(config: Any) -> int | None:
    """How many positions a model with this (text) config has; None where it sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def keeps_cache(model: nn.Module) -> bool:
    """Whether a run of token ids can be gone on from: a causal model of transformers with its plain cache."""
    decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(not hands_on_states(model) and hasattr(model, "generate") and decoder)


def cache_bytes(model: nn.Module) -> int | None:
    """How many bytes one token more takes in the model's key-value cache, measured on two short runs; None without one."""
    if not keeps_cache(model):
        return None
    sizes, device = [], next(model.parameters()).device
    with torch.no_grad():
        for length in (1, 2):
            ids = torch.zeros((1, length), dtype=torch.long, device=device)
            layers = getattr(model(input_ids=ids, use_cache=True).past_key_values, "layers", ())
            held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
            sizes.append(sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor)))
    return sizes[1] - sizes[0] or None


def input_embedding(model: nn.Module) -> Tensor | None:
    """The embedding matrix of the model's tokens (of the first codebook); None where there is none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if getter else None
    except NotImplementedError:
        embedding = None
    if isinstance(embedding, nn.ModuleList):
        embedding = embedding[0]
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def text_config(model: nn.Module) -> Any:
    """The config of the language model, which composite models keep inside theirs."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def forward_arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward by name; none where it does not say."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def takes_cache(model: nn.Module) -> bool:
    """Whether ``use_cache=False`` may be said to a model: by its forward's own argument, or as transformers do.

    A forward that hands unknown arguments on (``**kwargs``) may hand them to something that refuses this one.
    """
    arguments = forward_arguments(model)
    open_ended = any(a.kind is a.VAR_KEYWORD for a in arguments.values())
    return "use_cache" in arguments or (open_ended and hasattr(getattr(model, "config", None), "to_dict"))


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, in its order, without a generator inside a generator for every level.

    Whoever looks for changes lists them before every step.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    >>> modules_of(model) == list(model.named_modules())
    True
    """
    found: dict[nn.Module, str] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in found:
            continue
        found[module] = name
        prefix = f"{name}." if name else ""
        waiting += [(prefix + part, child) for part, child in reversed(module._modules.items()) if child is not None]
    return [(name, module) for module, name in found.items()]


def refuse_training(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> None:
    """Raise ``BadInput`` for a model with a module in training mode.  ``modules`` are the model's by name, if they are known."""
    for name, module in modules_of(model) if modules is None else modules:
        if module.training:
            which = f"module {name}" if name else "the model"
            raise BadInput(f"{which} is in training mode: call model.eval() first, dropout would make runs differ")


def refuse_offloaded(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> None:
    """Raise ``BadInput`` for a model of which ``accelerate`` keeps weights elsewhere between their uses.

    Between two forward passes such a weight is on the meta device: there is nothing to compare, to merge into or to
    take a fingerprint of.  Weights that stay on several devices are no obstacle.  ``modules`` are the model's by name,
    for who has listed them already.

    >>> refuse_offloaded(nn.Linear(2, 2))
    """
    for name, module in modules_of(model) if modules is None else modules:
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            if not getattr(hook, "offload", False):
                continue
            held = next((n for n, p in module.named_parameters() if p.is_meta), "")
            what = f"parameter {name}.{held}".replace("..", ".") if held else f"module {name or 'the model'}"
            raise BadInput(
                f"{what} is offloaded: between two forward passes its weights are kept on the CPU or on disk, and here is "
                "only an empty one (device meta). Load the model with its weights on devices: a device_map without "
                '"cpu" beside accelerators and without "disk", a smaller dtype, or a quantised model. Nothing was changed'
            )


def refuse_fully_sharded(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ``BadInput`` for a model that FSDP2 (``fully_shard``) has spread: between its forward passes no process holds a whole weight."""
    for name, module in modules:
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise BadInput(
                f"module {name or 'the model'} is spread by fully_shard (FSDP2), which holds whole weights only while it runs: load "
                "the model with tensor parallelism (DistributedConfig(tp_size=…)), or patch it before fully_shard. Nothing was changed"
            )


def _hooks(hook: Any) -> Iterator[Any]:
    """The hooks that accelerate has put on a module, which may be several in one."""
    if hook is None:
        return
    if inner := getattr(hook, "hooks", ()):
        for part in inner:
            yield from _hooks(part)
    else:
        yield hook
