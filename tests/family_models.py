"""Tiny models of every causal-LM family of transformers, with random weights, norms and biases."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

RECIPES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "families.json").read_text())


def config_of(name: str, overrides: dict[str, Any] | None = None) -> Any:
    """The tiny config of a family, or another with these ``overrides`` of the defaults."""
    recipe = RECIPES[name]
    config = _class(recipe["config_class"])(**(overrides or recipe["overrides"]))
    wanted = getattr(_class(recipe["model_class"]), "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    # the class takes a part of a composite config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)


@functools.cache
def _modules() -> list[str]:
    root = Path(transformers.__file__).parent / "models"
    return [p.name for p in root.iterdir() if p.is_dir()]


def _class(name: str) -> Any:
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    import importlib

    for folder in _modules():
        for kind in ("configuration", "modeling"):
            path = Path(transformers.__file__).parent / "models" / folder / f"{kind}_{folder}.py"
            if path.is_file() and f"class {name}(" in path.read_text():
                return getattr(importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}"), name)
    pytest.skip(f"not there: transformers {transformers.__version__} has no {name}")


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, config: Any = None) -> nn.Module:
    """A tiny model in evaluation mode, of a ``config`` of its own or the usual one; every parameter and stored vector random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config or config_of(name)
        cls = _class(RECIPES[name]["model_class"])
        repair = _REPAIRS.get(name)
        if repair:
            repair(config, cls)
        config._attn_implementation = "eager"
        model = cls._from_config(config, experts_implementation="eager")
    model = model.eval().to(dtype)  # type: ignore[no-any-return]
    randomise(model, seed)
    for pattern in RECIPES[name].get("fp32_params", ()):
        for n, p in [*model.named_parameters(), *model.named_buffers()]:
            if re.search(pattern, n):
                p.data = p.data.float()
    return model


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """xglm builds a mask in the default dtype: in float64 it needs that to be float64."""
    torch.set_default_dtype(torch.float64 if name == "xglm" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def logits_of(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """Logits, or the last hidden state of a model without."""
    output = model(**{"use_cache": False, **kwargs})
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Vectors (norms, biases, gains) and correction buffers get random values; matrices that are zero too."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(like: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).mul(scale).to(like.dtype)

    for n, p in model.named_parameters():
        if p.ndim <= 1:
            p.add_(draw(p, 0.2))
        elif re.search(r"gate\.(down_proj|router_mlp)", n):  # zaya: with less its router says the same everywhere
            p.copy_(draw(p, 0.5))
        elif not bool(p.any()) or p.std() < 0.05:
            p.copy_(draw(p, 0.1))
    for n, b in model.named_buffers():
        if any(key in n for key in ("correction_bias", "expert_bias", "balancing_biases", "layer_scalar")):
            b.add_(draw(b, 0.1))
        if "balancing_biases" in n:
            b[-1] = 0.6  # zaya: the last class, no expert, is chosen at some positions


def _every_layer_shares(config: Any, cls: Any) -> None:
    """transformers 5.23 raises where every layer shares keys and values, which these configs demand.

    The text config becomes a subclass of the same name (by which it is looked up) that does not raise.
    """
    text = config.text_config
    modes = {"kv_sharing_modes": property(lambda self: ["reuse"] * self.num_hidden_layers)}
    text.__class__ = type(type(text).__name__, (type(text),), modes)


def _other_eyes(config: Any, cls: Any) -> None:
    """Gemma 3n's vision tower needs timm; these runs read text, so a vision tower of transformers' own stands in."""
    known = config.vision_config
    eyes = transformers.SiglipVisionConfig(hidden_size=known.hidden_size, num_hidden_layers=1, num_attention_heads=4)
    for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
        setattr(eyes, name, getattr(known, name))
    vars(config)["vision_config"] = eyes  # a plain assignment is refused by type


_REPAIRS: dict[str, Any] = {
    "gemma3n": _other_eyes,
    "gemma4_assistant": _every_layer_shares,
    "gemma4_unified_assistant": _every_layer_shares,
}


def inputs(name: str, model: nn.Module, batch: int = 2, context: int = 8, query: int = 4, seed: int = 3) -> Any:
    """(target, source): ``context + query`` tokens and the last ``query`` of them at the same positions."""
    generator = torch.Generator().manual_seed(seed)
    if name.endswith("_assistant"):
        return _assistant_inputs(model, batch, context, query, generator)
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", getattr(config, "vocab_size", 100)))
    books = int(getattr(text, "num_codebooks", 0) or 0) if name.startswith("musicgen") else 0
    rows = batch * books if books else batch
    ids = torch.randint(5, vocabulary - 2, (rows, context + query), generator=generator)
    extra = {}
    for key, spec in RECIPES[name].get("forward", {}).items():
        extra[key] = torch.randn(*spec["randn"], generator=generator, dtype=torch.float64).to(model.dtype)
    return {"input_ids": ids} | extra, {"input_ids": ids[:, context:]} | extra


def _assistant_inputs(model: Any, batch: int, context: int, query: int, generator: torch.Generator) -> Any:
    """An assistant reads no ids: its context are the keys and values of another model, one pair a layer type."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(model.dtype)

    shared = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads = attention.config.num_attention_heads // attention.num_key_value_groups
        pair = (draw(batch, heads, context + query, attention.head_dim) for _ in range(2))
        shared[attention.layer_type] = tuple(pair)
    query_only = {kind: tuple(x[:, :, context:] for x in pair) for kind, pair in shared.items()}
    both = {
        "inputs_embeds": draw(batch, query, 2 * model.config.backbone_hidden_size),
        "position_ids": torch.arange(context, context + query)[None],
        "logits_to_keep": torch.arange(query),  # a number would slice per-layer inputs, which an assistant lacks
    }
    return both | {"shared_kv_states": shared}, both | {"shared_kv_states": query_only}
