"""How far one model's logits are from another's, over every position of a set of texts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from controllability.compiling.token_sets import Prefix, Sample, Side, batches, padded
from controllability.errors import BadInput, NotVerified
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import result_of


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
    """Compare logits, (n_i, vocabulary) a text.  Raises ``NotVerified`` where a number is not finite.

    >>> import torch
    >>> wanted = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    >>> agreement(wanted, wanted).top1_agreement, agreement([torch.tensor([[2.0, 0.0], [3.0, 1.0]])], wanted).top1_agreement
    (1.0, 0.5)
    """
    same = count = 0
    kl = error = size = 0.0
    for x, y in ((x.double(), y.double()) for x, y in zip(found, wanted, strict=True) if len(y)):
        difference = float((x - y).abs().max())
        log_p, log_q = y.log_softmax(-1), x.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        if not (math.isfinite(difference) and math.isfinite(kl)):
            raise NotVerified("verification failed: logits are not finite; try another dtype; nothing was written")
        same += int((x.argmax(-1) == y.argmax(-1)).sum())
        count += len(y)
        error, size = max(error, difference), max(size, float(y.abs().max()))
    if not count:
        raise BadInput("there is no position to compare")
    return Agreement(same / count, max(0.0, kl / count), error, error / size if size else error, count)


@torch.no_grad()
def logits_of(
    model: Any, samples: Sequence[Sample], side: Side = "source", known: Collection[Prefix] = (), alone: bool = False
) -> list[Tensor]:
    """The model's logits at the query's positions, (n_i, vocabulary) a sample, in its source or target run.

    Positions whose text so far is in ``known`` are left out.  ``alone`` runs every sample by itself: another batch rounds
    otherwise, and what holds in the batch that a patch was solved in alone is worth little.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    for batch in [[sample] for sample in samples] if alone else batches(samples, side):
        inputs = {name: value.to(device) for name, value in padded(batch, side).items()}
        logits = result_of(model(**without_cache(model, inputs)))
        found += [logits[i, sample.rows(side, known)].cpu() for i, sample in enumerate(batch)]
    return found


@dataclass(frozen=True, eq=False)
class Yardstick:
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

    @property
    def unpatched(self) -> Agreement:
        """How the unpatched model does on it."""
        return agreement(self.without, self.wanted)

    def part(self, kept: Sequence[int], known: Collection[Prefix] = ()) -> Yardstick:
        """Some of the texts, without the positions that are the beginning of one in ``known``."""
        samples = [self.samples[i] for i in kept]
        rows = [[sample.rows("source").index(i) for i in sample.rows("source", known)] for sample in samples]
        wanted, without = ([x[i][r] for i, r in zip(kept, rows, strict=True)] for x in (self.wanted, self.without))
        return Yardstick(samples, wanted, without, known)
