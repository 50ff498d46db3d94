"""Token sets: what the compiled model will be given for each query, and what it must then compute.

The source of a query is its first token and the query, at positions from 0; the target is the context and the query.  A token
without anything before it attends to itself only, so the same token in two places would have one state and two targets
(theory 5): the first token, which the target begins with too, keeps them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.compiling.queries import Query, refuse_contradiction, refuse_no_text
from controllability.errors import BadInput
from controllability.models.tokens import going_on, with_special

Side = str  # "source" or "target"
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One query's two runs.  The first ``first`` tokens of the source stand before every query, the others are the target's last.

    The last ``answered`` of both are the answer's.  ``answer`` is the text that was given for it, ``spelt`` its tokens, ``said`` what the
    contextual model says there itself, as far as it was asked.
    """

    text: str
    source: tuple[int, ...]
    target: tuple[int, ...]
    first: int
    weight: int = 1
    hard: bool = False
    answer: str | None = None
    spelt: Prefix = ()
    said: Prefix = ()
    answered: int = 0

    def rows(self, side: Side, known: Collection[Prefix] = ()) -> list[int]:
        """The query's positions (behind the first tokens) in one of the two runs, but for beginnings in ``known``."""
        shift = len(getattr(self, side)) - len(self.source)
        return [i + shift for i in range(self.first, len(self.source)) if self.source[: i + 1] not in known]

    def prefixes(self) -> Iterator[Prefix]:
        """The source up to each of its tokens: what the state there depends on."""
        return (self.source[: i + 1] for i in range(len(self.source)))

    def longer(self, *tokens: int) -> Sample:
        """The sample with these tokens of an answer at its end."""
        both = {side: (*getattr(self, side), *tokens) for side in ("source", "target")}
        return replace(self, **both, answered=self.answered + len(tokens))

    @property
    def bare(self) -> Sample:
        """The sample without its answer."""
        cut = {side: getattr(self, side)[: len(getattr(self, side)) - self.answered] for side in ("source", "target")}
        return replace(self, **cut, answered=0)


@dataclass(frozen=True, repr=False)
class Context(OneLine):
    """A tokenised context: ``tokens`` with the special ones, and the ``lead`` that stands before every query.

    That is what the tokenizer puts before any text, or else one token of the context (an anchor): the first with which no query begins.
    The same token twice at the beginning attends to nothing but itself, so both would have one state.
    """

    tokens: tuple[int, ...]
    lead: tuple[int, ...]
    anchored: bool
    tokenizer: Any
    limit: int | None = None

    @staticmethod
    def of(tokenizer: Any, text: str, limit: int | None = None, queries: Iterable[str] = ()) -> Context:
        """Raises ``BadInput`` for a context without tokens, or one that is only what every query keeps."""
        refuse_no_text(text, "the context")
        tokens, first = with_special(tokenizer, text)
        anchored = first == 0
        if len(tokens) <= max(first, 1):
            raise BadInput(
                "the context is a single token, which stands before every query: there is nothing to compile"
            )
        if limit is not None and len(tokens) >= limit:
            raise BadInput(
                f"the context has {len(tokens)} tokens, and the model {limit} positions: there is no room for a query; shorten it"
            )
        lead = tuple(tokens[: max(first, 1)])
        if anchored and tokens[0] not in tokenizer.all_special_ids:
            begun = {ids[0] for query in queries if (ids := going_on(tokenizer, query, []))}
            lead = (next((token for token in tokens if token not in begun), tokens[0]),)
        return Context(tuple(tokens), lead, anchored, tokenizer, limit)

    def sample(self, text: str, weight: int = 1, more: int = 0) -> Sample:
        """The two runs of a query, which will grow by ``more`` tokens.

        Raises ``BadInput`` when it has no tokens, or the target is longer than the model's positions reach.
        """
        begins = not self.anchored or self.tokens[0] in self.tokenizer.all_special_ids  # as a rendered chat does
        asked = going_on(self.tokenizer, text, list(self.lead) if begins else [])
        if not asked:
            raise BadInput(f"the query {text!r} has no tokens in this vocabulary")
        target = (*self.tokens, *asked)
        self.refuse_too_long(text, len(target), more)
        return Sample(text, (*self.lead, *asked), target, len(self.lead), weight)

    def of_query(self, query: Query, more: int = 0) -> Sample:
        """The two runs of a query with its weight, its answer not yet behind it.

        A space stands before the answer unless one of the two texts brings white space of its own.
        """
        spelt = ()
        if query.answer is not None:
            joined = query.text[-1].isspace() or query.answer[0].isspace()
            spelt = tuple(self._behind(query.text, query.answer if joined else f" {query.answer}"))
            if not spelt:
                raise BadInput(f"the answer {query.answer!r} to {query.text!r} has no tokens in this vocabulary")
        sample = self.sample(query.text, query.weight, len(spelt) + 1 if spelt else more)
        return replace(sample, hard=query.hard, answer=query.answer, spelt=spelt)

    def _behind(self, text: str, more: str) -> list[int]:
        """The tokens of ``more`` behind a text, as the two are tokenised together where that keeps the text's own."""
        own, both = (going_on(self.tokenizer, part, []) for part in (text, text + more))
        return both[len(own) :] if both[: len(own)] == own else going_on(self.tokenizer, more, [])

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


def refuse_contradictions(samples: Sequence[Sample]) -> None:
    """Raise ``BadInput`` for two queries of the same tokens, whatever their texts, that are given different answers."""
    found: dict[Prefix, Query] = {}
    for sample in samples:
        query = Query(sample.text, answer=sample.answer)
        if sample.answer:
            refuse_contradiction(found.setdefault(sample.bare.source, query), query)


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
        if unknown := [token for token in (*sample.target, *sample.spelt) if not 0 <= token < known]:
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


def begin_alike(samples: Iterable[Sample]) -> bool:
    """Whether what stands before the queries is what the context begins with."""
    return all(sample.source[: sample.first] == sample.target[: sample.first] for sample in samples)


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
