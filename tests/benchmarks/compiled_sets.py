"""What the methods of ``compiled.py`` are given and judged on: one context of the micro-world, and its questions.

A method sees the queries: every question about the context, whole, after a first token and without the context.  It is
judged on

queries    the same questions;
wording    each fact asked for in the other wording;
order      each question after another one and its answer;
unrelated  other facts about other people, and a question: there the unpatched model is right, and change is drift.

``wording`` and ``order`` are held out: a position counts only where its text so far is not the beginning of a query.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from controllability.compiling.token_sets import Context, Sample, beginnings, refuse_known, unrelated_sample
from controllability.compiling.yardstick import Yardstick, agreement
from controllability.embedded.world import RELATIONS, Question, World, draw_world

HELD_OUT = ("wording", "order")
SETS = ("queries", *HELD_OUT, "unrelated")


@dataclass(frozen=True)
class Asked:
    """Texts with the logits wanted at their positions, and the token that answers each."""

    yardstick: Yardstick
    answers: list[int]

    def measure(self, model: Any) -> dict[str, float]:
        """``top1_agreement``, mean ``kl`` and ``max_logit_error`` over the positions that count; share of right answers."""
        found = self.yardstick.found(model)
        right = [int(rows[-1].argmax()) == answer for rows, answer in zip(found, self.answers, strict=True)]
        return {**agreement(found, self.yardstick.wanted).to_dict(), "accuracy": sum(right) / len(right)}


@dataclass(frozen=True)
class Task:
    """A context's queries, and all the sets of texts that a method is judged on, by name."""

    queries: list[Sample]
    sets: dict[str, Asked]

    @property
    def tokens(self) -> int:
        """How many different tokens the queries have, the first one included: two texts that begin alike share those."""
        return len(beginnings(self.queries))

    def measure(self, model: Any) -> dict[str, dict[str, float]]:
        """What comes out on each set."""
        return {name: asked.measure(model) for name, asked in self.sets.items()}


def draw_task(model: Any, tokenizer: Any, seed: int, facts: int = 8, unrelated: int = 8) -> Task:
    """A context of so many facts, and what the model says where it sees it (for ``unrelated``: the model as it is)."""
    rng = random.Random(seed)
    world = draw_world(rng, facts)
    context = Context.of(tokenizer, world.context)
    strangers = [_strangers(rng, world) for _ in range(unrelated)]
    samples = {
        "queries": [context.sample(q.text) for q in world.questions],
        "wording": [context.sample(_otherwise(q)) for q in world.questions],
        "order": [
            context.sample(f"{before.text} {before.answer} . {q.text}")
            for before, q in zip(world.questions[1:] + world.questions[:1], world.questions, strict=True)
        ],
        "unrelated": [unrelated_sample(tokenizer, f"{w.context} {w.questions[0].text}") for w in strangers],
    }
    known = beginnings(samples["queries"])
    answers = [q.answer for q in world.questions]
    sets = {}
    for name, texts in samples.items():
        words = [w.questions[0].answer for w in strangers] if name == "unrelated" else answers
        if name in HELD_OUT:
            refuse_known(texts, known)
        yardstick = Yardstick.of(model, texts, known if name in HELD_OUT else ())
        sets[name] = Asked(yardstick, [tokenizer.convert_tokens_to_ids(word) for word in words])
    return Task(samples["queries"], sets)


def _otherwise(question: Question) -> str:
    texts = [text.format(name=question.name) for text in RELATIONS[question.relation].questions]
    return next(text for text in texts if text != question.text)


def _strangers(rng: random.Random, world: World) -> World:
    """A world of four facts about people who do not occur in this one."""
    while True:
        other = draw_world(rng, 4)
        if not {q.name for q in world.questions} & {q.name for q in other.questions}:
            return other
