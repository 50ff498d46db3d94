"""The embedded model, facts and questions to compile, and eight of them compiled once."""

from __future__ import annotations

import functools
import random

from controllability.compiling import compile_context
from controllability.embedded.world import RELATIONS, draw_world
from controllability.models.loading import load_model

load = functools.cache(lambda: load_model("embedded"))
exactly = functools.partial(compile_context, strength="exact")
PAIR = "Mia lives in Oslo . Leo lives in Rome ."
ASKED = ["Where does Mia live ?", "Where does Leo live ?"]
OTHERWISE = ["In which city does Mia stay ?", "In which city does Leo stay ?"]


def facts(seed, count):
    """(context, its questions, the same in other words)."""
    world = draw_world(random.Random(seed), count)
    asked = [q.text for q in world.questions]
    forms = [t.format(name=q.name) for q in world.questions for t in RELATIONS[q.relation].questions]
    return world.context, asked, [text for text in forms if text not in asked]


@functools.cache
def eight():
    context, asked, otherwise = facts(3, 8)
    return exactly(*load(), context, asked, otherwise)


class Plain:
    """The embedded tokenizer, putting nothing before a text."""

    def __init__(self):
        self.own = load()[1]

    def __call__(self, text, add_special_tokens=False):
        return self.own(text, add_special_tokens=False)

    def __getattr__(self, name):
        return getattr(self.own, name)

    def __len__(self):
        return len(self.own)
