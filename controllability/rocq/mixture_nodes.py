"""Mixtures of experts: any choice of experts and shares, as a function of the router's logits."""

from dataclasses import replace
from typing import Any

from controllability.components.mixture import ExpertLinear, Mixture
from controllability.errors import BadInput
from controllability.rocq.formula import Value, inside, routing
from controllability.rocq.leaf_nodes import expert_storage, held, translation
from controllability.rocq.nodes import Run, Tree, lemma, tree
from controllability.rocq.states import Level, vector
from controllability.rules import Step


def mixture_of(step: Step) -> Mixture:
    """The mixture that a step is about."""
    assert isinstance(step.place.component, Mixture)
    return step.place.component


def route(run: Run, c: Mixture, logits: Any, level: Level) -> tuple[str, Level]:
    """(the choice as a function of the logits' state, the level inside; its choice is still to be named)."""
    if level.rows is not None:
        raise BadInput(f"{c.describe()} moves inside another mixture: it has no lemma in Coq")
    name, rows, experts = routing(run.w, c, logits, run.names)
    kind = level.kind(run.w, vector(run.w, logits))
    body = level.over(run.w, f"({name} {level.at('l')})")
    text = f"(fun l : {kind} => {body})" if level.joint else name
    return text, replace(level, rows=rows, experts=experts)


def choice_kind(run: Run, inner: Level) -> str:
    """The type of a choice, of one for each token in a joint proof."""
    one = f"choice {run.w.sizes.mark(inner.rows or 0)} {run.w.sizes.mark(inner.experts)}"
    return inner.outside().kind(run.w, one)


def last_map(run: Run, c: Mixture, size: Any, inner: Level) -> tuple[str, Any]:
    """(fun c y => Σ_j s_j last_j(y_j), its size), the last maps as they are."""
    name = run.w.fresh("c")
    level = replace(inner, choice=name)
    here = f"({name} t)" if level.joint else name
    shares = f"(share {here if c.weighted else f'(evenly {here})'})"

    def write(y: Value) -> Value:
        out = run.state(c.last, y, level)
        row = f"(fun j : {run.w.sizes.mark(inner.rows or 0)} => {level.at(out.text)})"
        return Value(inner.outside().over(run.w, f"(mix {shares} {row})"), out.size)

    text, out = run.function(size, level, write)
    return f"(fun {name} : {choice_kind(run, inner)} => {text})", out


def last_leaf(run: Run, step: Step, size: Any, inner: Level) -> tuple[str, Any]:
    """(fun c => the leaf of the experts' last matrices, the size of the sum)."""
    c = mixture_of(step)
    assert isinstance(c.last, ExpertLinear)
    out = run.state(c.last, Value("y", size), replace(inner, choice="c")).size
    after, even = translation(c.last.bias, run, per_expert=True), not c.weighted
    if not inner.joint:
        leaf = f"(mixture {after} {'(evenly c)' if even else 'c'})"
    else:
        kind = f"{run.w.sizes.mark(inner.tokens or 0)} -> {run.w.sizes.mark(inner.experts)} -> {vector(run.w, size)}"
        choice = "(fun t => evenly (c t))" if even else "c"
        leaf = f"(mixture_jointly {after} {run.unknown(step, 'inverse', kind)} {choice})"
    return f"(fun c : {choice_kind(run, inner)} => {held(expert_storage(c.last), leaf)})", out


@lemma(("O-mixture", "output"), ("O-mixture jointly", "output"))
def output_mixture(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """The experts' last matrices."""
    c = mixture_of(step)
    logits = run.state(c.router, Value("x", size), level).size
    inner = route(run, c, logits, level)[1]

    def choice(x: Value) -> Value:
        at = inner.point(run.names)
        return Value(level.over(run.w, inside(run.w, c, Value(level.at(x.text), x.size), at)[0]), None)

    def rows(x: Value) -> Value:
        name = run.w.fresh("chosen")
        spread = Value(inner.over(run.w, level.at(x.text)), x.size)
        y = run.state(c.inner, spread, replace(inner, choice=name))
        return Value(f"(let {name} := {choice(x).text} in {y.text})", y.size)

    y, between = run.function(size, level, rows)
    leaf, out = last_leaf(run, step, between, inner)
    assert isinstance(c.last, ExpertLinear)
    return Tree(f"(O_mixture {leaf} {run.function(size, level, choice)[0]} {y})", c.last.weight, out)


@lemma(("I-mixture", "input"), ("T-mixture", "through"), ("T-mixture jointly", "through"))
def steered(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """Router and inner maps; then the last maps as they are, or for a wanted sum."""
    c = mixture_of(step)
    router = tree(run, step.premises[0], level, size)
    way, inner = route(run, c, router.size, level)
    name = run.w.fresh("chosen")
    f = tree(run, step.premises[1], replace(inner, choice=name), size)
    rows = run.function(size, level, lambda x: Value(inner.over(run.w, level.at(x.text)), size))[0]
    text = f"{router.text} {way} (fun {name} : {choice_kind(run, inner)} => I_before {rows} {f.text})"
    if step.rule.side == "input":
        last, out = last_map(run, c, f.size, inner)
        return Tree(f"(I_mixture {text} {last})", (router.params, f.params), out)
    assert isinstance(c.last, ExpertLinear)
    last, out = last_leaf(run, step, f.size, inner)
    return Tree(f"(T_mixture {text} {last})", ((router.params, f.params), c.last.weight), out)
