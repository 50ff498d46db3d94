"""torch's modes as every run inside the library has them, whatever the caller's are.  (new)"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from controllability.arrays.tensors import plain_numbers
from controllability.models.hooks.carried_patches import state_of_model
from controllability.models.hooks.shards import plain_is_replicated, sharded


@contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """The model's lock, no gradients, no inference mode (what it makes is kept), no autocast, torch's own defaults.

    A run under ``torch.autocast`` computes in other numbers than the model's; a patch is solved and checked in the model's, and
    may be applied under autocast, up to its rounding.
    """
    lock = state_of_model(model).lock  # refuses what is no model
    devices = {"cpu", *(p.device.type for p in model.parameters())} - {"meta"}
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    with (
        lock,
        plain_numbers(*devices, wide=wide),
        torch.inference_mode(False),
        torch.no_grad(),
        plain_is_replicated(sharded(model)),
    ):
        yield
