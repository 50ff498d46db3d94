"""What stands around a premise and is undone: other terms, other factors, bijections; and the theorems on sums."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from controllability.components.activation import SoftCap
from controllability.components.bias import Bias
from controllability.components.fixed import Gate
from controllability.components.residual import Identity
from controllability.components.scale import Scale
from controllability.components.times import Times
from controllability.errors import BadInput
from controllability.interfaces import Component, Place, Product, Sum
from controllability.rocq.formula import Value, gate, scale_of
from controllability.rocq.names import number, ratio
from controllability.rocq.nodes import Run, Solved, Tree, Wanted, both, lemma, solve, tree
from controllability.rocq.sizes import UNIT
from controllability.rocq.states import Level, function, vector
from controllability.rules import Step


def holds(run: Run, level: Level, *conditions: str) -> str:
    """The proof of conditions at each vector of a state: each a proof in brackets, or a statement to be assumed."""
    proofs = []
    for told in conditions:
        proved = told.startswith("(nonzero_ratio")
        each = level.joint and not proved and re.search(r"\bt\b", told)
        proof = told if proved else run.assume(f"forall t, {told}" if each else told)
        proofs.append(f"({proof} t)" if each else proof)
    found = both(*proofs)
    return f"(fun t => {found})" if level.joint else found


class Around(ABC):
    """One thing that is undone."""

    undo: str  # the theory's name for it, at one vector

    @abstractmethod
    def value(self, run: Run, x: Value, level: Level) -> str:
        """What it is undone with, at a state: a state."""

    def lemma(self, level: Level) -> str:
        return f"(each {self.undo})" if level.joint and not self.undo.startswith("sum_") else self.undo

    def function(self, run: Run, size: Any, level: Level) -> str:
        return function(run.w, size, level, lambda x: Value(self.value(run, x, level), None))[0]

    @abstractmethod
    def before(self, run: Run, s: str, goal: str, level: Level) -> tuple[str, str]:
        """(what must come before it so that ``goal`` comes out, the proof that it can be undone)."""


@dataclass(frozen=True)
class Other(Around):
    """Another term of a sum, another factor of a product; ``first`` where it stands before the premise."""

    component: Component
    kind: type
    first: bool
    size: Any = None  # of the premise's vectors, where one number is spread over them

    @property
    def undo(self) -> str:  # type: ignore[override]
        """sum_after, sum_before, factor, factor_before."""
        if self.kind is Sum:
            return "sum_after" if self.first else "sum_before"
        return "factor" if self.first else "factor_before"

    def value(self, run: Run, x: Value, level: Level) -> str:
        found = run.state(self.component, x, level)
        find = run.w.sizes.find
        one, wide = find(found.size) == UNIT, self.kind is Product and find(self.size) != UNIT
        if self.kind is Product and not one and not wide:
            raise BadInput(f"{self.component.describe():.60} is a factor of one number: it has no lemma in Coq")
        if one and wide:
            return level.over(run.w, f"(spread {level.at(found.text)} : {vector(run.w, self.size)})")
        return found.text

    def before(self, run: Run, s: str, goal: str, level: Level) -> tuple[str, str]:
        if self.kind is Sum:
            return f"(sub {goal} {s})", "I"
        text = level.over(run.w, f"(quotient {level.at(goal)} {level.at(s)})")
        return text, holds(run, level, f"nonzero {level.at(s)}")


@dataclass(frozen=True)
class Inverse(Around):
    """A bijection behind the premise, its parameters as they are."""

    q: Component
    size: Any

    @property
    def undo(self) -> str:  # type: ignore[override]
        """The theory's name."""
        if isinstance(self.q, SoftCap):
            return "(capped inverse_tanh)"
        for kind, name in ((Scale, "factor"), (Bias, "sum_before"), (Times | Gate, "multiple")):
            if isinstance(self.q, kind):
                return name
        raise BadInput(f"{self.q.describe()} has no lemma in Coq that undoes it: no certificate is written")

    def one(self, run: Run) -> str:
        q, w = self.q, run.w
        if isinstance(q, Scale):
            return scale_of(w, q, run.names[q.weight], self.size)
        if isinstance(q, Bias):
            w.param(q.bias, "vec", self.size)
            return run.names[q.bias]
        if isinstance(q, Gate):
            return gate(w, q, run.names[q.weight])
        assert isinstance(q, Times | SoftCap)
        return number(q.factor if isinstance(q, Times) else q.cap, q.describe())

    def value(self, run: Run, x: Value, level: Level) -> str:
        if isinstance(self.q, SoftCap):
            run.w.free("inverse_tanh", "R -> R")
        one = self.one(run)
        return f"(fun t : {level.axes(run.w)[0][1]} => {one})" if level.joint else one

    def before(self, run: Run, s: str, goal: str, level: Level) -> tuple[str, str]:
        q, one, at, w = self.q, self.one(run), level.at(goal), run.w
        if isinstance(q, Bias):
            return f"(sub {goal} {s})", "I"
        if isinstance(q, Scale):
            return level.over(w, f"(quotient {at} {one})"), holds(run, level, f"nonzero {one}")
        if isinstance(q, SoftCap):
            told = f"forall i, tanh (inverse_tanh ({at} i / {one})) = {at} i / {one}"
            text = f"(map (fun r => {one} * inverse_tanh (r / {one})) {at})"
            return level.over(w, text), holds(run, level, nonzero(q.cap, q), told)
        told = nonzero(q.factor, q) if isinstance(q, Times) else f"{one} <> 0"
        return level.over(w, f"(scale (/ {one}) {at})"), holds(run, level, told)


