"""Tiny models of every causal-LM family of transformers, with random weights, norms and biases."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

RECIPES: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "families.json").read_text())


def config_of(name: str) -> Any:
    """The tiny config of a family."""
    recipe = RECIPES[name]
    overrides = dict(recipe["overrides"])
    config = _class(recipe["config_class"])(**overrides)
    wanted = getattr(_class(recipe["model_class"]), "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    # the class takes a part of a composite config
    return next(part for part in vars(config).values() if isinstance(part, wanted))


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
    raise AttributeError(name)


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode; every parameter and stored vector random."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(name)
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


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Vectors (norms, biases, gains) and correction buffers get random values; matrices that are zero too."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(like: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).mul(scale).to(like.dtype)

    for _, p in model.named_parameters():
        if p.ndim <= 1:
            p.add_(draw(p, 0.2))
        elif not bool(p.any()) or p.std() < 0.05:
            p.copy_(draw(p, 0.1))
    for n, b in model.named_buffers():
        if any(key in n for key in ("correction_bias", "expert_bias", "balancing_biases", "layer_scalar")):
            b.add_(draw(b, 0.1))


def _gemma4_assistant(config: Any, cls: Any) -> None:
    """transformers 5.23 raises where every layer shares keys and values, which these configs demand."""


_REPAIRS: dict[str, Any] = {}


def inputs(name: str, model: nn.Module, batch: int = 2, context: int = 8, query: int = 4, seed: int = 3) -> Any:
    """(target, source): ``context + query`` tokens and the last ``query`` of them at the same positions."""
    generator = torch.Generator().manual_seed(seed)
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
