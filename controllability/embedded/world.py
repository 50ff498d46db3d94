"""The micro-world of the embedded model: facts and questions in a few dozen words.

Every world is drawn afresh, so an answer stands in the context and nowhere else: a model
that knows the language perfectly and has not seen the facts can only guess among the values.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mia Leo Ana Tom Eva Max Ida Sam Zoe Ben Lea Jan Amy Dan Fay "
    "Gus Joy Kai Liv Ned Ola Pia Ray Sue Tia Uma Vic Wes Yan Abe"
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how it is stated, two ways to ask for it, and the values it takes."""

    statement: str
    questions: tuple[str, ...]
    values: tuple[str, ...]


RELATIONS = {
    "city": Relation(
        "{name} lives in {value} .", ("Where does {name} live ?", "In which city does {name} stay ?"),
        _words("Oslo Rome Paris Lima Cairo Tokyo Delhi Quito Bern Riga Kyiv Dakar Seoul Porto"),
    ),
    "drink": Relation(
        "{name} orders some {value} .", ("What does {name} order ?", "Which drink does {name} want ?"),
        _words("tea coffee milk juice water cocoa cider lemonade"),
    ),
    "pet": Relation(
        "{name} has a {value} .", ("Which pet does {name} have ?", "What animal does {name} own ?"),
        _words("cat dog horse parrot rabbit turtle hamster snake goat duck"),
    ),
    "job": Relation(
        "{name} works as {value} .", ("As what does {name} work ?", "Which job does {name} do ?"),
        _words("baker nurse pilot teacher lawyer farmer painter sailor doctor cook"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about one fact, the answer, the relation and the name it is about."""

    text: str
    answer: str
    relation: str
    name: str


@dataclass(frozen=True)
class World:
    """Some facts: the text of the context and one question a fact."""

    context: str
    questions: tuple[Question, ...]


def draw_world(rng: random.Random, facts: int) -> World:
    """Draw a world of ``facts`` facts about as many names.

    >>> import random
    >>> world = draw_world(random.Random(0), 3)
    >>> len(world.questions), all(q.answer in world.context for q in world.questions)
    (3, True)
    """
    # few relations a world: the name in the question must decide, not the relation alone
    relations = rng.sample(list(RELATIONS), rng.randint(1, 2))
    statements, questions = [], []
    for name in rng.sample(NAMES, facts):
        key = rng.choice(relations)
        relation = RELATIONS[key]
        value = rng.choice(relation.values)
        statements.append(relation.statement.format(name=name, value=value))
        questions.append(Question(rng.choice(relation.questions).format(name=name), value, key, name))
    rng.shuffle(questions)  # in the order of the facts, "the next value" would be a good guess
    return World(" ".join(statements), tuple(questions))


def vocabulary() -> tuple[str, ...]:
    """Every word that a world can contain, in a fixed order."""
    texts: list[str] = list(NAMES)
    for relation in RELATIONS.values():
        texts += [relation.statement, *relation.questions, *relation.values]
    words = (word for text in texts for word in text.split() if not word.startswith("{"))
    return tuple(dict.fromkeys(words))


def draw_worlds(seed: int, count: int, facts: Sequence[int] = tuple(range(2, 9))) -> list[World]:
    """``count`` fresh worlds, their numbers of facts running through ``facts`` in turn."""
    rng = random.Random(seed)
    return [draw_world(rng, facts[i % len(facts)]) for i in range(count)]
