"""Compositions: what a step makes of its premises' nodes."""

from controllability.interfaces import Product, Sum
from controllability.rocq.formula import Value, joined
from controllability.rocq.nodes import Run, Solved, Tree, Wanted, both, lemma, rest_after, rest_before, solve, tree
from controllability.rocq.states import Level, vector
from controllability.rules import Step


@lemma(("I-constant", "input"))
class Constant:
    """It does not see its input, and nothing moves."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        found = run.state(step.place.component, Value("zero", size), level)
        return Tree(f"(I_constant {found.text})", None, found.size)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        return Solved({}, "I")


@lemma(("I-before", "input"), ("O-after-fixed", "output"), ("T-before", "through"))
class Before:
    """A fixed part before the premise."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        (premise,) = step.premises
        p, between = run.fixed(rest_before(step.place, premise.place), size, level)
        found = tree(run, premise, level, between)
        return found._replace(text=f"({step.rule.name.replace('-', '_')} {p} {found.text})")

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        (premise,) = step.premises
        p = rest_before(step.place, premise.place)
        z = run.defined("y", run.state(p, wanted.z, level))
        target = None if wanted.target is None else run.defined("y", run.state(p, wanted.target, level))
        return solve(run, premise, level, Wanted(z, target, wanted.w))


@lemma(("I-after", "input"))
class After:
    """A fixed part behind the premise."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        (premise,) = step.premises
        found = tree(run, premise, level, size)
        q, out = run.fixed(rest_after(step.place, premise.place), found.size, level)
        return Tree(f"(I_after {q} {found.text})", found.params, out)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        return solve(run, step.premises[0], level, wanted)


@lemma(("I-combine", "input"))
class Combine:
    """A sum or a product of premises."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        component = step.place.component
        assert isinstance(component, Sum | Product)
        total, *rest = (tree(run, premise, level, size) for premise in step.premises)
        for one in rest:
            a, b = run.w.fresh("a"), run.w.fresh("b")
            both_ = joined(run.w, component, [Value(level.at(a), total.size), Value(level.at(b), one.size)])
            kinds = [level.kind(run.w, vector(run.w, s)) for s in (total.size, one.size)]
            q = f"(fun ({a} : {kinds[0]}) ({b} : {kinds[1]}) => {level.over(run.w, both_.text)})"
            total = Tree(f"(I_combine {q} {total.text} {one.text})", (total.params, one.params), both_.size)
        return total

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        solved = [solve(run, premise, level, wanted) for premise in step.premises]
        proof = solved[0].proof
        for one in solved[1:]:
            proof = f"(conj {proof} {one.proof})"
        return Solved({p: text for one in solved for p, text in one.new.items()}, proof)


@lemma(("I-by-output", "input"))
class ByOutput:
    """Theorem 1b without a skip."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        found = tree(run, step.premises[0], level, size)
        return found._replace(text=f"(I_by_output {found.text})")

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        assert wanted.target is not None
        goal = run.define("goal", run.state(step.place.component, wanted.target, level).text)
        return solve(run, step.premises[0], level, Wanted(wanted.z, None, goal))


@lemma(("T-split", "through"))
class Split:
    """f on the input side, then g on the output side at f's target value."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        f = tree(run, step.premises[0], level, size)
        g = tree(run, step.premises[1], level, f.size)
        return Tree(f"(T_split {f.text} {g.text})", (f.params, g.params), g.size)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        assert wanted.target is not None
        one, two = step.premises
        f = solve(run, one, level, wanted)
        y = run.defined("y", run.state(one.place.component, wanted.target, level))
        g = solve(run, two, level, Wanted(y, None, wanted.w))
        return Solved(f.new | g.new, both(f.proof, g.proof))
