"""What a model returns, logits or the last hidden state, and how far one model's logits are from another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controllability.arrays import errors_and_sizes, quotient
from controllability.errors import BadInput

ROWS = 256  # positions compared at a time: a row holds a vocabulary of float64 several times over


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


@dataclass(frozen=True, eq=False)
class LogitComparison:
    """Logits held against those that are wanted, position by position: tensors (N,), computed in float64.

    ``error`` is max |found − wanted| and ``size`` max |wanted| over the vocabulary, ``kl`` is KL(wanted ‖ found) in nats, and
    ``same`` says whether the likeliest token is the same.
    """

    error: Tensor
    size: Tensor
    kl: Tensor
    same: Tensor

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
    return joined([
        _compared(x.double(), y.double()) for x, y in zip(found.split(ROWS), wanted.split(ROWS), strict=True)
    ])  # fmt: skip


def joined(parts: list[LogitComparison]) -> LogitComparison:
    """One comparison of the positions of all ``parts``."""
    return LogitComparison(*(torch.cat([getattr(p, name) for p in parts]) for name in ("error", "size", "kl", "same")))


def _compared(found: Tensor, wanted: Tensor) -> LogitComparison:
    log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    return LogitComparison(*errors_and_sizes(found, wanted), kl, found.argmax(-1) == wanted.argmax(-1))
