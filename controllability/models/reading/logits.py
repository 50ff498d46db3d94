"""What a model returns: logits, or the last hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from controllability.errors import BadInput


def result_of(output: Any) -> torch.Tensor:
    """The logits of a run, or its last hidden states: by name, or the tensor itself, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    for name in ("logits", "last_hidden_state"):
        held = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(held, torch.Tensor):
            return held
    if isinstance(found, torch.Tensor):
        return found
    raise BadInput(
        f"the model returned a {type(output).__name__} without logits: its forward must return a tensor (B, T, n), "
        "or an object with .logits or .last_hidden_state"
    )
