"""Ordinary text, when nobody gives any: half of it the model's own writing, half what every Python installation explains about itself.

The package's own model gets worlds of facts alone: half of what it writes are questions, which a context is there to change.  A vocabulary
that knows neither gets the model's own writing alone.  Texts like those that the model will meet are better: ``second_moments``.
"""

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from controllability.compiling.unrelated_texts import SENTENCES, known_to, random_texts
from controllability.embedded.world import draw_worlds
from controllability.models.hooks.own_modes import own_modes
from controllability.models.moments import Moments, matrices
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.second_moments import ROWS, second_moments, shares_words
from controllability.models.sweep.target_run import Progress
from controllability.models.tokens import with_special

FEWEST, MOST = 5_120, 10_000  # tokens of either half
LENGTH = 80  # tokens of a text of the model's own


def ordinary_moments(
    model: nn.Module, tokenizer: Any, limit: int | None, progress: Progress, tokens: int = 0,
    save: str | Path | None = None, without: str = "", place: str | None = None,
) -> Moments:  # fmt: skip
    """The second moments of a model on ``tokens`` of ordinary text: by default in either half as many as the widest matrix reads
    numbers, from 5,120 to 10,000.  Pages with 8 words in a row of ``without``, a context, are left out.
    """
    if not tokens:
        layers = checked_reading(model, place=place).reading.layers
        widest = max((n for layer in layers for name in matrices(layer) for n in layer.params[name].shape), default=0)
        tokens = 2 * min(MOST, max(FEWEST, widest))
    return second_moments(
        model, _texts(model, tokenizer, limit, tokens, without, progress), tokenizer, progress, save, place=place
    )


def _texts(
    model: Any, tokenizer: Any, limit: int | None, tokens: int, without: str, progress: Progress
) -> Iterator[str | Tensor]:
    """Pages first, so that an interrupted call has them; then what the model writes."""
    length = min(LENGTH, limit or LENGTH)
    pages = [" ".join(part.split()) for page in topics.values() for part in page.split("\n\n") if len(part) > 300]
    worlds = [world.context for world in draw_worlds(seed=50_000, count=2_000, facts=(12, 16))]
    known = next((texts for texts in (pages, worlds) if known_to(tokenizer, texts[:20])), [])
    writes = length > 1 and known is not worlds and getattr(model, "can_generate", bool)()
    share, read, forbidden = tokens // 2 if writes else tokens, 0, shares_words(without)
    for text in (text for text in known if not forbidden(text)):
        if read >= share:
            break
        yield text
        read += len(with_special(tokenizer, text)[0])
    count = -(-(tokens - read) // length)
    if writes:
        yield from _written(model, tokenizer, count, length, progress).split(ROWS)
    elif not known:
        yield from torch.tensor(random_texts(tokenizer, count, length)).split(ROWS)


def _written(model: Any, tokenizer: Any, count: int, length: int, progress: Progress) -> Tensor:
    """(count, length) tokens as the model itself draws them, behind what its tokenizer puts before a text, or any token; always the same."""
    ids, first = with_special(tokenizer, SENTENCES[0])
    device = next(model.parameters()).device
    start = torch.tensor([ids[:first]] * count if first else random_texts(tokenizer, count, 1), device=device)
    more = max(1, length - start.shape[1])

    def told(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        progress("texts of its own", ids.shape[1] - start.shape[1], more)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with own_modes(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_beams=1,
            repetition_penalty=1.0, max_new_tokens=more, min_new_tokens=more, pad_token_id=0, stopping_criteria=[told],
        )  # fmt: skip
