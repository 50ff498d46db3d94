"""Level symbolic, rule by rule: each rule's own schema, executed in index notation and reduced to 0."""

from dataclasses import replace
from typing import Any

from controllability.arrays import ARITHMETICS, Array
from controllability.checks.cache import Cache
from controllability.checks.failing_component import told
from controllability.checks.rebuilt_blocks import rebuilt, renamed, resized, small_sizes
from controllability.checks.symbolic_block import INDEXED, GivenArrays, RecognisedArrays
from controllability.components.mixture import CHOSEN, ExpertLinear
from controllability.deltas import Delta, LowRank, added
from controllability.execution.patch import Patch
from controllability.execution.sampling import sample
from controllability.interfaces import Component, Update, leaves
from controllability.prover.derivation import Derivation
from controllability.prover.edits import nodes
from controllability.rules import Step, construct
from controllability.rules.base import Schema
from controllability.rules.schema import Unknown, sympy_size, undefined
from controllability.symbolic.array_names import unfolded_to_zero
from controllability.symbolic.definitions import Definitions, definitions
from controllability.symbolic.indexed import IndexedArray
from controllability.symbolic.normal_form import normal_form

CONCLUSIONS = {
    "input": "f(z; θ') − f(z'; θ)",
    "output": "g(y; φ') − g(y; φ) − δ",
    "through": "c(v; θ', φ') − any wanted output",
}
NOT_GENERIC = (Exception,)  # a component of somebody's own may fail in any way
_MEMORY = Cache()


def rule_checks(proof: Derivation) -> list[dict[str, Any]]:
    """One row a rule of the proof, in the order of the tree: [{rule, status, method}]; the worst of its places.

    The tree is ``proof.root``, as it is shown; alternatives are checked by ``replace(proof, root=alternative)``.
    """
    rows: dict[str, dict[str, Any]] = {}
    for step in proof.root.walk():
        status, method = rule_check(step)
        row = rows.get(step.rule.name)
        if row is None or (row["status"] == "passed" and status != "passed"):
            rows[step.rule.name] = {"rule": step.rule.name, "status": status, "method": method}
    return list(rows.values())


def rule_check(step: Step) -> tuple[str, str]:
    """(status, method) of the rule of one step, on its schema.

    A component that does not run in index notation is reduced at small explicit sizes, and the method says so.
    """
    if step.rule.jointly:
        from controllability.checks.symbolic_joint import joint_check

        return joint_check(step)
    names: dict[str, str] = {}
    component = rebuilt(renamed(step.place.component, names), lambda leaf: resized(leaf, "m", "n", "E", "d"))
    update = step.update and replace(step.update, param=renamed(step.update.param, names))
    plain = replace(step, place=replace(step.place, component=component), update=update)
    try:
        schema = step.rule.schema(plain)
        left = [(f"{name}: {what}", e) for name, s in step.rule.variants(plain).items() for what, e in known(s, schema)]
    except RecursionError:
        raise
    except NOT_GENERIC as reason:
        told = f"{type(reason).__name__}: {reason}"
        if step.place.component.chosen or step.update is None or runs_indexed(plain.place.component):
            return "failed", f"its construction cannot be executed on its own statement ({told})"
        return explicit_check(step, told)
    wrong = [f"{what} leaves {entry}" for what, entry in left if entry != 0]
    if wrong:
        return "failed", "; ".join(wrong).removeprefix(": ")
    return "passed", _told(step, schema, [name for name in step.rule.variants(step) if name])


def _told(step: Step, schema: Schema, routes: list[str]) -> str:
    unknown = [p.describe() for _, p in nodes(schema.component) if isinstance(p, Unknown)]
    functions = f", {', '.join(unknown)} undefined functions" if unknown else ""
    asked = "; each premise is asked for what it can do" if schema.premises else ""
    on = f" on {', '.join(routes)}" if routes else ""
    return f"{CONCLUSIONS[step.rule.side]} reduced to 0{on}; every size a symbol{functions}{asked}"


def _code(method: Any) -> Any:
    """What a method or a function runs: closures of one formula are alike."""
    return getattr(getattr(method, "__func__", method), "__code__", method)


