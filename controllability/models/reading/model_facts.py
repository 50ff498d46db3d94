"""Facts that a model states about itself: its embedding, text config, cache, position limit."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
