"""Level symbolic for joint proofs: two tokens with one patch, symbolic entries at small explicit sizes.

What one patch for many tokens does has no entry that could be written for any size (it solves a system of the tokens' inputs), so
joint rules are executed on two tokens of explicit sizes, by elimination.  Rules that compose others act token by token: their own
checks, with every size a symbol, are those of any proof.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from controllability.arrays import Array
from controllability.arrays.lazy import np, sympy
from controllability.checks.cache import Cache
from controllability.checks.rebuilt_blocks import MANY, each_param, resized, small_sizes
from controllability.checks.undefined_parts import (
    EXPERTS,
    ONE,
    ROUND,
    SAME,
    SERVED,
    SYMPY,
    D,
    GivenRouting,
    H,
    Read,
    UndefinedPart,
)
from controllability.components.mixture import CHOSEN, Mixture
from controllability.components.normalisation import Normalize
from controllability.errors import SideConditionFailed
from controllability.execution.patch import Patch
from controllability.execution.sampling import sample
from controllability.execution.trace import Trace
from controllability.interfaces import Component, JointOptions, OutputControllable, Param, Params, Place, Sequence
from controllability.rules import Step, construct
from controllability.rules.base import Schema
from controllability.rules.normalised_jointly import JointNormalised
from controllability.rules.schema import SchemaRun
from controllability.symbolic.definitions import definitions

RANK = f"{MANY} tokens, symbolic entries at size"
_MEMORY = Cache()


def joint_check(step: Step) -> tuple[str, str]:
    """(status, method) of a joint rule, executed on its own statement for two tokens."""
    schema = explicit_schema(step)
    try:
        params, x, _ = _instance(schema.component)
        schema.component(params, x)
    except RecursionError:
        raise
    except Exception as failed:  # a component of somebody's own may fail in any way
        return "skipped", f"it runs on no symbols ({type(failed).__name__}: {failed})"
    shapes = tuple(sorted((str(p), str(p.shape)) for p in schema.component.parameters()))
    way = schema.update.jointly if schema.update is not None else None
    rule = type(step.rule).construct, step.rule.name, step.rule.side
    key = (*rule, schema.component, shapes, way and way.solve.__code__)
    try:
        wrong = _MEMORY.recall(key, schema.component, lambda: list(claims(step, schema)))
    except RecursionError:
        raise
    except Exception as failed:
        return "failed", f"its construction cannot be executed on its own statement ({type(failed).__name__}: {failed})"
    if wrong:
        return "failed", "; ".join(wrong)
    return "passed", _told(step, schema)


def _told(step: Step, schema: Schema) -> str:
    sizes = ", ".join(dict.fromkeys("×".join(map(str, p.shape)) for p in schema.component.parameters()))
    if isinstance(step.rule, JointNormalised):
        return f"any wanted output − patched output reduced to 0 with m' = c·m; {RANK} {sizes}; scales found by linear programming: level numeric"
    if schema.component.chosen:
        dependent = "stacked vectors that depend on each other (of two tokens with the same experts; of three, each two of which share one)"
        return f"patched output − output − δ reduced to 0 for {MANY} tokens with any targets, and {dependent} with targets that depend in the same way; other targets of those are refused; {RANK} {sizes}"
    served = f"{MANY} tokens" if _tokens_served(schema) == MANY else "one token"
    reach = f"{served} with any targets, and dependent ones with targets that depend in the same way"
    return f"patched output − output − δ reduced to 0 for {reach}; other targets of dependent tokens are refused; {RANK} {sizes}"


def _tokens_served(schema: Schema) -> int:
    """Tokens in general position that the rule serves at these sizes, at most two."""
    if schema.component.children():
        return MANY
    assert schema.update is not None and schema.update.jointly is not None
    return 1 if schema.update.jointly.max_tokens == 1 else MANY


def claims(step: Step, schema: Schema) -> Iterator[str]:
    """What is wrong with the rule: nothing, if it keeps its promise and refuses what no patch does."""
    if schema.component.chosen:
        yield from _mixture_claims(step)
        return
    params, x, x_target = _instance(schema.component)
    served = _tokens_served(schema)
    wanted = _symbols("w", schema.component(params, x).shape)
    yield from _left(step, schema, params, x[:served], x_target[:served], wanted[:served])
    if schema.component.children():
        return
    if served > 1:
        x = _dependent(x, params)
    yield from _dependent_claims(step, schema, params, x, x_target, x, wanted)


def _mixture_claims(step: Step) -> Iterator[str]:
    """Two tokens in general position; and tokens whose stacked vectors (s_j y_j)_j depend on each other."""
    for choice in (SERVED, SAME, ROUND):
        schema = _mixture_schema(step, choice)
        params, x, x_target = _instance(schema.component, len(choice))
        wanted = _symbols("w", (len(choice), D))
        if choice == SERVED:
            if wrong := [*_left(step, schema, params, x, x_target, wanted)]:  # that is enough
                yield from wrong
                return
            continue
        last_read = x_target if schema.premises else x  # router and experts are steered to the target's values, or stay
        _stack_dependently(schema.component, params, last_read)
        yield from _dependent_claims(step, schema, params, x, x_target, last_read, wanted)


def _stack_dependently(mixture: Component, params: Params, x: Array) -> None:
    """The last token's stacked vector becomes a multiple of another's, or a sum of such of two others'."""
    assert isinstance(mixture, Mixture)
    shares = SYMPY.zeros_like(x[:, :2]) + 1
    if mixture.weighted:
        shares = mixture.routing(params, mixture.router(params, x))[1]
    stacked = shares * x[:, EXPERTS:]
    if len(x) == len(SAME):
        wanted = sympy.Symbol("c", real=True) * stacked[0]
    else:  # b_1 · (a_1, a_2, 0) − a_2 · (0, b_1, b_2)
        wanted = stacked[0] * stacked[1, 0]
        wanted[1] = -stacked[0, 1] * stacked[1, 1]
    x[-1, EXPERTS:] = wanted / shares[-1]


