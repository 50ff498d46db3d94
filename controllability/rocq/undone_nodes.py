"""What stands around a premise and is undone: other terms, other factors, bijections, normalisations; and the theorems on sums."""

from typing import Any, NamedTuple

from controllability.components.activation import SoftCap
from controllability.components.bias import Bias
from controllability.components.fixed import Gate
from controllability.components.residual import Identity
from controllability.components.scale import Scale
from controllability.components.streams import Streams
from controllability.components.times import Times
from controllability.errors import BadInput
from controllability.interfaces import Component, Product, Sum
from controllability.rocq.formula import Value, eps_of, gate, scale_of
from controllability.rocq.leaf_nodes import offset_of
from controllability.rocq.names import number
from controllability.rocq.nodes import Run, Tree, lemma, tree
from controllability.rocq.sizes import UNIT
from controllability.rocq.states import Level, vector
from controllability.rules import Step

SINGLE = {"auto": "balanced", "balanced": "balanced", "uniform": "uniform", "secular": "secular"}


class Around(NamedTuple):
    """The theory's name for what is undone, what it is undone with as a function of the state, and the component."""

    undo: str
    function: str
    component: Component

    def wrap(self, word: str, text: str) -> str:
        """A node inside it."""
        return f"({word} {self.undo} {self.function} {text})"


def term(run: Run, c: Component, kind: type, first: bool, wide: Any, size: Any, level: Level) -> Around:
    """Another term of a sum, another factor of a product whose premise is ``wide``; ``first`` where it stands before."""
    find = run.w.sizes.find

    def write(x: Value) -> Value:
        found = run.state(c, x, level)
        if kind is Sum or find(found.size) != UNIT or find(wide) == UNIT:
            if kind is Product and find(found.size) != UNIT and find(wide) == UNIT:
                raise BadInput(f"{c.describe():.60} multiplies one number: it has no lemma in Coq")
            return found
        return Value(level.over(run.w, f"(spread {level.at(found.text)} : {vector(run.w, wide)})"), wide)

    names = {Sum: ("sum_before", "sum_after"), Product: ("factor_before", "factor")}
    undo = names[kind][first]
    each = level.joint and kind is Product
    return Around(f"(each {undo})" if each else undo, run.function(size, level, write)[0], c)


def inverse(run: Run, q: Component, wide: Any, size: Any, level: Level) -> Around:
    """A bijection behind a premise that gives ``wide`` vectors, its parameters as they are."""
    w, undo = run.w, "multiple"
    if isinstance(q, Scale):
        undo, one = "factor", scale_of(w, q, run.names[q.weight], wide)
    elif isinstance(q, Bias):
        w.param(q.bias, "vec", wide)
        undo, one = "sum_before", run.names[q.bias]
    elif isinstance(q, Gate):
        one = gate(w, q, run.names[q.weight])
    elif isinstance(q, Times):
        one = number(q.factor, q.describe())
    elif isinstance(q, Streams):
        undo, one = "as_rows", "tt"
    elif isinstance(q, SoftCap):
        undo, one = f"(capped {w.free('inverse_tanh', 'R -> R')})", number(q.cap, q.describe())
    else:
        raise BadInput(f"{q.describe()} has no lemma in Coq that undoes it: no certificate is written")
    text = run.function(size, level, lambda x: Value(level.over(w, one), None))[0]
    return Around(f"(each {undo})" if level.joint and undo != "sum_before" else undo, text, q)


def around(run: Run, step: Step, level: Level, size: Any, wide: Any) -> list[Around]:
    """What a step's first premise stands in, the innermost first: what stands before it as one, what stands behind one by one."""
    place, carried = step.place, step.premises[0].place
    kind, parts = type(place.component), place.component.children()
    if kind not in (Sum, Product):
        return [] if isinstance(parts[-1], Identity) else [inverse(run, parts[-1], wide, size, level)]
    at = carried.outlet[len(place.path)] - place.start
    first = [(parts[0] if at == 1 else kind(parts[:at]), True)] if at else []
    return [term(run, c, kind, one, wide, size, level) for c, one in (*first, *((c, False) for c in parts[at + 1 :]))]


