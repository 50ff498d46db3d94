"""How far one model's logits are from another's, over every position of a set of texts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.compiling.token_sets import Prefix, Sample, Side, batches, padded
from controllability.errors import BadInput, NotVerified
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import LogitComparison, compare_logits, joined, result_of


@dataclass(frozen=True)
class Agreement:
    """Over ``positions``: how often the likeliest token is the same, mean KL(wanted ‖ found), largest |difference| of a logit.

    ``relative_error`` is the last over the largest |wanted|.
    """

    top1_agreement: float
    kl: float
    max_logit_error: float
    relative_error: float
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def agreement(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> Agreement:
    """Compare logits, (n_i, vocabulary) a text, over all texts.  Raises ``NotVerified`` where a number is not finite.

    >>> import torch
    >>> wanted = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    >>> agreement(wanted, wanted).top1_agreement, agreement([torch.tensor([[2.0, 0.0], [3.0, 1.0]])], wanted).top1_agreement
    (1.0, 0.5)
    """
    return together(compare_logits(x, y) for x, y in zip(found, wanted, strict=True) if len(y))


def together(compared: Iterable[LogitComparison]) -> Agreement:
    """Over all texts.  Raises ``NotVerified`` where a number is not finite."""
    texts = [one for one in compared if len(one.kl)]
    if not texts:
        raise BadInput("there is no position to compare")
    seen = joined(texts)
    if not seen.finite:
        raise NotVerified("verification failed: logits are not finite; try another dtype; nothing was written")
    return Agreement(
        seen.top1_agreement, float(seen.kl.mean()), seen.max_logit_error, seen.relative_error, len(seen.kl)
    )


def run(model: Any, batch: Sequence[Sample], side: Side) -> Tensor:
    """The model's logits (B, L, vocabulary) in one of the two runs of a batch."""
    inputs = padded(batch, side, device=next(model.parameters()).device)
    return result_of(model(**without_cache(model, inputs)))


@torch.no_grad()
def logits_of(
    model: Any, samples: Sequence[Sample], side: Side = "source", known: Collection[Prefix] = (), alone: bool = False
) -> list[Tensor]:
    """The model's logits at the query's positions, (n_i, vocabulary) a sample, in its source or target run.

    Positions whose text so far is in ``known`` are left out.  ``alone`` runs every sample by itself: another batch rounds
    otherwise, and what holds in the batch that a patch was solved in alone is worth little.
    """
    found: list[Tensor] = []
    for batch in [[sample] for sample in samples] if alone else batches(samples, side):
        logits = run(model, batch, side)
        found += [logits[i, sample.rows(side, known)].cpu() for i, sample in enumerate(batch)]
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Yardstick(OneLine):
    """A set of texts with the logits that are wanted at them, and what the unpatched model gives there.

    Positions that are the beginning of a text in ``known`` do not count.
    """

    samples: Sequence[Sample]
    wanted: Sequence[Tensor]
    without: Sequence[Tensor]
    known: Collection[Prefix] = ()

    @staticmethod
    def of(model: Any, samples: Sequence[Sample], known: Collection[Prefix] = ()) -> Yardstick:
        """Runs the unpatched model: on the targets for what is wanted, on the sources beside it."""
        wanted, without = (logits_of(model, samples, side, known) for side in ("target", "source"))
        return Yardstick(samples, wanted, without, known)

    def found(self, model: Any, alone: bool = False) -> list[Tensor]:
        """The logits of the model as it is now, on the sources."""
        return logits_of(model, self.samples, "source", self.known, alone)

    def measure(self, model: Any, alone: bool = False) -> Agreement:
        """How far the model as it is now is from what is wanted."""
        return agreement(self.found(model, alone), self.wanted)

    @cached_property
    def gaps(self) -> list[LogitComparison]:
        """What the unpatched model lacks at every position, a text each."""
        return [compare_logits(x, y) for x, y in zip(self.without, self.wanted, strict=True)]

    @cached_property
    def unpatched(self) -> Agreement:
        """How the unpatched model does on it."""
        return together(self.gaps)

    def apart(self, position: int, logits: Sequence[Tensor]) -> dict[str, Agreement]:
        """The agreement at one position of every text, and at all others: the first ones weigh much in a short text's mean."""
        parts = {
            "position_1": lambda x: x[position : position + 1],
            "other_positions": lambda x: torch.cat([x[:position], x[position + 1 :]]),
        }
        pairs = {name: ([*map(part, logits)], [*map(part, self.wanted)]) for name, part in parts.items()}
        return {name: agreement(*pair) for name, pair in pairs.items() if any(map(len, pair[1]))}

    def perplexity(self, logits: Sequence[Tensor]) -> float | None:
        """Of the texts' own tokens behind their first; None where no text has more than one.  For sets whose rows are whole texts."""
        losses = [
            torch.nn.functional.cross_entropy(x[:-1].double(), torch.tensor(sample.source[1:]), reduction="none")
            for sample, x in zip(self.samples, logits, strict=True)
        ]
        all_ = torch.cat(losses)
        return float(all_.mean().clamp(max=700).exp()) if len(all_) else None

    def part(self, kept: Sequence[int], known: Collection[Prefix] = ()) -> Yardstick:
        """Some of the texts, without the positions that are the beginning of one in ``known``."""
        samples = [self.samples[i] for i in kept]
        rows = [[sample.rows("source").index(i) for i in sample.rows("source", known)] for sample in samples]
        wanted, without = ([x[i][r] for i, r in zip(kept, rows, strict=True)] for x in (self.wanted, self.without))
        return Yardstick(samples, wanted, without, known)