def known(step: Step, schema: Schema) -> list[tuple[str, Any]]:
    """What is left of the schema's claims; reduced once for each rule, shape and construction."""
    update = schema.update
    how = (update.kind, update.param, _code(update.solve), _code(update.effect)) if update else None
    paths = tuple(premise.place.path for premise in schema.premises)
    shapes = tuple(sorted((str(p), str(p.shape)) for p in schema.component.parameters()))  # no part of what is equal
    rule = (type(step.rule).construct, step.rule.name, step.rule.side, step.route)
    key = (*rule, how, schema.component, shapes, paths)
    return _MEMORY.recall(key, schema.component, lambda: claims(step, schema))


def claims(step: Step, schema: Schema) -> list[tuple[str, Any]]:
    """[(claim, what is left of one entry)]: the conclusion, what the premises are asked for, the patch as applied."""
    component, side = schema.component, step.rule.side
    last, experts = leaves(component)[-1][1], list[tuple[str, Any]]()
    if schema.update is not None and isinstance(last, ExpertLinear):
        experts = [("the experts as stored", stored_experts(schema.update, last))]
    with definitions(Definitions()) as table:
        params, v, v_target = instance(component)
        target = GivenArrays(component, params, v_target)
        run = RecognisedArrays(table, component, params, v, target)
        goal = target.output(())
        if side != "input":
            goal = IndexedArray.named("wanted", goal.shape)
        construct(schema.step(step), run, lambda: goal)
        left = [("the conclusion", run.output(()) - goal)]
        for premise, wanted in run.asked:
            if premise.rule.side == "input":
                delta = wanted() - target.output(premise.place.path)
                left.append((f"what {premise.place.describe()} is asked for", delta))
        if not schema.premises:
            patched = {**params, **{str(p): _stored(p.value(params), change) for p, change in run.deltas().items()}}
            left.append(("the patched parameters", component(patched, v) - run.output(())))
        return [*((claim, unfolded_to_zero(table, INDEXED.tidy(array).entry)) for claim, array in left), *experts]


def _stored(base: Any, change: Delta) -> Any:
    """A patched parameter as it is stored: the change is added entry by entry (experts' planes stay apart)."""
    return base + change.dense() if type(change) is LowRank else added(base, change)


def stored_experts(update: Update, leaf: ExpertLinear) -> Any:
    """The same with the change added to the stored tensor, in the planes of the chosen experts."""
    params, x, _ = instance(leaf)
    before = leaf(params, x)
    delta = IndexedArray.named("wanted", before.shape)
    moved = Patch({update.param: update.solve(params, x, delta)}).merged_into(params)
    return normal_form((leaf(moved, x) - before - delta).entry)


def runs_indexed(leaf: Component) -> bool:
    """Whether a component can be computed in index notation at all."""
    try:
        params, v, _ = instance(leaf)
        return leaf(params, v) is not None
    except NOT_GENERIC:
        return False


def instance(component: Component) -> tuple[dict[str, Array], Array, Array]:
    """Parameters and two states in index notation; for experts' maps a row for each chosen expert."""
    params, v, v_target = sample(component, "indexed")
    if component.per_expert:
        k = sympy_size("k")
        chosen = undefined("expert", (k,), v, distinct=True)
        v, v_target = (IndexedArray.named(name, (k, v.shape[-1])) for name in ("v", "v'"))
        params = params | {CHOSEN: chosen}
    return params, v, v_target


def explicit_check(step: Step, reason: str) -> tuple[str, str]:
    """One leaf with symbolic entries at small explicit sizes, its parameter patched: output − what is wanted."""
    assert step.update is not None
    leaf, xp = step.place.component, ARITHMETICS["sympy"]
    try:
        params, x, _ = sample(leaf, "sympy", **small_sizes(leaf))
        out = leaf(params, x)
    except NOT_GENERIC as failed:
        return told(leaf, failed)
    delta = ARITHMETICS["sympy"].array([f"delta_{i}" for i in range(out.size)]).reshape(out.shape)
    try:
        change, param = step.update.solve(params, x, delta), step.update.param
        patched = leaf(params | {str(param): _stored(param.value(params), change)}, x)
        left = [xp.tidy(change - delta) for change in (step.update.effect(params, x, change), patched - out)]
    except NOT_GENERIC as failed:
        return "failed", f"its construction cannot be executed: {failed}"
    status = "passed" if all(e == 0 for part in left for e in part.reshape(-1)) else "failed"
    return status, f"patched output − output − δ at size {x.shape[-1]} → {delta.shape[-1]} only ({reason})"
