"""Texts that have nothing to do with a context: what changes there is drift."""

import random
import re
from collections.abc import Sequence
from typing import Any

from controllability.compiling.queries import Query
from controllability.compiling.token_sets import Sample, unrelated_sample
from controllability.embedded.world import draw_worlds
from controllability.models.tokens import with_special

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
