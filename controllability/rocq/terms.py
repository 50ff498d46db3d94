"""Terms of Coq, as far as the theory and its certificates write them: read from text, and from the theory's definitions and records."""

import re
from functools import cache
from typing import Any, NamedTuple

from controllability.rocq.names import without_comments

Term = Any  # a name, App, Ops, Pair, Abs or Let
TOKEN = re.compile(r"⟨\d+⟩|\w+'*|:=|=>|->|<>|/\\|<=|[(),:=<+*/-]")
OPERATORS = frozenset(["->", ":", "<>", "/\\", "<=", "=", "<", "+", "*", "/", "-"])
BINDERS = ("fun", "forall", "exists")


class App(NamedTuple):
    """A function and its arguments."""

    head: Term
    args: list[Term]


class Ops(NamedTuple):
    """Terms with signs between them, as they were written."""

    items: list[Term]


class Pair(NamedTuple):
    """(a, b)."""

    items: tuple[Term, Term]


class Abs(NamedTuple):
    """fun, forall or exists, with one name."""

    kind: str
    name: str
    type: str
    body: Term


class Let(NamedTuple):
    """let name := value in body."""

    name: str
    value: Term
    body: Term


def parse(text: str) -> Term:
    """A text as a term."""
    return _term(TOKEN.findall(text)[::-1])


def _term(t: list[str]) -> Term:
    items: list[Term] = [[]]
    while t and t[-1] not in (")", ",", "in"):
        token = t.pop()
        if token in OPERATORS:
            items += [token, []]
        elif token in BINDERS:
            items[-1].append(_abstraction(token, t))
        elif token == "let":
            items[-1].append(_let(t))
        elif token == "(":
            found = _term(t)
            while t.pop() == ",":
                found = Pair((found, _term(t)))
            items[-1].append(found)
        else:
            items[-1].append(token)
    terms = [one if isinstance(one, str) else one[0] if len(one) == 1 else App(one[0], one[1:]) for one in items if one]
    return terms[0] if len(terms) == 1 else Ops(terms)


def _variables(t: list[str], ends: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names and their types, up to one of ``ends``, which is taken."""
    found: list[tuple[str, str]] = []
    while (token := t.pop()) not in ends:
        if token == "(":
            found += _variables(t, (")",))
        elif token == ":":
            kind, depth = list[str](), 0
            while depth or t[-1] not in ends:
                depth += (t[-1] == "(") - (t[-1] == ")")
                kind.append(t.pop())
            text = re.sub(r"(?<=\() | (?=\))", "", " ".join(kind))
            found = [(name, text) for name, _ in found]
        else:
            found.append((token, ""))
    return found


def _abstraction(kind: str, t: list[str]) -> Term:
    names = _variables(t, ("=>", ","))
    body = _term(t)
    for name, type_ in reversed(names):
        body = Abs(kind, name, type_, body)
    return body


def _let(t: list[str]) -> Term:
    name, *given = _variables(t, (":=",))
    value = _term(t)
    t.pop()
    for one, type_ in reversed(given):
        value = Abs("fun", one, type_, value)
    return Let(name[0], value, _term(t))


@cache
def definition(name: str) -> Term | None:
    """What the theory defines by a name, as a function of the arguments that are given; None for what is no definition."""
    found = re.search(rf"^(?:Program )?Definition {name}\b(.*?):=(.*?)\.$", without_comments(), re.M | re.S)
    if found is None:
        return None
    given = _variables(["=>", *TOKEN.findall(re.sub(r"`?\{.*?\}", "", found[1]))[::-1]], (":", "=>"))
    term = parse(re.sub(r"\(([\w' ]+) : [^()]*\)", r"\1", found[2]))  # types are found again
    for one, _ in reversed(given):
        term = Abs("fun", one, "", term)
    return term


@cache
def fields() -> tuple[frozenset[str], dict[str, int]]:
    """(constructors of the theory's records, each field's place in its record)."""
    records = re.findall(r"^Record \w+ .*?:= (\w+) \{(.*?)\}\.$", without_comments(), re.M | re.S)
    places = {name: i for _, body in records for i, name in enumerate(re.findall(r"(?:^|;)\s*(\w+) :", body))}
    return frozenset(name for name, _ in records), places
