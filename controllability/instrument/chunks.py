"""A context in chunks: which characters and which tokens are each one's."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from controllability.errors import BadInput
from controllability.models.loading import encode
from controllability.models.tokens import going_on, with_special

Rule = str | Sequence[str] | Callable[[str], Sequence[str]]

ENDS = {  # where a chunk ends
    "sentence": re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[」』]*|\n+"),
    "line": re.compile(r"\n+"),
}


@dataclass(frozen=True)
class Chunk:
    """A part of the context: its ``text``, which is characters ``start`` to ``stop`` of it, and its ``tokens``, positions of the target run."""

    text: str
    start: int
    stop: int
    tokens: range


@dataclass(frozen=True)
class Reading:
    """A context and a query as tokens: what stands before any text, the chunks, and the query with the answer but its last token.

    ``ids`` are the context's, the ``lead`` among them; ``then`` the query's and the answer's, of which the first ``asked`` are the query's; ``answer`` is
    empty until it is known.
    """

    text: str
    query: str
    ids: tuple[int, ...]
    lead: int
    chunks: tuple[Chunk, ...]
    then: tuple[int, ...]
    asked: int
    answer: tuple[int, ...] = ()

    def context(self, kept: Sequence[int]) -> list[int]:
        """The tokens before the query, of a context of these chunks alone, in the order of the text."""
        return [*self.ids[: self.lead], *(self.ids[t] for chunk in sorted(kept) for t in self.chunks[chunk].tokens)]


def read(tokenizer: Any, context: str, query: str, chunks: Rule, answer: str | None, limit: int | None) -> Reading:
    """Tokenise as ``encode`` does, the answer behind the query.  Raises ``BadInput``."""
    for what, text in (("context", context), ("query", query)) + ((("answer", answer),) if answer is not None else ()):
        if not isinstance(text, str) or not text.strip():
            raise BadInput(
                f"the {what} is empty"
                if isinstance(text, str)
                else f"the {what} must be a text, got {type(text).__name__}"
            )
    if not callable(tokenizer):
        raise BadInput(f"the tokenizer must be one of transformers, got {type(tokenizer).__name__}")
    target, source = encode(tokenizer, context, query, "reset")
    asked = source["input_ids"][0].tolist()
    ids = target["input_ids"][0].tolist()[: -len(asked)]
    text = context[: len(context.rstrip(" "))]
    lead = with_special(tokenizer, text)[1]
    said = () if answer is None else tuple(_behind(tokenizer, query, answer))
    if answer is not None and not said:
        raise BadInput(f"the answer {answer!r} has no tokens in this vocabulary")
    found = _chunks(context, text, chunks, _ends(tokenizer, text, ids), lead)
    if limit is not None and len(ids) + len(asked) + len(said) > limit:
        raise BadInput(
            f"context, query and answer have {len(ids) + len(asked) + len(said)} tokens; the model has {limit} positions"
        )
    return Reading(context, query, tuple(ids), lead, found, (*asked, *said[:-1]), len(asked), said)


def _behind(tokenizer: Any, query: str, answer: str) -> list[int]:
    """The tokens of an answer behind a query; a space stands between them unless one of them has its own."""
    between = "" if query[-1].isspace() or answer[0].isspace() else " "
    own, both = (going_on(tokenizer, part, []) for part in (query, query + between + answer))
    return both[len(own) :] if both[: len(own)] == own else going_on(tokenizer, between + answer, [])


def _ends(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """(start, stop) in characters of each token; (0, 0) for those that the text does not have."""
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            "attribution needs a tokenizer that tells which characters a token is made of (a fast tokenizer of transformers)"
        )
    bare = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    count = len(bare["input_ids"])
    if ids[len(ids) - count :] != list(bare["input_ids"]):
        raise BadInput(
            "this tokenizer puts special tokens among those of the text: its tokens cannot be told apart by chunk"
        )
    return [(0, 0)] * (len(ids) - count) + [tuple(pair) for pair in bare["offset_mapping"]]


def _chunks(context: str, text: str, rule: Rule, spans: list[tuple[int, int]], lead: int) -> tuple[Chunk, ...]:
    own = range(lead, len(spans))
    if rule == "token":  # several tokens may share a character that they are the bytes of
        found = [Chunk(text[slice(*spans[t])], *spans[t], range(t, t + 1)) for t in own]
    else:
        stops = _stops(context, rule)
        of = [bisect_left(stops, max(spans[t][0] + len(text[slice(*spans[t])].rstrip()), spans[t][0] + 1)) for t in own]
        found = []
        for i, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
            tokens = [t for t, chunk in zip(own, of, strict=True) if chunk == i]
            if not tokens:
                raise BadInput(
                    f"chunk {i}, {context[start:stop]!r:.80}, has no token of its own: join it to its neighbour"
                )
            found.append(Chunk(context[start:stop], start, stop, range(tokens[0], tokens[-1] + 1)))
    if len(found) < 2:
        raise BadInput("the context is one chunk, which would have all of everything: give chunks, e.g. chunks='token'")
    return tuple(found)


def _stops(context: str, rule: Rule) -> list[int]:
    """The character behind each chunk; white space between two chunks belongs to the one before."""
    if isinstance(rule, str):
        if rule not in ENDS:
            raise BadInput(
                f"chunks: choose sentence, line or token, or give the texts themselves or a function, got {rule!r:.80}"
            )
        ends = [match.end() for match in ENDS[rule].finditer(context)]
    else:
        ends, at = [], 0
        parts = rule(context) if callable(rule) else rule
        if (
            not isinstance(parts, Sequence)
            or isinstance(parts, str)
            or not all(isinstance(part, str) for part in parts)
        ):
            raise BadInput(f"chunks: give a list of texts, got {parts!r:.80}")
        for i, part in enumerate(parts):
            if not part.strip():
                raise BadInput(f"chunk {i} is empty")
            start = context.find(part.strip(), at)
            if start < 0 or context[at:start].strip():
                raise BadInput(
                    f"chunk {i}, {part!r:.80}, does not follow the chunk before it: the chunks must make up the context in order"
                )
            at = start + len(part.strip())
            ends.append(at)
        if context[at:].strip():
            raise BadInput(f"the chunks do not make up the context: {context[at:].strip()!r:.80} is left over")
    reach = [end + len(context[end:]) - len(context[end:].lstrip()) for end in ends]
    first = len(context) - len(context.lstrip())
    return [*dict.fromkeys(stop for stop in reach if first < stop < len(context)), len(context)]
