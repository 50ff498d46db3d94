"""Texts that have nothing to do with a context: what changes there is drift."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from controllability.compiling.token_sets import Sample, unrelated_sample
from controllability.embedded.world import draw_worlds

COUNT, LENGTH = 12, 16

SENTENCES = (
    "The river was low that summer, and the ferry ran only twice a day.",
    "Water boils at a lower temperature in the mountains than at the sea.",
    "She put the kettle on, opened the window, and waited for the rain to stop.",
    "The committee will meet again on Thursday to discuss the budget.",
    "Most birds of this kind spend the winter in the south and return in April.",
    "To make the dough, mix the flour with salt, then add the warm milk slowly.",
    "The first edition of the book was printed in a small town on the coast.",
    "A triangle with two equal sides has two equal angles.",
    "He had forgotten his umbrella, so he ran from one doorway to the next.",
    "The museum is closed on Mondays; on other days it opens at ten.",
    "In the older part of the city the streets are narrow and the houses tall.",
    "Nobody could explain why the clock had stopped a few minutes before noon.",
)


def unrelated_samples(
    tokenizer: Any, texts: Sequence[str], context: str, queries: Sequence[str], limit: int | None
) -> list[Sample]:
    """The texts given; or sentences of ours, as far as the vocabulary knows them.

    A vocabulary without them gets worlds of the embedded model that state none of the context's facts and ask none of the
    queries, and one without those its own tokens in random order.
    """
    if texts:
        return [unrelated_sample(tokenizer, text, limit) for text in texts]
    for candidates in (list(SENTENCES), _worlds(context, queries)):
        samples = [unrelated_sample(tokenizer, text, limit) for text in candidates]
        if sum(map(len, (s.source for s in samples))) and _unknown(tokenizer, samples) < 0.1:
            return samples
    return _random_tokens(tokenizer, limit)


def _unknown(tokenizer: Any, samples: Sequence[Sample]) -> float:
    """Which part of the tokens the vocabulary does not know."""
    tokens = [token for sample in samples for token in sample.source]
    return sum(token == tokenizer.unk_token_id for token in tokens) / len(tokens)


def _worlds(context: str, queries: Sequence[str]) -> list[str]:
    found: list[str] = []
    for world in draw_worlds(seed=40_000, count=10 * COUNT, facts=(2, 3, 4)):
        facts = [f"{fact.strip()} ." for fact in world.context.split(" .") if fact.strip()]
        asked = world.questions[0].text
        if not any(fact in context for fact in facts) and asked not in queries:
            found.append(f"{world.context} {asked}")
    return found[:COUNT]


def _random_tokens(tokenizer: Any, limit: int | None) -> list[Sample]:
    rng, special = random.Random(0), set(tokenizer.all_special_ids)
    usable = [token for token in range(len(tokenizer)) if token not in special]
    length = min(LENGTH, limit or LENGTH)
    rows = [tuple(rng.choices(usable, k=length)) for _ in range(COUNT)]
    return [Sample(str(tokenizer.decode(row)), row, row, 0) for row in rows]
