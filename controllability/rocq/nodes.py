"""A step of a proof as a node of the theory: its lemma applied to its premises' nodes, its patch in closed form, its side conditions.

``tree`` writes the node; ``solve`` the same step's patch and conditions without it, from the states alone. The kernel
compares the two, so neither is trusted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from controllability.errors import BadInput
from controllability.interfaces import Component, Param, Place, Sequence
from controllability.rocq.formula import Value, Writer
from controllability.rocq.states import Level, fixed, state
from controllability.rules import Step

Nested = Any  # a Param, None, or a pair of such: how a node holds its parameters


class Tree(NamedTuple):
    """A node as a term, its parameters as the term pairs them, and the size of what it gives."""

    text: str
    params: Nested
    size: Any


class Solved(NamedTuple):
    """New values of parameters, and the proof that the side conditions hold, from hypotheses."""

    new: dict[Param, str]
    proof: str


class Wanted(NamedTuple):
    """The state now, the state of the target run (input and through), the output that is wanted (output and through)."""

    z: Value
    target: Value | None = None
    w: str = ""


@dataclass
class Run:
    """One certificate that is being written: names of parameters, definitions in order, hypotheses."""

    w: Writer
    names: dict[Param, str]
    definitions: list[tuple[str, str]] = field(default_factory=list)
    hypotheses: list[tuple[str, str]] = field(default_factory=list)
    unknowns: dict[Any, str] = field(default_factory=dict)

    def define(self, stem: str, text: str) -> str:
        """A name for a term; the term itself where it is a name already."""
        if " " not in text:
            return text
        known = next((name for name, body in self.definitions if body == text), None)
        if known is None:
            known = self.w.fresh(stem)
            self.definitions.append((known, text))
        return known

    def defined(self, stem: str, x: Value) -> Value:
        """The same of a value."""
        return Value(self.define(stem, x.text), x.size)

    def assume(self, statement: str) -> str:
        """The hypothesis that a side condition holds."""
        known = next((name for name, body in self.hypotheses if body == statement), None)
        if known is None:
            known = self.w.fresh("H")
            self.hypotheses.append((known, statement))
        return known

    def unknown(self, step: Step, what: str, kind: str) -> str:
        """A value that the certificate leaves open under a hypothesis: a pseudo-inverse, a common change, a scale, a root."""
        key = (id(step), what)
        if key not in self.unknowns:
            self.unknowns[key] = self.w.fresh(what)
        return self.w.free(self.unknowns[key], kind)

    def state(self, component: Component, x: Value, level: Level) -> Value:
        """A component on a state, with the parameters as they are."""
        return state(self.w, component, x, level, self.names)

    def fixed(self, component: Component, size: Any, level: Level) -> tuple[str, Any]:
        """A component that stays, as a function."""
        return fixed(self.w, component, size, level, self.names)


Writes = Callable[[Run, Step, Level, Any], Tree]
Solves = Callable[[Run, Step, Level, Wanted], Solved]
LEMMAS: dict[tuple[str, str], tuple[Writes, Solves]] = {}  # (rule, side) → how its node is written


def lemma(*rows: tuple[str, str]) -> Callable[[type], type]:
    """Says for which rows of the rule table a class writes nodes."""

    def register(cls: Any) -> Any:
        for row in rows:
            LEMMAS[row] = cls.tree, cls.solve
        return cls

    return register


def lemma_of(step: Step) -> tuple[Writes, Solves]:
    """How a step is written.  Raises ``BadInput`` for a rule that has no lemma."""
    rule = step.rule
    if (rule.name, rule.side) not in LEMMAS:
        raise BadInput(f"the rule {rule.name} ({rule.side} side) has no lemma in Coq: no certificate is written")
    return LEMMAS[rule.name, rule.side]


def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """The node of a step on states of a size."""
    return lemma_of(step)[0](run, step, level, size)


def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
    """The patch of a step, and the proof of its side conditions."""
    return lemma_of(step)[1](run, step, level, wanted)


def both(*proofs: str) -> str:
    """A conjunction's proof, to the right."""
    *rest, last = proofs
    for one in reversed(rest):
        last = f"(conj {one} {last})"
    return last


def pair(nested: Nested, names: Callable[[Param], str]) -> str:
    """Parameters as the node pairs them."""
    if nested is None:
        return "tt"
    if isinstance(nested, Param):
        return names(nested)
    return f"({', '.join(pair(one, names) for one in nested)})"


def rest_before(place: Place, part: Place) -> Component:
    """What of a sequence stands before ``part``, which is its end."""
    count = len(place.component.children()) - (len(part.component.children()) if _is_slice(place, part) else 1)
    return place.slice(0, count).component


def rest_after(place: Place, part: Place) -> Component:
    """What of a sequence stands behind ``part``, which is its beginning."""
    count = len(place.component.children())
    start = len(part.component.children()) if _is_slice(place, part) else 1
    return place.slice(start, count).component


def _is_slice(place: Place, part: Place) -> bool:
    return part.path == place.path and isinstance(part.component, Sequence)
