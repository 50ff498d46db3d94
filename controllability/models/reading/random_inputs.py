"""Random input in the form of a model's own: what a reading is compared on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import BadInput
from controllability.models.reading.model_facts import input_embedding, takes_cache, text_config
from controllability.models.reading.positions import main_input


def random_inputs(
    model: nn.Module, example: Mapping[str, Any] | None, seed: int = 0, length: int = 8
) -> dict[str, Any]:
    """Random tensors in the form of ``example``; by default one sample of ``length`` token ids.

    Positions beyond ``length`` are cut off; masks are left out, so that every position counts.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    example = example or {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    name = main_input(example)
    # inputs of another kind (images, encoder states) may belong to certain positions: nothing is cut then
    alone = all(v.ndim < 3 or k == name for k, v in example.items() if isinstance(v, Tensor))
    main = example[name] if name and alone else None
    drawn: dict[str, Any] = {"use_cache": False} if "use_cache" in example or takes_cache(model) else {}
    drawn |= {k: v for k, v in example.items() if "mask" not in k and k != "labels"}
    for name, value in drawn.items():
        if not isinstance(value, Tensor):
            continue
        if main is not None and value.ndim > 1 and value.shape[1] == main.shape[1]:
            value = value[:, :length]
        if name == "position_ids" or (value.dtype == torch.bool):
            drawn[name] = value.to(device)
        elif value.is_floating_point():
            drawn[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(device, value.dtype)
        elif name.endswith("input_ids"):
            drawn[name] = _random_ids(model, value, example[name], generator).to(device)
        else:
            drawn[name] = value.to(device)
    return drawn


def _random_ids(model: nn.Module, like: Tensor, example: Tensor, generator: torch.Generator) -> Tensor:
    """Random ids of the shape of ``like``; of those in the example, where the model does not say how many it knows."""
    config, weight = text_config(model), input_embedding(model)
    sizes = [getattr(config, "vocab_size", None), None if weight is None else weight.shape[0]]
    if not any(sizes):
        known = example.unique().cpu()
        return known[torch.randint(0, len(known), like.shape, generator=generator)]
    size = min(int(s) for s in sizes if s)
    ids = torch.randint(0, size, like.shape, generator=generator)
    special = _placeholders(model)  # where an image stands, one still stands
    for token in special:
        ids = torch.where(ids == token, (ids + 1) % size, ids)
    ids = torch.where(torch.isin(like.cpu(), torch.tensor(special, dtype=like.dtype)), like.cpu(), ids)
    padding = getattr(config, "pad_token_id", None)
    return torch.where(ids == padding, (ids + 1) % size, ids) if padding is not None else ids


def _placeholders(model: nn.Module) -> list[int]:
    """The ids that stand for images, videos or sounds, by the names that configs give them."""
    values = vars(getattr(model, "config", object())) if hasattr(model, "config") else {}
    kinds = ("image", "video", "audio", "vision", "media")
    return [
        v for k, v in values.items()
        if isinstance(v, int) and k.endswith(("token_id", "token_index")) and k.startswith(kinds)
    ]  # fmt: skip


def refuse_ids(ids: Tensor, vocabulary: int, role: str) -> None:
    """Raise ``BadInput`` when a token id is outside the vocabulary."""
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise BadInput(f"{role}: token ids must lie in 0 … {vocabulary - 1}, got {int(ids.min())} … {int(ids.max())}")
