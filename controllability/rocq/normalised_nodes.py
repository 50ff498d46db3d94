"""The normalised output: a new scale and a new input of the normalisation, by a route."""

from typing import Any

from controllability.components.scale import Scale
from controllability.errors import BadInput
from controllability.rocq.formula import Value, eps_of, scale_of
from controllability.rocq.leaf_nodes import offset_of
from controllability.rocq.names import ratio
from controllability.rocq.nodes import Run, Solved, Tree, Wanted, both, lemma, solve, tree
from controllability.rocq.states import Level, vector
from controllability.rocq.undone_nodes import Inverse, holds
from controllability.rules import Step

SINGLE = {"auto": "balanced", "balanced": "balanced", "uniform": "uniform", "secular": "secular"}


def parts(step: Step) -> tuple[Scale | None, str]:
    """(the scale behind the normalisation, ε as a fraction)."""
    children = step.place.component.children()
    scale = children[-1] if isinstance(children[-1], Scale) else None
    return scale, eps_of(children[-1 if scale is None else -2])


def route(run: Run, step: Step, level: Level, size: Any) -> str:
    """The route of the theory that a step takes."""
    eps = parts(step)[1]
    if step.rule.name == "O-centred":
        return f"(centred_balanced {eps})"
    if level.joint:
        return f"(keep {eps} {run.unknown(step, 'new_scale', vector(run.w, size))})"
    if step.route == "secular":
        return f"(secular {eps} {run.unknown(step, 'mu', 'R')})"
    return f"({SINGLE[step.route]} {eps})"


@lemma(
    ("O-normalised", "output"), ("O-normalised", "through"), ("O-centred", "output"),
    ("O-normalised jointly", "output"), ("O-normalised jointly", "through"),
)  # fmt: skip
class Normalised:
    """m∘n(premise)."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        found = tree(run, step.premises[0], level, size)
        scale, eps = parts(step)
        letter = "T" if step.rule.side == "through" else "O"
        if step.route != "ball":
            assert scale is not None
            scale_of(run.w, scale, "", found.size)
            storage = offset_of(scale) or "plain"
            text = f"({letter}_normalised {storage} {route(run, step, level, found.size)} {found.text})"
            return Tree(text, (found.params, scale.weight), found.size)
        text = f"({letter}_undo (ball {eps}) (fun _ => tt) {found.text})"
        if scale is not None:
            text = f"({letter}_undo factor {Inverse(scale, found.size).function(run, size, level)} {text})"
        return found._replace(text=text)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        premise, goal = step.premises[0], run.define("goal", wanted.w)
        scale, _eps = parts(step)
        through = step.rule.side == "through"
        at = wanted.target if through else wanted.z
        assert at is not None
        y = run.defined("y", run.state(premise.place.component, at, level))
        if step.route == "ball":
            return _ball(run, step, level, wanted._replace(w=goal), y)
        assert scale is not None
        m = run.define("m", scale_of(run.w, scale, run.names[scale.weight], y.size))
        proof, new, before = _routed(run, step, level, (m, y.text, goal), y.size)
        inner = solve(run, premise, level, wanted._replace(w=run.define("goal", before)))
        stored = f"(store {offset_of(scale)} {new})" if scale.offset else new
        return Solved(inner.new | {scale.weight: stored}, f"(conj {proof} {inner.proof})")


def _ball(run: Run, step: Step, level: Level, wanted: Wanted, y: Value) -> Solved:
    scale, eps = parts(step)
    goal, proofs = wanted.w, []
    if scale is not None:
        inverse = Inverse(scale, y.size)
        goal, proof = inverse.before(run, inverse.value(run, wanted.z, level), goal, level)
        goal = run.define("goal", goal)
        proofs.append(proof)
    if eps.startswith("(0 "):
        raise BadInput(f"{step.place.describe():.60}: without ε the image of the normalisation is a sphere, no ball")
    proofs.append(both(positive(step), holds(run, level, f"mean_square {goal} < 1")))
    before = run.define("goal", f"(scale (sqrt ({eps} / (1 - mean_square {goal}))) {goal})")
    inner = solve(run, step.premises[0], level, wanted._replace(w=before))
    return Solved(inner.new, both(*proofs, inner.proof))


def positive(step: Step) -> str:
    """The proof of 0 < ε."""
    above, below = ratio(step.place.component.children()[-1 if parts(step)[0] is None else -2].norm_epsilon, "ε")
    return f"(positive_ratio {above} {below})"


def _at_least_zero(run: Run, step: Step) -> str:
    eps = parts(step)[1]
    return run.assume(f"0 <= {eps}") if eps.startswith("(0 ") else f"(Rlt_le _ _ {positive(step)})"


def _routed(run: Run, step: Step, level: Level, given: tuple[str, str, str], size: Any) -> tuple[str, str, str]:
    """(the proof that the route is open, m', y*)."""
    m, y, goal = given
    eps = parts(step)[1]
    if level.joint:
        s = run.unknown(step, "new_scale", "")
        told = run.assume(f"forall t, serves {eps} {s} ({y} t) ({goal} t)")
        return told, s, level.over(run.w, f"(target {eps} {s} ({y} t) ({goal} t))")
    zero = _at_least_zero(run, step)
    if step.rule.name == "O-centred":
        x = run.define("x", f"(quotient {goal} (balanced_scale {m} {goal}))")
        told = (f"0 < mean_square (centred {y})", f"nonzero {m}", f"Rabs (mean {x}) < mean (map Rabs {x})")
        unit = run.define("u", f"(centred_unit {eps} {m} {y} {goal})")
        proof = both(zero, *(run.assume(one) for one in told))
        return proof, f"(quotient {goal} {unit})", f"(scale (sqrt (mean_square (centred {y}) + {eps})) {unit})"
    if step.route == "secular":
        mu = run.unknown(step, "mu", "")
        term = f"({goal} i * {m} i / ({m} i * {m} i - {mu}))"
        told = (f"0 < mean_square {y}", f"forall i, {m} i <> 0 /\\ {m} i * {m} i <> {mu}",
                f"mean (fun i => {term} * {term}) = mean_of {eps} {y}")  # fmt: skip
        new = run.define("m_new", f"(secular_scale {mu} {m})")
    else:
        told = (f"0 < mean_square {y}", f"nonzero {m}", f"{goal} <> zero")
        direction = m if step.route == "uniform" else run.define("m_new", f"(balanced_scale {m} {goal})")
        new = run.define("m_new", f"(scale (size_for {eps} {direction} {y} {goal}) {direction})")
    return both(zero, *(run.assume(one) for one in told)), new, f"(target {eps} {new} {y} {goal})"
