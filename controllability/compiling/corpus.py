"""Ordinary text, when nobody gives any: what every Python installation explains about itself.

About 16,000 tokens of English prose for a usual vocabulary.  A vocabulary without those words gets worlds of the package's own
model, and one without these its own tokens in random order.  Texts like those that the model will meet are better: ``second_moments``.
"""

from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from controllability.compiling.unrelated_texts import known_to, random_texts
from controllability.embedded.world import draw_worlds
from controllability.models.moments import Moments
from controllability.models.second_moments import second_moments
from controllability.models.tokens import with_special

TOKENS, LENGTH, BATCH = 16_384, 96, 8


def ordinary_moments(
    model: nn.Module, tokenizer: Any, limit: int | None, progress: Callable[[str, int, int], None], tokens: int = TOKENS
) -> Moments:
    """The second moments of a model on ordinary text, in sequences of at most 96 tokens."""
    length = min(LENGTH, limit or LENGTH)
    stream: list[int] = []
    lead: list[int] = []
    for text in _texts(tokenizer, length):
        ids, first = with_special(tokenizer, text) if isinstance(text, str) else (list(text), 0)
        lead = ids[:first]
        stream += ids[first:]
        if len(stream) >= tokens:
            break
    step = length - len(lead)
    rows = [lead + stream[i : i + step] for i in range(0, len(stream) - step + 1, step)]
    batches = [torch.tensor(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    return second_moments(model, batches, progress=progress)


def _texts(tokenizer: Any, length: int) -> list[Any]:
    pages = (" ".join(part.split()) for page in topics.values() for part in page.split("\n\n"))
    worlds = [world.context for world in draw_worlds(seed=50_000, count=2_000, facts=(12, 16))]
    for texts in ([page for page in pages if len(page) > 3 * length], worlds):
        if known_to(tokenizer, texts[:20]):
            return texts
    return random_texts(tokenizer, TOKENS // length + 1, length)
