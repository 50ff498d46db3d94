"""Token sets: what the compiled model will be given for each query, and what it must then compute.

The source of a query is its first token and the query, at positions from 0; the target is the context and the query.  A token
without anything before it attends to itself only, so the same token in two places would have one state and two targets
(theory 5): the first token, which the target begins with too, keeps them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.compiling.queries import refuse_no_text
from controllability.errors import BadInput
from controllability.models.tokens import going_on, with_special

Side = str  # "source" or "target"
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One query's two runs.  The first ``first`` tokens of the source are those of the target, the others its last."""

    text: str
    source: tuple[int, ...]
    target: tuple[int, ...]
    first: int
    weight: int = 1

    def rows(self, side: Side, known: Collection[Prefix] = ()) -> list[int]:
        """The query's positions (behind the first tokens) in one of the two runs, but for beginnings in ``known``."""
        shift = len(getattr(self, side)) - len(self.source)
        return [i + shift for i in range(self.first, len(self.source)) if self.source[: i + 1] not in known]

    def prefixes(self) -> Iterator[Prefix]:
        """The source up to each of its tokens: what the state there depends on."""
        return (self.source[: i + 1] for i in range(len(self.source)))

    def longer(self, token: int) -> Sample:
        """The sample with one more token at its end."""
        return replace(self, source=(*self.source, token), target=(*self.target, token))


@dataclass(frozen=True, repr=False)
class Context(OneLine):
    """A tokenised context: ``tokens`` with the special ones, of which ``first`` stand before every query.

    That is what the tokenizer puts before any text, or else the context's first token (an anchor).
    """

    tokens: tuple[int, ...]
    first: int
    anchored: bool
    tokenizer: Any
    limit: int | None = None

    @staticmethod
    def of(tokenizer: Any, text: str, limit: int | None = None) -> Context:
        """Raises ``BadInput`` for a context without tokens, or one that is only what every query keeps."""
        refuse_no_text(text, "the context")
        tokens, first = with_special(tokenizer, text)
        anchored = first == 0
        if len(tokens) <= max(first, 1):
            raise BadInput(
                "the context is a single token, which stands before every query: there is nothing to compile"
            )
        return Context(tuple(tokens), max(first, 1), anchored, tokenizer, limit)

    def sample(self, text: str, weight: int = 1, more: int = 0) -> Sample:
        """The two runs of a query, which will grow by ``more`` tokens.

        Raises ``BadInput`` when it has no tokens, or the target is longer than the model's positions reach.
        """
        asked = going_on(self.tokenizer, text, [] if self.anchored else list(self.tokens[: self.first]))
        if not asked:
            raise BadInput(f"the query {text!r} has no tokens in this vocabulary")
        target = (*self.tokens, *asked)
        self.refuse_too_long(text, len(target), more)
        return Sample(text, (*self.tokens[: self.first], *asked), target, self.first, weight)

    def refuse_too_long(self, text: str, length: int, more: int = 0) -> None:
        """Raise ``BadInput`` unless ``length`` + ``more`` positions are within the model's limit."""
        if self.limit is not None and length + more > self.limit:
            answer = f" and {more} answer tokens" if more else ""
            raise BadInput(
                f"the context and the query {text!r} have {length} tokens{answer}; the model has {self.limit} positions"
            )


def unrelated_sample(tokenizer: Any, text: str, limit: int | None = None) -> Sample:
    """A text that is to come out as it does without a patch: source and target are the same run."""
    tokens = tuple(with_special(tokenizer, text)[0])[:limit]
    if not tokens:
        raise BadInput(f"the unrelated text {text!r} has no tokens in this vocabulary")
    return Sample(text, tokens, tokens, 0)


def beginnings(samples: Sequence[Sample]) -> dict[Prefix, str]:
    """The different tokens of a set: queries that begin alike share those states.  Each with a text that it is in."""
    return {prefix: sample.text for sample in reversed(samples) for prefix in sample.prefixes()}


def refuse_known(heldout: Sequence[Sample], known: Mapping[Prefix, str]) -> None:
    """Raise ``BadInput`` for a held-out query whose tokens are those of a query, or of its beginning, whatever the texts."""
    for sample in heldout:
        if sample.source in known:
            raise BadInput(
                f"the held-out query {sample.text!r} has the tokens with which the query {known[sample.source]!r} begins: leave "
                "it out of one of the two"
            )


def refuse_foreign(samples: Sequence[Sample], model: Any) -> None:
    """Raise ``BadInput`` for a token that the model does not know: the tokenizer is another model's."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if not isinstance(known, int):
        return
    for sample in samples:
        if unknown := [token for token in sample.target if not 0 <= token < known]:
            raise BadInput(
                f"in {sample.text!r} the tokenizer gives token {unknown[0]}, and the model knows {known}: is it another model's?"
            )


def padded(samples: Sequence[Sample], side: Side, pad: int = 0, device: Any = None) -> dict[str, Tensor]:
    """One run's inputs as a batch (B, L), padded on the right, where no earlier token looks."""
    rows = [getattr(sample, side) for sample in samples]
    longest = max(map(len, rows))
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    inputs = {"input_ids": torch.tensor(ids, device=device)}
    if min(map(len, rows)) < longest:
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        inputs["attention_mask"] = torch.tensor(mask, device=device)
    return inputs


def positions(samples: Sequence[Sample], pinned: bool = True) -> tuple[Tensor, Tensor]:
    """(source positions, target positions), (L,) each and the same for all samples of one context.

    The first tokens belong to the target's first ones, the others to the same tokens behind the context.  The first tokens
    are left out unless ``pinned``.
    """
    longest, first = max(samples, key=lambda sample: len(sample.source)), samples[0].first
    shift = len(longest.target) - len(longest.source)
    source = torch.arange(len(longest.source))
    kept = source if pinned else source[first:]
    return kept, torch.where(kept < first, kept, kept + shift)


def repeated(samples: Sequence[Sample]) -> list[Sample]:
    """Every sample as often as it counts."""
    return [sample for sample in samples for _ in range(sample.weight)]


def batches(samples: Sequence[Sample], side: Side, room: int = 4096) -> Iterator[list[Sample]]:
    """The samples in order, in batches of at most ``room`` tokens with padding (one sample at least)."""
    batch: list[Sample] = []
    longest = 0
    for sample in samples:
        longest = max(longest, len(getattr(sample, side)))
        if batch and longest * (len(batch) + 1) > room:
            yield batch
            batch, longest = [], len(getattr(sample, side))
        batch.append(sample)
    if batch:
        yield batch
