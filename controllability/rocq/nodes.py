"""A step of a proof as a node of the theory: the lemma of its rule, applied to its premises' nodes.

What a node does is the theory's to say: ``reduction`` reads from there what the patch and the side conditions are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from controllability.components.convolution import Window
from controllability.errors import BadInput
from controllability.interfaces import Component, Param, Place, Sequence
from controllability.rocq.formula import NOW, Value, Writer, value
from controllability.rocq.states import Level, vector
from controllability.rules import Step

Nested = Any  # a Param, None, or a pair of such: how a node holds its parameters


class Tree(NamedTuple):
    """A node as a term, its parameters as the term pairs them, and the size of what it gives."""

    text: str
    params: Nested
    size: Any


@dataclass
class Run:
    """One certificate that is being written: names of parameters, and of what it leaves open."""

    w: Writer
    names: dict[Param, str]
    unknowns: dict[Any, str] = field(default_factory=dict)

    def unknown(self, step: Step, what: str, kind: str) -> str:
        """A value that the certificate leaves open under a hypothesis: a pseudo-inverse, a common change, a scale, a root."""
        key = (id(step), what)
        if key not in self.unknowns:
            self.unknowns[key] = self.w.fresh(what)
        return self.w.free(self.unknowns[key], kind)

    def state(self, component: Component, x: Value, level: Level) -> Value:
        """A component on a state, vector by vector, with the parameters as they are."""
        if type(component).__name__ == "Identity":
            return x
        found = value(self.w, component, Value(level.at(x.text), x.size), level.point(self.names))
        return Value(level.over(self.w, found.text), found.size)

    def function(self, size: Any, level: Level, write: Callable[[Value], Value]) -> tuple[str, Any]:
        """(fun z => …, the size of what it gives)."""
        name = self.w.fresh("z")
        found = write(Value(name, size))
        return (
            f"(fun {name} : {level.kind(self.w, vector(self.w, size))} => {found.text.replace(NOW, '(inr tt)')})",
            found.size,
        )

    def fixed(self, component: Component, size: Any, level: Level) -> tuple[str, Any]:
        """A component that stays, as a function of a state."""
        return self.function(size, level, lambda x: self.state(component, x, level))


Writes = Callable[[Run, Step, Level, Any], Tree]
OF_WINDOWS = ("theorem-1b", "O-after-fixed", "O-sum", "O-factor", "O-times", "O-through-bijection", "I-by-output")
LEMMAS: dict[tuple[str, str], Writes] = {}  # (rule, side) → how its node is written


def lemma(*rows: tuple[str, str]) -> Callable[[Writes], Writes]:
    """Says for which rows of the rule table a function writes nodes."""

    def register(write: Writes) -> Writes:
        LEMMAS.update(dict.fromkeys(rows, write))
        return write

    return register


def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """The node of a step on states of a size.  Raises ``BadInput`` for a rule that has no lemma."""
    row = step.rule.name, step.rule.side
    if row not in LEMMAS:
        raise BadInput(f"the rule {row[0]} ({row[1]} side) has no lemma in Coq: no certificate is written")
    if level.positions is not None:
        part = step.place.component
        if not reads_a_window(part):
            return _now(run, step, level, size)
        if row[0] not in OF_WINDOWS:
            raise BadInput(f"{row[0]} at {part.describe():.60}, with a window inside: it has no lemma in Coq")
    return LEMMAS[row](run, step, level, size)


def _now(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """What needs no window, at the last position."""
    found = tree(run, step, replace(level, positions=None), size)
    word = {"input": "I_before", "output": "O_after_fixed", "through": "T_before"}[step.rule.side]
    return found._replace(
        text=f"({word} {run.function(size, level, lambda z: Value(level.at(z.text), size))[0]} {found.text})"
    )


def reads_a_window(c: Component) -> bool:
    """Whether a part reads other positions."""
    return isinstance(c, Window) or any(map(reads_a_window, c.children()))


def pair(nested: Nested, names: Callable[[Param], str]) -> str:
    """Parameters as the node pairs them."""
    if nested is None:
        return "tt"
    return names(nested) if isinstance(nested, Param) else f"({', '.join(pair(one, names) for one in nested)})"


def rest(place: Place, part: Place, after: bool) -> Component:
    """What of a sequence stands before ``part``, its end, or ``after`` it, its beginning."""
    count = len(place.component.children())
    whole = part.path == place.path and isinstance(part.component, Sequence)
    own = len(part.component.children()) if whole else 1
    return (place.slice(own, count) if after else place.slice(0, count - own)).component
