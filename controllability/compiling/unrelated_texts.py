"""Texts that nobody gave: unrelated ones, on which what changes is drift; ordinary ones, for moments; further questions of the model's own."""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from controllability.compiling.queries import Query
from controllability.compiling.token_sets import Context, Sample, unrelated_sample
from controllability.embedded.world import draw_worlds
from controllability.errors import BadInput
from controllability.models.hooks.own_modes import own_modes
from controllability.models.moments import Moments, matrices
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.model_facts import position_limit, text_config
from controllability.models.reading.token_text import text_after
from controllability.models.second_moments import ROWS, second_moments, shares_words
from controllability.models.sweep.target_run import Progress
from controllability.models.tokens import going_on, with_special

COUNT, LENGTH = 12, 16
_NAMED = r"(?<=[^\s.?!:] )[A-Z][a-z]+|\d+"
NAMES = ("Harwick", "Bellamy", "Corvin", "Aldous", "Tamsin", "Merrow", "Wexford", "Ysolde")

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
        if known_to(tokenizer, candidates):
            return samples
    rows = random_texts(tokenizer, COUNT, min(LENGTH, limit or LENGTH))
    return [Sample(str(tokenizer.decode(row)), row, row, 0) for row in rows]


def near_samples(tokenizer: Any, texts: Sequence[str], queries: Sequence[Query], limit: int | None) -> list[Sample]:
    """The texts given, which look like the queries and are about something else; or the queries with other names and numbers.

    None where no query has a name, or the vocabulary does not know ours.
    """
    if not texts:
        swapped = dict.fromkeys(other_names(query.text) for query in queries)
        texts = [text for text in swapped if text not in {query.text for query in queries}]
        texts = texts if known_to(tokenizer, texts) else []
    return [unrelated_sample(tokenizer, text, limit) for text in texts]


def other_names(text: str, exchange: bool = False) -> str:
    """A text with another name for every name in it (a capital behind another word), and another number for every number.

    ``exchange`` gives each name the next one of the same text, and leaves numbers.

    >>> other_names("The director of Marlow Station was born in 1974.")
    'The director of Harwick Bellamy was born in 2085.'
    >>> other_names("Mia lives in Oslo . Leo lives in Rome .", exchange=True)
    'Mia lives in Rome . Leo lives in Oslo .'
    """
    own = [word for word in dict.fromkeys(re.findall(_NAMED, text)) if not word[0].isdigit()]
    names = [*own[1:], *own[:1]] if exchange else [NAMES[i % len(NAMES)] for i in range(len(own))]
    given = dict(zip(own, names, strict=True))

    def other(found: re.Match[str]) -> str:
        word = found[0]
        if word[0].isdigit():
            return word if exchange else "".join(str((int(digit) + 1) % 10) for digit in word)
        return given[word]

    return re.sub(_NAMED, other, text)


def known_to(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether a vocabulary knows at least nine of ten tokens of these texts."""
    tokens = [token for text in texts for token in with_special(tokenizer, text)[0]]
    return bool(tokens) and sum(token == tokenizer.unk_token_id for token in tokens) < 0.1 * len(tokens)


def _worlds(context: str, queries: Sequence[str]) -> list[str]:
    found: list[str] = []
    for world in draw_worlds(seed=40_000, count=10 * COUNT, facts=(2, 3, 4)):
        facts = [f"{fact.strip()} ." for fact in world.context.split(" .") if fact.strip()]
        asked = world.questions[0].text
        if not any(fact in context for fact in facts) and asked not in queries:
            found.append(f"{world.context} {asked}")
    return found[:COUNT]


def random_texts(tokenizer: Any, count: int, length: int) -> list[tuple[int, ...]]:
    """Tokens of a vocabulary in random order, for one without words."""
    rng, special = random.Random(0), set(tokenizer.all_special_ids)
    usable = [token for token in range(len(tokenizer)) if token not in special]
    return [tuple(rng.choices(usable, k=length)) for _ in range(count)]


FEWEST, MOST = 5_120, 10_000  # tokens of either half
OWN_LENGTH = 80  # tokens of a text of the model's own


def ordinary_moments(
    model: nn.Module, tokenizer: Any, limit: int | None, progress: Progress, tokens: int = 0,
    save: str | Path | None = None, without: str = "", place: str | None = None,
) -> Moments:  # fmt: skip
    """The second moments of a model on ``tokens`` of ordinary text: by default in either half as many as the widest matrix reads
    numbers, from 5,120 to 10,000.  Pages with 8 words in a row of ``without``, a context, are left out.

    Half of it is the model's own writing, half what every Python installation explains about itself.  The package's own model gets worlds of
    facts alone: half of what it writes are questions, which a context is there to change.  A vocabulary that knows neither gets the
    model's own writing alone.  Texts like those that the model will meet are better: ``second_moments``.
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
    length = min(OWN_LENGTH, limit or OWN_LENGTH)
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


PROMPT, ROOM, TRIES = "\nQuestion:", 24, 4


def further_questions(
    model: Any, tokenizer: Any, context: str, count: int, known: Sequence[str] = (), seed: int = 0
) -> list[str]:  # fmt: skip
    """Up to ``count`` different questions that the model writes behind the context and "Question:", drawn with ``seed``.

    Four times as many are drawn (top-p 0.9) and cut at the question mark; what repeats another, one of ``known`` or the context, or is no question,
    is left out: there may be fewer.  Look at them: nobody else has.  Raises ``BadInput``.  Source: new.

    >>> from controllability.models.loading import load_model
    >>> found = further_questions(*load_model("embedded"), "Mia lives in Oslo . Leo lives in Rome .", 2, ["Where does Mia live ?"])
    >>> len(found), all(question.endswith("?") for question in found), "Where does Mia live ?" in found
    (2, True, False)
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadInput(f"the number of further questions must be a whole number from 1 on, got {count!r}")
    if not hasattr(model, "generate"):
        raise BadInput(f"a {type(model).__name__} does not generate: write further questions yourself")
    before = Context.of(tokenizer, context, position_limit(text_config(model)))
    ids = [*before.tokens, *(going_on(tokenizer, PROMPT, []) if known_to(tokenizer, [PROMPT]) else [])]
    before.refuse_too_long(PROMPT, len(ids), ROOM)
    start = torch.tensor([ids], device=next(model.parameters()).device)
    with own_modes(model), torch.random.fork_rng([start.device] if start.is_cuda else []), torch.no_grad():
        torch.manual_seed(seed)
        drawn = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_p=0.9, top_k=0, temperature=1.0, max_new_tokens=ROOM,
            num_return_sequences=TRIES * count, pad_token_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip
    found: dict[str, str] = {}
    seen = {" ".join(text.split()).casefold() for text in known}
    for row in drawn.tolist():
        said, mark, _ = text_after(tokenizer, ids, row[len(ids) :]).partition("?")
        text = re.split(r"(?<=[.!])\s+|\n", f"{said}{mark}".strip())[-1].removeprefix(PROMPT.strip()).strip()
        key = " ".join(text.split()).casefold()
        if mark and len(text.split()) > 2 and key not in seen and key not in context.casefold():
            found.setdefault(key, text)
    return [*found.values()][:count]
