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
from controllability.models.sweep.shared_past import SharedPast


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
    errors = seen.max_logit_error, seen.relative_error
    return Agreement(seen.top1_agreement, float(seen.kl.mean()), *errors, len(seen.kl))


def run(model: Any, batch: Sequence[Sample], side: Side) -> Tensor:
    """The model's logits (B, L, vocabulary) in one of the two runs of a batch."""
    inputs = padded(batch, side, device=next(model.parameters()).device)
    return result_of(model(**without_cache(model, inputs)))


@torch.no_grad()
def logits_of(
    model: Any,
    samples: Sequence[Sample],
    side: Side = "source",
    known: Collection[Prefix] = (),
    alone: bool = False,
    past: SharedPast | None = None,
) -> list[Tensor]:
    """The model's logits at the query's positions, (n_i, vocabulary) a sample, in its source or target run.

    Positions whose text so far is in ``known`` are left out.  ``alone`` runs every sample by itself: another batch rounds
    otherwise, and what holds in the batch that a patch was solved in alone is worth little.  ``past``: the context, which is run already.
    """
    found: list[Tensor] = []
    if past is not None and side == "target":
        for own in past.batches([len(sample.target) - past.length for sample in samples]):
            batch = [samples[i] for i in own]
            inputs = padded(batch, "target", device=next(model.parameters()).device)
            both = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            logits = result_of(model(**past.inputs(*(each[:, past.length :] for each in both))))
            kept = ([row - past.length for row in sample.rows(side, known)] for sample in batch)
            found += [logits[i, rows].cpu() for i, rows in enumerate(kept)]
        return found
    for batch in [[sample] for sample in samples] if alone else batches(samples, side):
        logits = run(model, batch, side)
        found += [logits[i, sample.rows(side, known)].cpu() for i, sample in enumerate(batch)]
    return found


@dataclass(frozen=True)
class Apart:
    """Of texts that are compared with the base model: position 1 and the others apart, and the perplexity {base, compiled, ratio}.

    None of it where no text is long enough.
    """

    positions: dict[str, Agreement]
    perplexity: dict[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: part.to_dict() for name, part in self.positions.items()} | {"perplexity": self.perplexity}


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
    def of(
        model: Any, samples: Sequence[Sample], known: Collection[Prefix] = (), past: SharedPast | None = None
    ) -> Yardstick:
        """Runs the unpatched model: on the targets for what is wanted, on the sources beside it."""
        without = logits_of(model, samples, "source", known)
        same = all(sample.source == sample.target for sample in samples)
        wanted = without if same else logits_of(model, samples, "target", known, past=past)
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

    def apart(self, position: int, logits: Sequence[Tensor]) -> Apart:
        """Of whole texts: the agreement at one position and at all others, and the perplexity before and after."""
        parts = {
            "position_1": lambda x: x[position : position + 1],
            "other_positions": lambda x: torch.cat([x[:position], x[position + 1 :]]),
        }
        pairs = {name: ([*map(part, logits)], [*map(part, self.wanted)]) for name, part in parts.items()}
        found = {name: agreement(*pair) for name, pair in pairs.items() if any(map(len, pair[1]))}
        if all(len(sample.source) < 2 for sample in self.samples):
            return Apart(found, None)
        base, compiled = self._perplexity(self.without), self._perplexity(logits)
        return Apart(found, {"base": base, "compiled": compiled, "ratio": compiled / base})

    def _perplexity(self, logits: Sequence[Tensor]) -> float:
        pairs = ((x[:-1].float(), torch.tensor(s.source[1:])) for s, x in zip(self.samples, logits, strict=True))
        losses = [torch.nn.functional.cross_entropy(*pair, reduction="none").double() for pair in pairs if len(pair[1])]
        return float(torch.cat(losses).mean().clamp(max=700).exp())
