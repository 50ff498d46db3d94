"""Mixtures of experts: any choice of experts and shares, as a function of the router's logits."""

from dataclasses import replace
from typing import Any

from controllability.components.mixture import ExpertLinear, Mixture
from controllability.interfaces import Component
from controllability.rocq.formula import Value, expert_matrix, inside, routing
from controllability.rocq.leaf_nodes import expert_storage, held, in_storage, translation
from controllability.rocq.nodes import Run, Solved, Tree, Wanted, both, lemma, solve, tree
from controllability.rocq.states import Level, function, vector
from controllability.rules import Step


def mixture_of(step: Step) -> Mixture:
    """The mixture that a step is about."""
    assert isinstance(step.place.component, Mixture)
    return step.place.component


def route(run: Run, c: Mixture, logits: Any, level: Level) -> tuple[str, Level]:
    """(the choice as a function of the logits' state, the level inside; its choice is still to be named)."""
    name, rows, experts = routing(run.w, c, logits, run.names)
    kind = level.kind(run.w, vector(run.w, logits))
    body = level.over(run.w, f"({name} {level.at('l')})")
    text = f"(fun l : {kind} => {body})" if level.joint else name
    return text, replace(level, rows=rows, experts=experts)


def choice_kind(run: Run, inner: Level) -> str:
    """The type of a choice, of one for each token in a joint proof."""
    one = f"choice {run.w.sizes.mark(inner.rows or 0)} {run.w.sizes.mark(inner.experts)}"
    return inner.outside().kind(run.w, one)


def spread(run: Run, size: Any, level: Level, inner: Level) -> str:
    """A state as one row for each chosen expert, as a function."""
    return function(run.w, size, level, lambda x: Value(inner.over(run.w, level.at(x.text)), size))[0]


def rows_at(run: Run, x: Value, level: Level, inner: Level) -> Value:
    """The same at a state."""
    return run.defined("rows", Value(inner.over(run.w, level.at(x.text)), x.size))


def last_map(run: Run, c: Mixture, size: Any, inner: Level) -> tuple[str, Any]:
    """(fun c y => Σ_j s_j last_j(y_j), its size), the last maps as they are."""
    name = run.w.fresh("chosen")
    level = replace(inner, choice=name)
    here = f"({name} t)" if level.joint else name
    shares = f"(share {here if c.weighted else f'(evenly {here})'})"

    def write(y: Value) -> Value:
        out = run.state(c.last, y, level)
        row = f"(fun j : {run.w.sizes.mark(inner.rows or 0)} => {level.at(out.text)})"
        return Value(inner.outside().over(run.w, f"(mix {shares} {row})"), out.size)

    text, out = function(run.w, size, level, write)
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


def last_solved(run: Run, step: Step, choice: str, y: Value, goal: str, inner: Level) -> Solved:
    """The experts' last matrices for a wanted sum, at inner activations y."""
    c = mixture_of(step)
    last = c.last
    assert isinstance(last, ExpertLinear)
    text = last_map(run, c, y.size, inner)[0]
    now = run.define("now", f"({text} {choice} {y.text})")
    delta = run.define("delta", f"(sub {goal} {now})")
    name = run.names[last.weight]
    matrices = f"(fun e => {expert_matrix(last, name, 'e')})" if expert_storage(last) else name
    if inner.joint:
        one = f"({choice} t)" if c.weighted else f"(evenly ({choice} t))"
        a = run.unknown(step, "inverse", "")
        term = f"sum (fun j => share {one} j * dot ({a} s (expert {one} j)) ({y.text} t j))"
        proof = run.assume(f"forall t o, sum (fun s => {delta} s o * {term}) = {delta} t o")
        return Solved({last.weight: in_storage(last, f"(rank_stacked {matrices} {delta} {a})")}, proof)
    one = choice if c.weighted else f"(evenly {choice})"
    told = run.assume(f"distinct (expert {one})"), run.assume(f"exists j, share {one} j <> 0 /\\ {y.text} j <> zero")
    left = f"(fun j => scale (share {one} j / weight (share {one}) {y.text}) {delta})"
    new = f"(rank_each {matrices} (expert {one}) {left} {y.text})"
    return Solved({last.weight: in_storage(last, new)}, f"(conj {told[0]} {told[1]})")


