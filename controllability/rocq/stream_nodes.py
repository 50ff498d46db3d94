"""Values that are put together by weights which read them: the carrier moves, then the weights."""

from typing import Any

from controllability.components.collapse import Collapse, Correction, SelfWeighted
from controllability.components.streams import Spread
from controllability.errors import BadInput
from controllability.rocq.formula import Value
from controllability.rocq.names import number
from controllability.rocq.nodes import Run, Tree, lemma, tree
from controllability.rocq.sizes import UNIT
from controllability.rocq.states import Level, vector
from controllability.rocq.stream_formulas import full_weights
from controllability.rules import Step


@lemma(("I-self-weighted", "input"))
def self_weighted(run: Run, step: Step, level: Level, size: Any) -> Tree:
    """The carrier for what is missing with the target's weights, then the weights to these."""
    c = step.place.component
    assert isinstance(c, SelfWeighted)
    if level.rows is not None:
        raise BadInput(f"{c.describe():.60} inside a mixture has no lemma in Coq")
    carrier, weights = step.premises
    through, found = carrier.rule.side == "through", tree(run, carrier, level, size)
    out, read, u, beside = _weighing(run, c, level, size, found.size)
    if through and u.startswith("(streams "):
        raise BadInput(f"I-self-weighted at {c.describe():.60}: streams that are steered through have no lemma in Coq")
    h = tree(run, weights, level, read)
    text = h.text
    if isinstance(c, Correction):
        run.w.sizes.cut(h.size, "+", UNIT, run.w.sizes.new("G"))
    elif word := full_weights(run.w, h.size, read):

        def spread(y: Value) -> Value:
            return Value(level.over(run.w, f"({word} {level.at(y.text)} : {vector(run.w, read)})"), read)

        text = f"(I_after {run.function(h.size, level, spread)[0]} {text})"
    u = f"(each_weighing {u})" if level.joint else u
    name = "I_self_weighted_through" if through else "I_self_weighted"
    return Tree(f"({name} {u} {beside} {found.text} {text})", (found.params, h.params), out)


def _weighing(run: Run, c: SelfWeighted, level: Level, size: Any, carried: Any) -> tuple[Any, Any, str, str]:
    """(the size of what comes out, that of what the weights read, how they weigh, what stands beside the carrier)."""

    def beside(x: Value) -> Value:
        if isinstance(c, Correction):
            return run.state(c.prediction, x, level)
        if isinstance(c, Collapse) and isinstance(c.values, Spread):
            streams, b = (run.state(part, x, level) for part in c.values.children()[:2])
            return Value(level.over(run.w, f"({level.at(streams.text)}, {level.at(b.text)})"), streams.size)
        return Value(level.over(run.w, "tt"), None)

    text, held = run.function(size, level, beside)
    if isinstance(c, Correction):
        return carried, carried, "correction", text
    assert isinstance(c, Collapse)
    least = number(c.least, c.describe())
    if isinstance(c.values, Spread):
        return carried, held, f"(written_streams {least})", text
    return carried.size, carried, f"(streams {least})", text