def nonzero(value: Any, q: Component) -> str:
    """The proof that a number is not zero."""
    above, below = ratio(value, q.describe())
    return f"(nonzero_ratio {above} {below})" if above > 0 else f"(nonzero_ratio_neg {-above} {below})"


def others(place: Place, carried: Place, size: Any = None) -> list[Around]:
    """The terms or factors around one, the innermost first: what stands before it as one, what stands behind one by one."""
    kind, parts = type(place.component), place.component.children()
    at = carried.outlet[len(place.path)] - place.start
    before = [Other(parts[0] if at == 1 else kind(parts[:at]), kind, True, size)] if at else []  # type: ignore[call-arg]
    return [*before, *(Other(part, kind, False, size) for part in parts[at + 1 :])]


def wrapped(run: Run, found: Tree, around: list[Around], size: Any, level: Level, word: str) -> Tree:
    """A node inside what is undone."""
    text = found.text
    for one in around:
        text = f"({word} {one.lemma(level)} {one.function(run, size, level)} {text})"
    return found._replace(text=text)


def unwrapped(run: Run, premise: Step, around: list[Around], level: Level, wanted: Wanted) -> Solved:
    """The premise's patch, for what is left of the wanted output."""
    goal, proofs = run.define("goal", wanted.w), list[str]()
    for one in reversed(around):
        s = run.define("s", one.value(run, wanted.z, level))
        before, proof = one.before(run, s, goal, level)
        goal = run.define("goal", before)
        proofs.append(proof)
    inner = solve(run, premise, level, wanted._replace(w=goal))
    return Solved(inner.new, both(*proofs, inner.proof))


def around_of(run: Run, step: Step, level: Level, size: Any) -> list[Around]:
    """What a step's premise stands in."""
    place, premise = step.place, step.premises[0].place
    if isinstance(place.component, Sum | Product):
        return others(place, premise, run.state(premise.component, Value("x", size), level).size)
    q = place.component.children()[-1]
    inner = run.state(premise.component, Value("x", size), level)
    return [] if isinstance(q, Identity) else [Inverse(q, inner.size)]


@lemma(
    ("O-sum", "output"), ("O-factor", "output"),
    *((name, side) for name in ("O-through-bijection", "O-times") for side in ("output", "through")),
)  # fmt: skip
class Undone:
    """The premise inside what is undone."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        word = "T_undo" if step.rule.side == "through" else "O_undo"
        return wrapped(
            run, tree(run, step.premises[0], level, size), around_of(run, step, level, size), size, level, word
        )

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        return unwrapped(run, step.premises[0], around_of(run, step, level, wanted.z.size), level, wanted)


@lemma(("theorem-1b", "input"), ("I-factor", "input"))
class Theorem1b:
    """The branch alone, on the output side."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        found = Undone.tree(run, step, level, size)
        return found._replace(text=re.sub(r"^\(O_undo ", "(theorem_1b ", found.text))

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        assert wanted.target is not None
        goal = run.define("goal", run.state(step.place.component, wanted.target, level).text)
        return Undone.solve(run, step, level, Wanted(wanted.z, None, goal))