def chosen_and_rows(run: Run, c: Mixture, x: Value, level: Level) -> tuple[str, Value, Level]:
    """(the choice at a state, the inner activations, the level inside), with the parameters as they are."""
    logits = run.state(c.router, x, level)
    inner = route(run, c, logits.size, level)[1]
    name = routing(run.w, c, logits.size, run.names)[0]
    choice = run.define("chosen", level.over(run.w, f"({name} {level.at(logits.text)})"))
    inner = replace(inner, choice=choice)
    y = run.defined("y", run.state(c.inner, rows_at(run, x, level, inner), inner))
    return choice, y, inner


@lemma(("O-mixture", "output"), ("O-mixture jointly", "output"))
class OutputMixture:
    """The experts' last matrices."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        c = mixture_of(step)
        logits = run.state(c.router, Value("x", size), level).size
        _, inner = route(run, c, logits, level)
        at = inner.point(run.names)

        def choice(x: Value) -> Value:
            return Value(level.over(run.w, inside(run.w, c, Value(level.at(x.text), x.size), at)[0]), None)

        def rows(x: Value) -> Value:
            name = run.w.fresh("chosen")
            here = replace(inner, choice=name)
            spread_rows = Value(inner.over(run.w, level.at(x.text)), x.size)
            y = run.state(c.inner, spread_rows, here)
            return Value(f"(let {name} := {choice(x).text} in {y.text})", y.size)

        y, between = function(run.w, size, level, rows)
        leaf, out = last_leaf(run, step, between, inner)
        assert isinstance(c.last, ExpertLinear)
        return Tree(f"(O_mixture {leaf} {function(run.w, size, level, choice)[0]} {y})", c.last.weight, out)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        choice, y, inner = chosen_and_rows(run, mixture_of(step), wanted.z, level)
        return last_solved(run, step, choice, y, run.define("goal", wanted.w), inner)


def steered(run: Run, step: Step, level: Level, size: Any) -> tuple[str, Any, Any, Level]:
    """(router, route and inner maps as arguments of a lemma, their parameters, the inner maps' size, the level inside)."""
    c = mixture_of(step)
    router = tree(run, step.premises[0], level, size)
    way, inner = route(run, c, router.size, level)
    name = run.w.fresh("chosen")
    f = tree(run, step.premises[1], replace(inner, choice=name), size)
    text = f"(fun {name} : {choice_kind(run, inner)} => I_before {spread(run, size, level, inner)} {f.text})"
    return f"{router.text} {way} {text}", (router.params, f.params), f.size, inner


def steered_solved(
    run: Run, step: Step, level: Level, wanted: Wanted
) -> tuple[tuple[Solved, Solved], str, Value, Level]:
    """((router, inner maps) patched, the target's choice, its inner activations, the level inside)."""
    assert wanted.target is not None
    router = solve(run, step.premises[0], level, wanted)
    choice, y, inner = chosen_and_rows(run, mixture_of(step), wanted.target, level)
    z, target = rows_at(run, wanted.z, level, inner), rows_at(run, wanted.target, level, inner)
    f = solve(run, step.premises[1], inner, Wanted(z, target))
    return (router, f), choice, y, inner


@lemma(("I-mixture", "input"))
class InputMixture:
    """Router and inner maps; the last maps stay."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        text, params, between, inner = steered(run, step, level, size)
        last, out = last_map(run, mixture_of(step), between, inner)
        return Tree(f"(I_mixture {text} {last})", params, out)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        router, f = steered_solved(run, step, level, wanted)[0]
        return Solved(router.new | f.new, both(router.proof, f.proof))


@lemma(("T-mixture", "through"), ("T-mixture jointly", "through"))
class ThroughMixture:
    """Router and inner maps, then the last matrices."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: Any) -> Tree:
        text, params, between, inner = steered(run, step, level, size)
        leaf, out = last_leaf(run, step, between, inner)
        last: Component = mixture_of(step).last
        assert isinstance(last, ExpertLinear)
        return Tree(f"(T_mixture {text} {leaf})", (params, last.weight), out)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        (router, f), choice, y, inner = steered_solved(run, step, level, wanted)
        last = last_solved(run, step, choice, y, run.define("goal", wanted.w), inner)
        return Solved(router.new | f.new | last.new, both(router.proof, f.proof, last.proof))
