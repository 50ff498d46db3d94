"""What the methods of ``peers.py`` are given and judged on: a context's queries, and four sets of texts.

queries    each behind the first token alone, with up to four tokens of the contextual model's greedy continuation;
heldout    other wordings or new questions, likewise; positions whose text so far begins a query do not count;
near       texts that look like the queries and are about something else: the unpatched model is right there;
unrelated  any other text, likewise: what changes there is drift.

The first token (``<bos>``) is no position of any set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from controllability.compiling.answers import end_tokens
from controllability.compiling.token_sets import Context, Prefix, Sample, beginnings, padded, unrelated_sample

ROWS = 64  # that are multiplied with the output embeddings at once


def hidden_states(model: Any, samples: Sequence[Sample], side: str, known: Collection[Prefix] = ()) -> Tensor:
    """What the output embeddings read at the positions that count, (N, d)."""
    states = model.base_model(**padded(samples, side), use_cache=False).last_hidden_state
    return torch.cat([states[i, [j for j in s.rows(side, known) if j]] for i, s in enumerate(samples)])


def log_probabilities(model: Any, states: Tensor) -> Tensor:
    """Of the next token, (N, vocabulary).  For a model without a soft cap on its logits."""
    return model.get_output_embeddings()(states).log_softmax(-1)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted ‖ found) of log-probabilities, (N,)."""
    return (wanted.exp() * (wanted - found)).sum(-1)


@dataclass(frozen=True)
class Texts:
    """Texts with the log-probabilities that are wanted at their positions, (N, vocabulary)."""

    samples: Sequence[Sample]
    wanted: Tensor
    known: Collection[Prefix] = ()

    @staticmethod
    @torch.no_grad()
    def of(model: Any, samples: Sequence[Sample], known: Collection[Prefix] = ()) -> Texts:
        """What ``model`` says on the target side."""
        return Texts(samples, log_probabilities(model, hidden_states(model, samples, "target", known)), known)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Mean ``kl`` in nats, share of the ``same`` likeliest token, and how many ``positions``."""
        states, kl, same = hidden_states(model, self.samples, "source", self.known), [], []
        for part, wanted in zip(states.split(ROWS), self.wanted.split(ROWS), strict=True):
            found = log_probabilities(model, part)
            kl.append(divergence(wanted, found))
            same.append(found.argmax(-1) == wanted.argmax(-1))
        found = {"kl": torch.cat(kl).double().mean(), "same": torch.cat(same).double().mean()}
        return {name: float(value) for name, value in found.items()} | {"positions": len(states)}


def together(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The measures of two sets as one."""
    counts = one["positions"], other["positions"]
    means = {k: (one[k] * counts[0] + other[k] * counts[1]) / sum(counts) for k in ("kl", "same")}
    return means | {"positions": sum(counts)}


@dataclass(frozen=True)
class Task:
    """A context's queries with their answers, and the sets by name; ``rest`` is the other half of the unrelated texts."""

    name: str
    queries: Sequence[Sample]
    sets: Mapping[str, Texts]
    rest: Texts
    unpatched: Mapping[str, Mapping[str, float]]

    def measure(self, model: Any) -> dict[str, dict[str, float]]:
        """Of a model as it is now; the KL of queries and held-out ones over the unpatched model's as ``relative`` too."""
        found = {name: texts.measure(model) for name, texts in self.sets.items()}
        for name in ("queries", "heldout"):
            found[name]["relative"] = found[name]["kl"] / self.unpatched[name]["kl"]
        return found


def draw_task(
    model: Any, tokenizer: Any, name: str, given: Mapping[str, Any], elsewhere: Mapping[str, Texts], answer_tokens: int = 4
) -> Task:  # fmt: skip
    """``given`` has context, queries and heldout, as ``peer_texts.json`` has them; the context is followed by a line break."""
    context = Context.of(tokenizer, given["context"] + "\n")
    ends = end_tokens(model, tokenizer)

    def asked(which: str) -> list[Sample]:
        samples = [context.sample(row["query"]) for row in given[which]]
        return [sample.longer(*_continuation(model, sample, answer_tokens, ends)) for sample in samples]

    queries, heldout = asked("queries"), asked("heldout")
    own = {"queries": Texts.of(model, queries), "heldout": Texts.of(model, heldout, beginnings(queries))}
    sets = own | {"near": elsewhere["near"], "unrelated": elsewhere["unrelated"]}
    return Task(name, queries, sets, elsewhere["rest"], {k: texts.measure(model) for k, texts in own.items()})


def draw_elsewhere(model: Any, tokenizer: Any, near: Sequence[str], unrelated: Sequence[str]) -> dict[str, Texts]:
    """The sets that all contexts share: near, and the two halves of the unrelated texts."""
    parts = {"near": near, "unrelated": unrelated[::2], "rest": unrelated[1::2]}
    return {k: Texts.of(model, [unrelated_sample(tokenizer, text) for text in texts]) for k, texts in parts.items()}


def self_sampled(model: Any, first: int, count: int = 64, length: int = 96) -> list[list[int]]:
    """Rows of what the model writes by itself behind its first token: ordinary text, for moments and for preservation."""
    torch.manual_seed(0)
    ids = torch.full((count, 1), first)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": length, "min_new_tokens": length}
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how).tolist()


def _continuation(model: Any, sample: Sample, count: int, ends: Collection[int]) -> list[int]:
    ids = torch.tensor([sample.target])
    how = {"do_sample": False, "top_k": None, "top_p": None, "pad_token_id": 0, "max_new_tokens": count}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :].tolist()
    return said[: next((i for i, token in enumerate(said) if token in ends), len(said))]
