"""What leaving chunks out of the context does to the answer: what an attribution is held against."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from controllability.arrays.one_line import OneLine
from controllability.instrument.chunks import Reading
from controllability.instrument.states import Kept, context_logprobs
from controllability.models.sweep.target_run import Progress

TOP = 1, 2, 3, 5
LEFT_OUT = "leave one out"


@dataclass(frozen=True, repr=False)
class Interventions(OneLine):
    """Changes of the context, and the answer's log-probability behind each: every context is run over by itself.

    ``leave_one_out`` is how much the log-probability falls without each chunk.  ``kept`` are the random ablations (each chunk stays with
    probability ½) and ``logprobs`` what came of them.  ``lds`` is Spearman's rank correlation of these with the sum of the scores of the chunks
    that stayed, by whose scores: each layer's shares, those of all layers, leave-one-out's.  ``drops`` is by how much the log-probability
    falls without the k chunks of the largest scores, for all layers' shares and for leave-one-out.
    """

    leave_one_out: list[float]
    kept: list[Kept]
    logprobs: list[float]
    lds: dict[str, float | None]
    drops: dict[str, dict[int, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def intervene(
    model: nn.Module, reading: Reading, scores: Mapping[str, Sequence[float]], logprob: float, ablations: int, seed: int,
    place: str | None, progress: Progress,
) -> Interventions:  # fmt: skip
    """``logprob`` is that of the answer behind the whole context; ``scores`` a number a chunk, by name, the first of them those of all layers."""
    count, rng = len(reading.chunks), random.Random(seed)
    without = lambda left_out: tuple(i for i in range(count) if i not in left_out)  # noqa: E731
    alone = [without((i,)) for i in range(count)]
    kept = [tuple(i for i in range(count) if rng.random() < 0.5) for _ in range(ablations)]
    seen = dict(
        zip(
            first := [*dict.fromkeys([*alone, *kept])],
            context_logprobs(model, reading, first, place, progress),
            strict=True,
        )
    )
    left = [logprob - seen[each] for each in alone]
    name = next(iter(scores))
    ranked = {who: sorted(range(count), key=lambda i: -of[i]) for who, of in ((name, scores[name]), (LEFT_OUT, left))}
    largest = {who: {k: without(order[:k]) for k in TOP if k < count} for who, order in ranked.items()}
    more = [*dict.fromkeys(each for sets in largest.values() for each in sets.values() if each not in seen)]
    seen |= zip(more, context_logprobs(model, reading, more, place, progress), strict=True)
    outcome = [seen[each] for each in kept]
    lds = {
        who: rank_correlation([sum(of[i] for i in each) for each in kept], outcome)
        for who, of in ({**scores, LEFT_OUT: left}).items()
    }
    return Interventions(
        left,
        kept,
        outcome,
        lds,
        {who: {k: logprob - seen[s] for k, s in sets.items()} for who, sets in largest.items()},
    )


def rank_correlation(predicted: Sequence[float], found: Sequence[float]) -> float | None:
    """Spearman's; None where either does not vary."""
    from scipy.stats import spearmanr

    if len({*predicted}) < 2 or len({*found}) < 2:
        return None
    return float(spearmanr(predicted, found).statistic)  # type: ignore[attr-defined]
