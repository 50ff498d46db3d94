"""The leaves: one parameter moves by a formula."""

from controllability.components.bias import Bias
from controllability.components.linear import Linear
from controllability.components.mixture import ExpertLinear
from controllability.components.scale import Scale
from controllability.errors import BadInput
from controllability.interfaces import Component, Param
from controllability.rocq.formula import Value, expert_matrix, matrix, scale_of
from controllability.rocq.names import number
from controllability.rocq.nodes import Run, Solved, Tree, Wanted, lemma
from controllability.rocq.states import Level, function, vector
from controllability.rules import Step

KINDS = ("linear", "bias", "scale", "experts")


def expert_storage(c: ExpertLinear) -> str:
    """How the experts' matrices are held; '' for (experts, out, in)."""
    turned = c.layout == "in_out"
    if c.stacked is not None:
        return "(then_held stack turned_each)" if turned else "stack"
    return "turned_each" if turned else ""


def translation(bias: Param | None, run: Run, per_expert: bool = False) -> str:
    """What follows a map: its bias, or nothing."""
    if not per_expert:
        return "alone" if bias is None else f"(plus {run.names[bias]})"
    return "(fun _ => alone)" if bias is None else f"(fun e => plus ({run.names[bias]} e))"


def held(storage: str, leaf: str) -> str:
    """A leaf whose parameter is stored otherwise."""
    return f"(stored {storage} {leaf})" if storage else leaf


def offset_of(c: Scale) -> str:
    """How a scale is stored."""
    return f"(offset {number(c.offset, c.describe())})" if c.offset else ""


def in_storage(c: Component, text: str) -> str:
    """A new value as the parameter holds it."""
    if isinstance(c, Linear) and c.layout == "in_out":
        return f"(transpose {text})"
    if isinstance(c, Scale) and c.offset:
        return f"(store {offset_of(c)} {text})"
    if isinstance(c, ExpertLinear) and expert_storage(c):
        return f"(store {expert_storage(c)} {text})"
    return text


def _linear_without_bias(c: Linear) -> Linear:
    return Linear(c.weight, None, c.layout)


@lemma(*((f"{side}-{kind}{many}", {"I": "input", "O": "output"}[side])
         for side in "IO" for kind in KINDS for many in ("", " jointly") if (side, kind) != ("O", "experts")))  # fmt: skip
class Leaf:
    """The eight leaves, on either side."""

    @staticmethod
    def tree(run: Run, step: Step, level: Level, size: object) -> Tree:
        assert step.update is not None
        out = run.state(step.place.component, Value("x", size), level).size
        side = {"input": "I_leaf", "output": "O_leaf"}[step.rule.side]
        return Tree(f"({side} {leaf(run, step, level, size)})", step.update.param, out)

    @staticmethod
    def solve(run: Run, step: Step, level: Level, wanted: Wanted) -> Solved:
        assert step.update is not None
        c, z = step.place.component, run.defined("z", wanted.z)
        now = run.define("now", run.state(c, z, level).text)
        goal = wanted.w if wanted.target is None else run.state(c, wanted.target, level).text
        delta = run.define("delta", f"(sub {run.define('goal', goal)} {now})")
        new, proof = moved(run, step, level, z, delta)
        return Solved({step.update.param: in_storage(c, new)}, proof)


def leaf(run: Run, step: Step, level: Level, size: object) -> str:
    """The leaf of a step that moves a parameter of one component."""
    assert step.update is not None
    c, kind = step.place.component, step.update.kind
    w = run.w
    if level.rows is not None and kind != "experts":
        raise BadInput(f"{c.describe()} moves inside a mixture, before its experts: it has no lemma in Coq")
    if kind == "linear" and isinstance(c, Linear):
        storage, after = "turned" if c.layout == "in_out" else "", translation(c.bias, run)
        own = f"(linear_jointly {after} {_inverse(run, step, level, size)})" if level.joint else f"(linear {after})"
        return held(storage, own)
    if kind == "bias" and isinstance(c, Bias | Linear):
        one = Level()
        inner = _linear_without_bias(c) if isinstance(c, Linear) else None
        f, out = run.fixed(inner, size, one) if inner else function(w, size, one, lambda x: x)
        return f"(bias_jointly {f} {run.unknown(step, 'common', vector(w, out))})" if level.joint else f"(bias {f})"
    if kind == "scale" and isinstance(c, Scale):
        joint = f"(elementwise_jointly {run.unknown(step, 'common', vector(w, size))})"
        return held(offset_of(c), joint if level.joint else "elementwise")
    if kind == "experts" and isinstance(c, ExpertLinear):
        after = translation(c.bias, run, per_expert=True)
        own = f"experts_jointly {after} {_inverse(run, step, level, size)}" if level.joint else f"experts {after}"
        return held(expert_storage(c), f"({own} {level.choice})")
    raise BadInput(f"{step.rule.name} at {step.place.describe()} has no lemma in Coq")


def _inverse(run: Run, step: Step, level: Level, size: object) -> str:
    """The rows of a pseudo-inverse of the states."""
    return run.unknown(step, "inverse", level.kind(run.w, vector(run.w, size)))


def moved(run: Run, step: Step, level: Level, z: Value, delta: str) -> tuple[str, str]:
    """(the new value of the parameter, not yet as it is stored; the proof of the side condition)."""
    assert step.update is not None
    c, kind, name = step.place.component, step.update.kind, run.names[step.update.param]
    w, size = run.w, z.size
    if kind == "linear":
        assert isinstance(c, Linear)
        weight = matrix(c, name)
        if not level.joint:
            return f"(rank_one {weight} {delta} (direction {z.text}))", run.assume(f"{z.text} <> zero")
        a = _inverse(run, step, level, size)
        told = f"forall t o, sum (fun s => {delta} s o * dot ({a} s) ({z.text} t)) = {delta} t o"
        return f"(rank_all {weight} {delta} {a})", run.assume(told)
    if kind == "bias":
        if not level.joint:
            return f"(add {name} {delta})", "I"
        common = run.unknown(step, "common", "")
        return f"(add {name} {common})", run.assume(f"forall t, {delta} t = {common}")
    if kind == "scale":
        assert isinstance(c, Scale)
        m = scale_of(w, c, name, size)
        if not level.joint:
            told = f"forall i, {z.text} i = 0 -> {delta} i = 0"
            return f"(add {m} (quotient {delta} {z.text}))", run.assume(told)
        common = run.unknown(step, "common", "")
        return f"(add {m} {common})", run.assume(f"forall t, {delta} t = times {common} ({z.text} t)")
    assert isinstance(c, ExpertLinear)
    matrices = f"(fun e => {expert_matrix(c, name, 'e')})" if expert_storage(c) else name
    e = level.choice
    if not level.joint:
        told = run.assume(f"distinct (expert {e})"), run.assume(f"forall j, {z.text} j = zero -> {delta} j = zero")
        return (
            f"(rank_each {matrices} (expert {e}) {delta} (fun j => direction ({z.text} j)))",
            f"(conj {told[0]} {told[1]})",
        )
    a = _inverse(run, step, level, size)
    term = f"only (expert ({e} s) k) (expert ({e} t) j) ({delta} s k o * dot ({a} s k) ({z.text} t j))"
    told_all = run.assume(f"forall t j o, sum (fun s => sum (fun k => {term})) = {delta} t j o")
    return f"(rank_rows {matrices} (fun t => expert ({e} t)) {delta} {a})", told_all