def _dependent_claims(
    step: Step, schema: Schema, params: Params, x: Array, x_target: Array, last_read: Array, wanted: Array
) -> Iterator[str]:
    """Targets that depend as the inputs do are reached, and others refused."""
    moved = _moved_somehow(schema, params)
    yield from _left(step, schema, params, x, x_target, schema.component(moved, last_read))
    try:
        found = [*_left(step, schema, params, x, x_target, wanted)]
    except SideConditionFailed:
        return
    yield f"targets that no patch gives are not refused ({found or 'and are said to be reached'})"


def _left(step: Step, schema: Schema, params: Params, x: Array, x_target: Array, wanted: Array) -> Iterator[str]:
    """What is left of each claim, where it is not 0."""
    component = schema.component
    composed = component.sequential
    # a name for an output would hide that outputs depend on each other: a leaf is written out
    with definitions() if composed else nullcontext() as table:
        target = Trace(component, params, x_target)
        run = SchemaRun(component, params, x, target, JointOptions())
        construct(schema.step(step), run, lambda: wanted)
        output = run.output(())
        left = {"the conclusion": output - wanted}
        for premise, asked in run.asked:
            if premise.rule.side == "input":
                left[f"what {premise.place.describe()} is asked for"] = asked() - target.output(premise.place.path)
        left["the patched parameters"] = component(Patch(run.deltas()).merged_into(params), x) - output
        for claim, rows in left.items():
            entries = [table.reduced(e) if table else e for e in SYMPY.tidy(rows).reshape(-1)]
            if any(e != 0 for e in entries):
                yield f"{claim} leaves {next(e for e in entries if e != 0)}"


def _moved_somehow(schema: Schema, params: Params) -> Params:
    """The parameters with some other value of the steered one: what it gives can be reached."""
    assert schema.update is not None
    name = str(schema.update.param)
    value = np.asarray(params[name])
    return {**params, name: value + _symbols("c", value.shape)}


def _dependent(x: Array, params: Params) -> Array:
    """The second token twice the first; for experts, where one expert serves both."""
    x = x.copy()
    if CHOSEN in params:
        x[1, 0] = 2 * x[0, 1]
    else:
        x[1] = 2 * x[0]
    return x


def _instance(component: Component, tokens: int = MANY) -> tuple[dict[str, Array], Array, Array]:
    sizes: dict[str, Any] = {} if component.chosen else small_sizes(component)
    params, x, x_target = sample(component, "sympy", tokens=(tokens,), **sizes)
    own = {
        str(p)
        for part in (component, *component.children())
        if isinstance(part, UndefinedPart)
        for p in part.own_parameters()
    }
    params |= {name: SYMPY.zeros_like(params[name]) for name in own}
    if component.per_expert:
        params |= {CHOSEN: np.array(SERVED)}
        x, x_target = (_symbols(name, (MANY, len(SERVED[0]), x.shape[-1])) for name in ("x", "y"))
    return params, x, x_target


def _symbols(name: str, shape: tuple[int, ...]) -> Array:
    places = [f"{name}_{'_'.join(map(str, place))}" for place in np.ndindex(*shape)]
    return SYMPY.array(places).reshape(shape)


def explicit_schema(step: Step) -> Schema:
    """The rule's own shape at explicit sizes."""
    given, side = step.place.component, step.rule.side
    if isinstance(step.rule, JointNormalised):
        inner = UndefinedPart("g", D, controlled=True)
        norm = Normalize("rms", sympy.Symbol("epsilon", positive=True))
        block = Sequence.of(inner, norm, _small(given.children()[-1]))
        return Schema(block, (inner.premise(Place(inner, (0,)), side),))
    if given.chosen:
        return _mixture_schema(step, SERVED)
    assert step.update is not None
    leaf, own = _small(given), [str(p) for p in given.own_parameters()]
    param = leaf.own_parameters()[own.index(str(step.update.param))]
    ways = leaf.input_updates() if side == "input" else leaf.output_updates()  # type: ignore[attr-defined]
    return Schema(leaf, update=next(w for w in ways if w.param == param and w.jointly))


def _mixture_schema(step: Step, choice: tuple[tuple[int, ...], ...]) -> Schema:
    """A mixture of any router and inner functions, for as many tokens as there are choices of experts."""
    given, controlled, (tokens, slots) = step.place.component, bool(step.premises), np.shape(choice)
    router = Read("router", EXPERTS, (), controlled, 0, tokens)
    inner = Read("inner", ONE, (slots,), controlled, EXPERTS, tokens)
    last = _small(given.children()[2], ONE)
    assert isinstance(last, OutputControllable)
    block = given.map_held(lambda _: GivenRouting(choice=choice)).map_children(lambda i, _: (router, inner, last)[i])
    parts = ((router, (0,)), (inner, (1,))) if controlled else ()
    premises = tuple(part.premise(Place(part, path), "input") for part, path in parts)
    return Schema(block, premises, last.output_updates()[0])


def _small(leaf: Component, hidden: int = H) -> Component:
    """The same leaf with plain names and small sizes."""
    names: dict[str, str] = {}
    plain = each_param(leaf, lambda p: Param(names.setdefault(str(p), f"p{len(names) + 1}"), p.shape))
    return resized(plain, D, hidden, EXPERTS, D)
