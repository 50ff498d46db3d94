"""What a derivation does at given states: its side conditions and its patch, in the open.

A node of the theory is a record of functions, so nothing is written here about any rule: the lemmas' definitions are put
in and applied to their arguments. The kernel does the same once more, so this need not be trusted.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from controllability.errors import BadInput
from controllability.rocq.formula import Writer
from controllability.rocq.terms import Abs, App, Let, Ops, Pair, Term, definition, fields, parse

Value = Any  # a name, App of a name, Ops, Pair, Let, or Function
WORD = re.compile(r"\w+'*")
# what is given to one of these variables is named in the certificate
NAMED = {"w": "goal", "G": "goal"} | {name: name for name in ("x", "y", "z", "s", "m", "u", "delta", "new", "chosen")}
# a fraction that is not 0, above 0, or at least 0
FACT = re.compile(r"\((?:0 (<=?) )?\(\(?(-?) ?(\d+)\)? / (\d+)\)(?: <> 0)?\)")


class Function(NamedTuple):
    """fun, forall or exists, its body as a function of the value."""

    kind: str
    name: str
    type: str
    body: Callable[[Value], Value]


class Reduction:
    """Definitions and hypotheses of one certificate, as they are found."""

    def __init__(self, w: Writer) -> None:
        self.w = w
        self.definitions: dict[str, str] = {}  # a term → its name
        self.hypotheses: dict[str, str] = {}
        self.bound: list[str] = []  # variables around the term that is being written

    def at(self, text: str) -> Value:
        """The value of a text."""
        return self._value(parse(text), {})

    def _value(self, term: Term, env: Mapping[str, Value]) -> Value:
        match term:
            case str():
                return env.get(term, term)
            case App(head, args):
                found = self._value(head, env)
                for one in args:
                    found = self._applied(found, self._value(one, env))
                return found
            case Abs(kind, name, type_, body):
                return Function(kind, name, type_, lambda given: self._value(body, {**env, name: given}))
            case Let(name, value, body):
                return self._let(name, self._value(value, env), lambda given: self._value(body, {**env, name: given}))
            case Ops(items):
                return Ops([self._value(one, env) for one in items])
        return Pair(tuple(self._value(one, env) for one in term.items))

    def _let(self, name: str, value: Value, body: Callable[[Value], Value]) -> Value:
        value = self._named(name, value)
        if not isinstance(value, App | Ops | Let) or _head(value) in fields()[0]:
            return body(value)
        return self._under(name, lambda one: Let(one, value, body(one)))

    def _under(self, name: str, write: Callable[[str], Any]) -> Any:
        """What is written below a new variable."""
        one = name if name not in self.bound else self.w.fresh(name)
        return self._within(one, lambda: write(one))

    def _within(self, name: str, write: Callable[[], Any]) -> Any:
        """What is written below a variable."""
        self.bound.append(name)
        try:
            return write()
        finally:
            self.bound.pop()

    def _applied(self, f: Value, given: Value) -> Value:
        if isinstance(f, Function):
            return f.body(self._named(f.name, given))
        if isinstance(f, Let):
            return f._replace(body=self._within(f.name, lambda: self._applied(f.body, given)))
        place = {"fst": 0, "snd": 1}.get(f) if isinstance(f, str) else None
        if place is not None and isinstance(given, Pair):
            return given.items[place]
        if isinstance(f, str) and f in fields()[1]:
            record = self._record(given)
            if record is not None:
                return record.args[fields()[1][f]]
        return App(f.head, [*f.args, given]) if isinstance(f, App) else App(f, [given])

    def _record(self, value: Value) -> App | None:
        """A node as the record that it is."""
        while _head(value) not in fields()[0]:
            head = _head(value)
            term = definition(head) if head else None
            if term is None:
                return None
            value, args = self._value(term, {}), value.args if isinstance(value, App) else []
            for one in args:  # a lemma's own arguments are no states: they get no names
                value = value.body(one) if isinstance(value, Function) else self._applied(value, one)
        return value

    def _named(self, variable: str, value: Value) -> Value:
        """A state by its name in the certificate, where it depends on nothing but what has a name there."""
        stem = NAMED.get(variable.rstrip("0123456789"))
        if stem is None or isinstance(value, str | Pair) or _head(value) in fields()[0]:
            return value
        text = self.text(value)
        constant = re.fullmatch(r"\(fun (\w+) (?:: .*? )?=> (.*)\)", text)
        if set(WORD.findall(text)) & set(self.bound) or (constant and constant[1] not in WORD.findall(constant[2])):
            return value
        return self.define(stem, text)

    def define(self, stem: str, text: str) -> str:
        """The name of a term in the certificate."""
        if " " not in text:
            return text
        if text not in self.definitions:
            self.definitions[text] = self.w.fresh(stem)
        return self.definitions[text]

    def text(self, value: Value) -> str:
        """A value as Coq reads it."""
        match value:
            case str():
                return value
            case App(head, args):
                written = f"({' '.join(self.text(one) for one in (head, *args))})"
                return self.definitions.get(written, written)
            case Ops(items):
                return f"({' '.join(self.text(one) for one in items)})"
            case Pair(items):
                return f"({', '.join(self.text(one) for one in items)})"
            case Let(name, given, body):
                return f"(let {name} := {self.text(given)} in {self._within(name, lambda: self.text(body))})"
        return self._under(value.name, lambda one: self._abstraction(value, one))

    def _abstraction(self, value: Function, name: str) -> str:
        typed = f"{name} : {value.type}" if value.type else name
        return f"({value.kind} {typed}{' =>' if value.kind == 'fun' else ','} {self.text(value.body(name))})"

    def proof(self, condition: Value, given: tuple[str, ...] = ()) -> str:
        """The proof of a side condition: of each part a fact of numbers, or a hypothesis, for all variables ``given``."""
        parts = _conjuncts(condition)
        if len(parts) > 1:
            *rest, last = (self.proof(one, given) for one in parts)
            for one in reversed(rest):
                last = f"(conj {one} {last})"
            return last
        if isinstance(condition, Function) and condition.kind == "forall":
            return self._under(
                condition.name, lambda one: _for_all(one, self.proof(condition.body(one), (*given, one)))
            )
        text = self.text(condition)
        if text == "True" or (fact := _fact(text)):
            return "I" if text == "True" else fact
        used = " ".join(one for one in given if one in WORD.findall(text))
        statement = f"forall {used}, {text}" if used else re.sub(r"^\((.*)\)$", r"\1", text)
        if statement not in self.hypotheses:
            self.hypotheses[statement] = self.w.fresh("H")
        return f"({self.hypotheses[statement]} {used})" if used else self.hypotheses[statement]


def _for_all(variable: str, proof: str) -> str:
    """fun variable => proof, or what it is short for."""
    short = re.fullmatch(rf"\(([\w ]+) {variable}\)", proof)
    if short:
        return f"({short[1]})" if " " in short[1] else short[1]
    return f"(fun {variable} => {proof})"


def _fact(text: str) -> str:
    """The proof of a fact of numbers; '' where it is none.  Raises ``BadInput`` for what is false."""
    found = FACT.fullmatch(text)
    if not found or (found[1] is None) != text.endswith(" <> 0)"):
        return ""
    sign, relation = (0 if found[3] == "0" else -1 if found[2] else 1), found[1] or "<>"
    if sign == 0 and relation == "<=":
        return ""
    if sign < 0 and relation == "<>":
        return f"(nonzero_ratio_neg {found[3]} {found[4]})"
    if sign <= 0:
        raise BadInput(f"the side condition {text} never holds: no certificate is written")
    above = f"(positive_ratio {found[3]} {found[4]})"
    return {"<": above, "<=": f"(Rlt_le _ _ {above})", "<>": f"(nonzero_ratio {found[3]} {found[4]})"}[relation]


def _head(value: Value) -> str:
    found = value.head if isinstance(value, App) else value
    return found if isinstance(found, str) else ""


def _conjuncts(value: Value) -> list[Value]:
    if not isinstance(value, Ops) or "/\\" not in value.items or "->" in value.items:
        return [value]
    found: list[list[Value]] = [[]]
    for one in value.items:
        if one == "/\\":
            found.append([])
        else:
            found[-1].append(one)
    return [one[0] if len(one) == 1 else Ops(one) for one in found]
