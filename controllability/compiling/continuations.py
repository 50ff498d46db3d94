"""What a model says behind each query, greedily and on its own tokens; the contextual model's own answers belong to the set."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from controllability.compiling.token_sets import Prefix, Sample, Side, batches
from controllability.compiling.yardstick import run
from controllability.models.reading.token_text import text_after
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import Progress, silent


@torch.no_grad()
def continuations(
    model: Any, samples: Sequence[Sample], counts: Sequence[int], side: Side, ends: frozenset[int], limit: int | None = None,
    progress: Progress = silent, past: SharedPast | None = None,
) -> list[Prefix]:  # fmt: skip
    """Up to ``counts[i]`` tokens behind sample i in one of its runs, in batches; each stops before a token of ``ends``, and at the limit.

    With a ``past``, the target's context run already, no token is run twice.
    """
    if past is not None:
        return _cached(model, samples, counts, side, ends, limit, progress, past)
    found: list[Prefix] = []
    for batch in batches(samples, side):
        open_, start = [*range(len(batch))], len(found)
        while True:
            full = [len(getattr(sample, side)) > (limit or torch.inf) for sample in batch]
            said = [sample.answered - given.answered for sample, given in zip(batch, samples[start:], strict=False)]
            open_ = [i for i in open_ if said[i] < counts[start + i] and not full[i]]
            if not open_:
                break
            logits = run(model, [batch[i] for i in open_], side)
            tokens = {i: int(x[len(getattr(batch[i], side)) - 1].argmax()) for i, x in zip(open_, logits, strict=True)}
            open_ = [i for i in open_ if tokens[i] not in ends]
            for i in open_:
                batch[i] = batch[i].longer(tokens[i])
        found += [sample.source[len(sample.source) - n :] for sample, n in zip(batch, said, strict=True)]
        progress("answers", len(found), len(samples))
    return found


def _cached(
    model: Any, samples: Sequence[Sample], counts: Sequence[int], side: Side, ends: frozenset[int], limit: int | None,
    progress: Progress, past: SharedPast,
) -> list[Prefix]:  # fmt: skip
    behind = past if side == "target" else replace(past, cache=None, length=0)
    rows = [getattr(sample, side)[behind.length :] for sample in samples]
    room = [limit + 1 - len(getattr(sample, side)) if limit else n for n, sample in zip(counts, samples, strict=True)]
    most = [max(0, min(pair)) for pair in zip(counts, room, strict=True)]
    order = sorted((i for i, n in enumerate(most) if n), key=lambda i: len(rows[i]))
    found: dict[int, Prefix] = {}
    alike_ones = [order] if past.ragged else [list(group) for _, group in groupby(order, key=lambda i: len(rows[i]))]
    for alike in alike_ones:
        for own in behind.batches([len(rows[i]) + most[i] for i in alike]):
            kept = [alike[k] for k in own]
            said = behind.greedy(model, [rows[i] for i in kept], max(most[i] for i in kept), ends)
            found |= {i: tokens[: most[i]] for i, tokens in zip(kept, said, strict=True)}
            progress("answers", len(found), len(order))
    return [found.get(i, ()) for i in range(len(samples))]


def with_answers(
    model: Any, samples: Sequence[Sample], count: int, ends: frozenset[int], progress: Progress, tokenizer: Any = None,
    limit: int | None = None, past: SharedPast | None = None,
) -> list[Sample]:  # fmt: skip
    """Every sample with its answer behind it: up to ``count`` tokens of its target's greedy continuation, before a token of ``ends``.

    An answer that was given stands there in the tokens with which the contextual model says it, or else in its own; one token more is
    heard then, which tells "4" from "42".
    """
    counts = [len(sample.spelt) + 1 if sample.answer else count for sample in samples]
    if not any(counts):
        return list(samples)
    found = []
    for sample, said in zip(
        samples, continuations(model, samples, counts, "target", ends, limit, progress, past), strict=True
    ):
        answer = said
        if sample.answer is not None:
            parts = [said[: k + 1] for k in range(len(said)) if gives(tokenizer, sample, said)]
            answer = next((part for part in parts if gives(tokenizer, sample, part)), sample.spelt)
        found.append(replace(sample, said=said).longer(*answer))
    return found


def gives(tokenizer: Any, sample: Sample, tokens: Prefix) -> bool:
    """Whether tokens behind a query begin with the answer that was given for it."""
    return sample.answer is not None and given_in(heard(tokenizer, sample, tokens), sample.answer)


def heard(tokenizer: Any, sample: Sample, tokens: Prefix) -> str:
    """These tokens behind a query as text, with a space where one stands between words and none around it."""
    return text_after(tokenizer, sample.bare.source, tokens).strip() if tokens else ""


def given_in(said: str, answer: str) -> bool:
    """Whether what is said begins with the answer, and not in the middle of a word or a number.

    >>> given_in("Oslo .", "Oslo"), given_in("42", "4"), given_in("in Oslo", "Oslo")
    (True, False, False)
    """
    said, answer = (" ".join(text.split()) for text in (said, answer))
    more = said.removeprefix(answer)[:1]
    goes_on = all(sign.isdigit() or sign.lower() != sign.upper() for sign in (answer[-1:], more)) and more != ""
    return said.startswith(answer) and not goes_on


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, from the tokenizer and the model's generation config."""
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    held = [tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])]
    return frozenset(token for token in held if token is not None)
