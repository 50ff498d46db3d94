"""Compositions: what a step makes of its premises' nodes."""

from dataclasses import replace
from typing import Any

from controllability.interfaces import Product, Sum
from controllability.rocq.formula import Value, joined
from controllability.rocq.nodes import Run, Tree, lemma, reads_a_window, rest, tree
from controllability.rocq.sizes import UNIT
from controllability.rocq.states import Level, vector
from controllability.rules import Step


@lemma(("I-constant", "input"))
def constant(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """It does not see its input, and nothing moves."""
    found = run.state(step.place.component, Value("zero", size), level)
    return Tree(f"(I_constant {found.text})", None, found.size)


@lemma(("I-before", "input"), ("O-after-fixed", "output"), ("T-before", "through"))
def before(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """A fixed part before the premise."""
    part, premise = rest(step.place, step.premises[0].place, after=False), step.premises[0]
    if level.positions is not None and reads_a_window(premise.place.component):  # at every position
        inner = replace(level, positions=None)

        def write(z: Value) -> Value:
            one = run.state(part, Value(f"({z.text} k)", z.size), inner)
            return Value(f"(fun k : {run.w.sizes.mark(level.positions or UNIT)} => {one.text})", one.size)

        p, between = run.function(size, level, write)
        found = tree(run, premise, level, between)
    else:
        p, between = run.fixed(part, size, level)
        found = tree(run, premise, replace(level, positions=None), between)
    return found._replace(text=f"({step.rule.name.replace('-', '_')} {p} {found.text})")


@lemma(("I-after", "input"))
def after(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """A fixed part behind the premise."""
    found = tree(run, step.premises[0], level, size)
    q, out = run.fixed(rest(step.place, step.premises[0].place, after=True), found.size, level)
    return Tree(f"(I_after {q} {found.text})", found.params, out)


@lemma(("I-combine", "input"))
def combine(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """A sum or a product of premises."""
    component = step.place.component
    assert isinstance(component, Sum | Product)
    total, *others = (tree(run, premise, level, size) for premise in step.premises)
    for one in others:
        a, b = run.w.fresh("a"), run.w.fresh("b")
        both = joined(run.w, component, [Value(level.at(a), total.size), Value(level.at(b), one.size)])
        kinds = [level.kind(run.w, vector(run.w, s)) for s in (total.size, one.size)]
        q = f"(fun ({a} : {kinds[0]}) ({b} : {kinds[1]}) => {level.over(run.w, both.text)})"
        total = Tree(f"(I_combine {q} {total.text} {one.text})", (total.params, one.params), both.size)
    return total


@lemma(("I-by-output", "input"))
def by_output(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """Theorem 1b without a skip."""
    found = tree(run, step.premises[0], level, size)
    return found._replace(text=f"(I_by_output {found.text})")


@lemma(("T-split", "through"))
def split(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """f on the input side, then g on the output side at f's target value."""
    f = tree(run, step.premises[0], level, size)
    g = tree(run, step.premises[1], level, f.size)
    return Tree(f"(T_split {f.text} {g.text})", (f.params, g.params), g.size)
