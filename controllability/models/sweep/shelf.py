"""Small tensors that are kept, side by side in a few large ones."""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = 2**18  # of one board
STEP = 16  # tensors begin at multiples of so many numbers


class Shelf:
    """Keeps small tensors.

    Each by itself would be cut from the space that a layer's activations left free, and the next layer's would no longer
    fit there: a model that is run on a long context would then take many times the memory of a layer.
    """

    def __init__(self) -> None:
        self._boards: dict[tuple[torch.device, torch.dtype], tuple[Tensor, int]] = {}

    def keep(self, x: Tensor) -> Tensor:
        """A copy of ``x``, or ``x`` itself if it is large."""
        count = x.numel()
        if 4 * count > NUMBERS:
            return x
        board, used = self._boards.get((x.device, x.dtype), (None, 0))
        if board is None or used + count > len(board):
            board, used = x.new_empty(NUMBERS), 0
        self._boards[x.device, x.dtype] = board, used + count + -count % STEP
        return board[used : used + count].view(x.shape).copy_(x)