@lemma(
    ("O-sum", "output"), ("O-factor", "output"), ("theorem-1b", "input"), ("I-factor", "input"),
    *((name, side) for name in ("O-through-bijection", "O-times") for side in ("output", "through")),
)  # fmt: skip
def undone(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """The premise inside what is undone."""
    found = tree(run, step.premises[0], level, size)
    word = {"through": "T_undo", "output": "O_undo", "input": "theorem_1b"}[step.rule.side]
    out = run.state(step.place.component, Value("x", size), level).size
    return wrapped(run, step, level, size, found, word)._replace(size=out)


def wrapped(run: Run, step: Step, level: Level, size: Any, found: Tree, outermost: str) -> Tree:
    """A premise's node inside what it stands in."""
    inner = "T_undo" if outermost in ("T_undo", "theorem_1_through") else "O_undo"
    text, others = found.text, around(run, step, level, size, found.size)
    for i, one in enumerate(others, 1):
        text = one.wrap(outermost if i == len(others) else inner, text)
    return found._replace(text=text)


@lemma(("theorem-1", "input"))
def theorem_1(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """f on the input side, then g on the output side; or a branch with branches inside, through."""
    f = tree(run, step.premises[0], level, size)
    if len(step.premises) == 1:
        return wrapped(run, step, level, size, f, "theorem_1_through")
    g = tree(run, step.premises[1], level, f.size)
    first, *others = around(run, step, level, size, g.size)
    undo, values = first.undo, f"({first.function} x)"
    for one in others:
        undo, values = f"(both {undo} {one.undo})", f"({values}, {one.function} x)"
    kind = level.kind(run.w, vector(run.w, size))
    return Tree(f"(theorem_1 {undo} (fun _ (x : {kind}) => {values}) {f.text} {g.text})", (f.params, g.params), g.size)


@lemma(("T-sum", "through"))
def through_sum(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """One term through; the others as in the target run where they are steered, else as they are."""
    found = tree(run, step.premises[0], level, size)
    for one in around(run, step, level, size, found.size):
        steered = next((p for p in step.premises[1:] if p.place.component is one.component), None)
        if steered is None:
            inner = one.component.children() if isinstance(one.component, Sum) else ()
            if any(p.place.component is part for p in step.premises[1:] for part in inner):
                told = "a steered term among several before the carried one has no lemma"
                raise BadInput(f"T-sum at {step.place.describe():.60}: {told}")
            found = found._replace(text=one.wrap("T_undo", found.text))
        else:
            f = tree(run, steered, level, size)
            found = Tree(f"(T_sum {one.undo} {f.text} {found.text})", (f.params, found.params), found.size)
    return found


@lemma(
    ("O-normalised", "output"), ("O-normalised", "through"), ("O-centred", "output"),
    ("O-normalised jointly", "output"), ("O-normalised jointly", "through"),
)  # fmt: skip
def normalised(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """m∘n(premise): a new scale and a new input of the normalisation, by a route."""
    found, parts = tree(run, step.premises[0], level, size), step.place.component.children()
    scale = parts[-1] if isinstance(parts[-1], Scale) else None
    eps, letter = eps_of(parts[-1 if scale is None else -2]), "T" if step.rule.side == "through" else "O"
    if step.route == "ball":
        unit = run.function(size, level, lambda x: Value("tt", None))[0]
        text = f"({letter}_undo (ball {eps}) {unit} {found.text})"
        scaled = [] if scale is None else [inverse(run, scale, found.size, size, level)]
        return found._replace(text=scaled[0].wrap(f"{letter}_undo", text) if scaled else text)
    assert scale is not None
    scale_of(run.w, scale, "", found.size)
    if step.rule.name == "O-centred":
        route = f"(centred_balanced {eps})"
    elif level.joint:
        route = f"(keep {eps} {run.unknown(step, 'new_scale', vector(run.w, found.size))})"
    elif step.route == "secular":
        route = f"(secular {eps} {run.unknown(step, 'mu', 'R')})"
    else:
        route = f"({SINGLE[step.route]} {eps})"
    text = f"({letter}_normalised {offset_of(scale) or 'plain'} {route} {found.text})"
    return Tree(text, (found.params, scale.weight), found.size)
