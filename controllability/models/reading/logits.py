"""What a model returns, logits or the last hidden state, and how far one model's logits are from another's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controllability.arrays import errors_and_sizes, quotient
from controllability.arrays.one_line import OneLine
from controllability.errors import BadInput

ENTRIES = 2**20  # logits compared at a time: several times over
SERIES = {torch.float32: 1e-2, torch.float64: 1e-5}  # below it e⁻ᵍ − 1 + g is a series: else it is rounding


def result_of(output: Any) -> Tensor:
    """The logits of a run, or its last hidden states: by name, or the tensor itself, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    for name in ("logits", "last_hidden_state"):
        held = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(held, Tensor):
            return held
    if isinstance(found, Tensor):
        return found
    raise BadInput(
        f"the model returned a {type(output).__name__} without logits: its forward must return a tensor (B, T, n), "
        "or an object with .logits or .last_hidden_state"
    )


@dataclass(frozen=True, eq=False, repr=False)
class LogitComparison(OneLine):
    """Logits held against those that are wanted, position by position: tensors (N,), computed in float32 or wider.

    ``error`` is max |found − wanted| and ``size`` max |wanted| over the vocabulary, ``kl`` is KL(wanted ‖ found) in nats, ``tv``
    the total variation ½ Σ |p − q|, and ``best`` and ``best_wanted`` are the likeliest tokens.
    """

    error: Tensor
    size: Tensor
    kl: Tensor
    tv: Tensor
    best: Tensor
    best_wanted: Tensor

    @property
    def same(self) -> Tensor:
        """Whether the likeliest token of a position is the same, (N,)."""
        return self.best == self.best_wanted

    @property
    def max_logit_error(self) -> float:
        """The largest |difference| of a logit."""
        return float(self.error.max())

    @property
    def relative_error(self) -> float:
        """max |difference| / max |wanted| over all positions."""
        return quotient(self.max_logit_error, float(self.size.max()))

    @property
    def relative_errors(self) -> Tensor:
        """Each position's own max |difference| / max |wanted|, (N,)."""
        return self.error / self.size.clamp_min(torch.finfo(self.size.dtype).tiny)

    @property
    def top1_agreement(self) -> float:
        """The share of positions with the same likeliest token."""
        return float(self.same.double().mean())

    @property
    def finite(self) -> bool:
        """Whether every error and every KL is a number."""
        return bool(torch.isfinite(self.error).all() and torch.isfinite(self.kl).all())


def compare_logits(found: Tensor, wanted: Tensor) -> LogitComparison:
    """Compare logits (..., vocabulary) at the same positions.

    >>> import torch
    >>> wanted = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> seen = compare_logits(torch.tensor([[2.0, 0.0], [3.0, 1.0]]), wanted)
    >>> seen.max_logit_error, seen.relative_error, seen.top1_agreement
    (3.0, 1.5, 0.5)
    """
    found, wanted = (x.reshape(-1, x.shape[-1]) for x in (found, wanted))
    rows, dtype = max(1, ENTRIES // wanted.shape[-1]), torch.promote_types(wanted.dtype, torch.float32)
    return joined([
        _compared(x.to(dtype), y.to(dtype)) for x, y in zip(found.split(rows), wanted.split(rows), strict=True)
    ])  # fmt: skip


def joined(parts: list[LogitComparison]) -> LogitComparison:
    """One comparison of the positions of all ``parts``."""
    return LogitComparison(*(torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])))


def _compared(found: Tensor, wanted: Tensor) -> LogitComparison:
    """KL as Σ p·(e⁻ᵍ − 1 + g), g = log p − log q: no term is below 0, so what is small is not lost among what is large."""
    gap = wanted - found + (found.logsumexp(-1, keepdim=True) - wanted.logsumexp(-1, keepdim=True))
    p, less = wanted.softmax(-1), torch.expm1(-gap)
    near = gap.abs() < SERIES[gap.dtype]
    kl = (p * torch.where(near, gap * gap * (0.5 - gap / 6), less + gap)).sum(-1, dtype=torch.float64)
    tv = (p * less.abs()).sum(-1, dtype=torch.float64) / 2
    error, size = errors_and_sizes(found, wanted)
    return LogitComparison(error.double(), size.double(), kl.clamp_min(0), tv, found.argmax(-1), wanted.argmax(-1))
