"""Values with weights of their own: fix the weights to the target's, ask the carrier for the rest, then move the weights there."""

from dataclasses import replace
from itertools import product

from controllability.arrays import Array, arithmetic
from controllability.components.collapse import SelfWeighted
from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Component, Condition, Path, Place
from controllability.rules.base import (
    Attempt,
    Failure,
    Rule,
    Schema,
    Search,
    Side,
    Step,
    Target,
    construct,
    disturbs,
    target_output,
)
from controllability.rules.schema import Assumed, Unknown, schema

FEW = 2  # derivations of one part that are combined with those of the other
CANCEL = "nothing that the carrier writes comes out here: patch another token, or steer after the collapse"


class InputSelfWeighted(Rule):
    """c(V, w(V)) with w(V) fixed to the target's, which makes c affine in the carrier's output."""

    name, side = "I-self-weighted", "input"
    about = SelfWeighted
    statement = "Σ_n w_n(V)∘V_n, or p + g(a)(a − p): weights that read what they weigh"
    when = "the weights are input-controllable, the carrier output-controllable, and what weighs its output is not 0"
    patch = "the carrier's, to what gives the target with the target's weights; the weights', to these"
    source = "theory 8 (new)"
    claim = "exact at the logits: what the head reads is the target's; the streams themselves, in every layer, are not"

    def derive(self, place: Place, prover: Search) -> Attempt:
        component = place.component
        assert isinstance(component, SelfWeighted)
        carrier, weights, found = _carrier(place), place.parts()[-1], Attempt()
        moves = prover.attempt(weights, "input")
        carried = prover.attempt(carrier, "output")
        if prover.via == "input-output":
            carried = Attempt([*prover.attempt(carrier, "through").steps[:FEW], *carried.steps], carried.failures)
        for part, attempt in ((carrier, carried), (weights, moves)):
            if not attempt.steps:
                reason, hint = "this part is not controllable", "end it with a linear map"
                found.failures.append(Failure(part, self.name, reason, hint, tuple(attempt.failures)))
        condition = Condition(component.nonzero, place.describe(), hint=CANCEL)
        rest = [p for p in _beside(place, carrier) if p.path != weights.path]
        for one, two in product(carried.steps[: 2 * FEW], moves.steps[:FEW]):
            twice = disturbs(one.moved, weights, *rest) + disturbs(two.moved, *place.parts()[:-1])
            found.add(self, place, (one, two), twice, conditions=(condition,))
        return found

    def schema(self, step: Step) -> Schema:
        component = step.place.component
        assert isinstance(component, SelfWeighted)
        known, weights = component.shapes, (len(component.children()) - 1,)
        sides: dict[Path, Side] = {component.carrier: step.premises[0].rule.side, weights: "input"}

        def undefined(part: Component, path: Path) -> Component:
            if path not in known:
                return part.map_children(lambda i, child: undefined(child, (*path, i)))
            name = f"f{''.join(map(str, path))}"
            return Assumed(name, *known[path], sides[path]) if path in sides else Unknown(name, *known[path])

        return schema(undefined(component, ()), component.carrier, weights)

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        component, at = step.place.component, step.place.path
        assert isinstance(component, SelfWeighted)
        carried, weighted = step.premises
        goal_of_weights = target_output(weighted, run)

        def value(path: Path) -> Array:
            own = path == component.carrier
            return run.raw_of(carried.place) if own else run.output((*at, *path))

        def goal() -> Array:
            out, weights = wanted(), goal_of_weights()
            xp = arithmetic(out, weights)
            out, weights = xp.lift(out), xp.lift(weights)
            room = component.weighed(weights, value)
            run.check(replace(step.conditions[0], margin=lambda x, _: xp.smallest(x)), room, room)
            return xp.name(component.asked(out, weights, value))

        construct(carried, run, goal)
        construct(weighted, run, goal_of_weights)


def _carrier(place: Place) -> Place:
    component = place.component
    assert isinstance(component, SelfWeighted)
    for index in component.carrier:
        place = place.parts()[index]
    return place


def _beside(place: Place, carrier: Place) -> list[Place]:
    """The parts of ``place`` that the carrier is none of, those beside it further down included."""
    if place.path == carrier.path:
        return []
    depth = len(place.path)
    return [
        p
        for part in place.parts()
        for p in ([part] if carrier.path[depth] != part.path[-1] else _beside(part, carrier))
    ]