@lemma(("theorem-1", "input"))
class Theorem1:
    """f on the input side, then g on the output side; or a branch with branches inside, through."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        around = others(step.place, step.premises[0].place)
        if len(step.premises) == 1:
            found = wrapped(run, tree(run, step.premises[0], level, size), around, size, level, "T_undo")
            return found._replace(text=re.sub(r"^\(T_undo ", "(theorem_1_through ", found.text))
        f = tree(run, step.premises[0], level, size)
        g = tree(run, step.premises[1], level, f.size)
        undo, s = around[0].lemma(level), around[0].function(run, size, level)[1:-1]
        if len(around) == 2:
            undo, s = f"(both {undo} {around[1].lemma(level)})", _two(run, around, size, level)
        if len(around) > 2:
            raise BadInput(f"theorem-1 at {step.place.describe():.60}: more than two other terms have no lemma in Coq")
        text = f"(theorem_1 {undo} (fun _ => {s}) {f.text} {g.text})"
        return Tree(text, (f.params, g.params), g.size)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        assert wanted.target is not None
        goal = run.define("goal", run.state(step.place.component, wanted.target, level).text)
        around = others(step.place, step.premises[0].place)
        if len(step.premises) == 1:
            return unwrapped(run, step.premises[0], around, level, wanted._replace(w=goal))
        one, two = step.premises
        f = solve(run, one, level, wanted)
        y = run.defined("y", run.state(one.place.component, wanted.target, level))
        undone: list[str] = []
        for other in reversed(around):
            before, proof = other.before(run, run.define("s", other.value(run, wanted.z, level)), goal, level)
            goal = run.define("goal", before)
            undone.append(proof)
        g = solve(run, two, level, Wanted(y, None, goal))
        return Solved(f.new | g.new, both(f.proof, both(*undone), g.proof))


def _two(run: Run, around: list[Around], size: Any, level: Level) -> str:
    def pair(x: Value) -> Value:
        return Value(f"({', '.join(one.value(run, x, level) for one in around)})", None)

    return function(run.w, size, level, pair)[0][1:-1]


@lemma(("T-sum", "through"))
class ThroughSum:
    """One term through; the others as in the target run where they are steered, else as they are."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        carrier, *beside = step.premises
        found = tree(run, carrier, level, size)
        for one in others(step.place, carrier.place):
            steered = _steered(step, one, beside)
            if steered is None:
                found = wrapped(run, found, [one], size, level, "T_undo")
            else:
                f = tree(run, steered, level, size)
                found = Tree(f"(T_sum {one.lemma(level)} {f.text} {found.text})", (f.params, found.params), found.size)
        return found

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        assert wanted.target is not None
        carrier, *beside = step.premises
        goal, new, proofs = run.define("goal", wanted.w), {}, list[str]()
        for one in reversed(others(step.place, carrier.place)):
            steered = _steered(step, one, beside)
            if steered is not None:
                solved = solve(run, steered, level, wanted)
                new |= solved.new
                proofs.append(solved.proof)
            s = one.value(run, wanted.z if steered is None else wanted.target, level)
            before, proof = one.before(run, run.define("s", s), goal, level)
            goal = run.define("goal", before)
            proofs.append(proof)
        inner = solve(run, carrier, level, wanted._replace(w=goal))
        return Solved(new | inner.new, both(*proofs, inner.proof))


def _steered(step: Step, one: Around, beside: list[Step]) -> Step | None:
    """The premise about a term; None where it stays.  Raises ``BadInput`` for several terms of which some are steered."""
    assert isinstance(one, Other)
    for premise in beside:
        if premise.place.component is one.component:
            return premise
    inner = one.component.children() if isinstance(one.component, Sum) else ()
    if any(premise.place.component is part for premise in beside for part in inner):
        raise BadInput(
            f"T-sum at {step.place.describe():.60}: a steered term among several before the carried one has no lemma"
        )
    return None
