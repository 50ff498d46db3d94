"""The leaves: one parameter moves by a formula."""

from typing import Any

from controllability.components.bias import Bias
from controllability.components.convolution import Taps
from controllability.components.linear import Linear
from controllability.components.mixture import ExpertLinear
from controllability.components.scale import Scale
from controllability.errors import BadInput
from controllability.interfaces import Param
from controllability.rocq.formula import Value
from controllability.rocq.names import number
from controllability.rocq.nodes import Run, Tree, lemma
from controllability.rocq.states import Level, vector
from controllability.rocq.stream_formulas import taps
from controllability.rules import Step

KINDS = ("linear", "bias", "scale", "experts", "taps")
ROWS = [(f"{side[0].upper()}-{kind}{many}", side) for side in ("input", "output") for kind in KINDS for many in ("", " jointly")
        if (side, kind) != ("output", "experts") and (kind != "taps" or (side, many) == ("output", ""))]  # fmt: skip


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


@lemma(*ROWS)
def leaf(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """The leaves of one parameter, on either side."""
    assert step.update is not None
    out = run.state(step.place.component, Value("x", size), level).size
    side = {"input": "I_leaf", "output": "O_leaf"}[step.rule.side]
    return Tree(f"({side} {_leaf(run, step, level, size)})", step.update.param, out)


def _leaf(run: Run, step: Step, level: Level, size: Any) -> str:
    assert step.update is not None
    c, kind, many = step.place.component, step.update.kind, "_jointly" if level.joint else ""
    if level.rows is not None and kind != "experts":
        raise BadInput(f"{c.describe()} moves inside a mixture, before its experts: it has no lemma in Coq")

    def given(what: str, kind: str) -> str:  # what a joint proof leaves open
        return f" {run.unknown(step, what, kind)}" if many else ""

    if kind == "linear" and isinstance(c, Linear):
        rows = given("inverse", level.kind(run.w, vector(run.w, size)))
        return held("turned" if c.layout == "in_out" else "", f"(linear{many} {translation(c.bias, run)}{rows})")
    if kind == "bias" and isinstance(c, Bias | Linear):
        f, out = run.function(size, Level(), lambda x: x)
        if isinstance(c, Linear):
            f, out = run.fixed(Linear(c.weight, None, c.layout), size, Level())
        return f"(bias{many} {f}{given('common', vector(run.w, out))})"
    if kind == "scale" and isinstance(c, Scale):
        return held(offset_of(c), f"(elementwise{many}{given('common', vector(run.w, size))})")
    if kind == "experts" and isinstance(c, ExpertLinear):
        rows = given("inverse", level.kind(run.w, vector(run.w, size)))
        own = f"(experts{many} {translation(c.bias, run, per_expert=True)}{rows} {level.choice})"
        return held(expert_storage(c), own)
    if kind == "taps" and isinstance(c, Taps):
        return f"({taps(c, 'taps')})"
    raise BadInput(f"{step.rule.name} at {step.place.describe()} has no lemma in Coq")
