"""Theorem 1 inside a branch: inner functions as in the target run, and the output wherever it is wanted.

A component is controllable *through* when a patch gives its inner functions the values of the target run
and its output any wanted value.  For g∘f that is Theorem 1's own split; these rules carry it through sums
(shared experts beside routed ones), fixed maps before and what the output side can undo after.
"""

from itertools import product

from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Place, Sequence, Sum
from controllability.rules.base import (
    Attempt,
    Rule,
    Schema,
    Search,
    Step,
    Target,
    construct,
    disturbs,
    lifted,
    rest_of_sum,
    target_output,
)
from controllability.rules.schema import Assumed, Unknown, index_of, schema, terms

FEW = 2  # derivations of one term that are combined with those of the others


class ThroughSplit(Rule):
    """g∘f: f on the input side, g on the output side."""

    name, side = "T-split", "through"
    about = Sequence
    statement = "g∘f, disjoint parameters"
    when = "f is input-controllable and g output-controllable"
    patch, source = "that of f; then that of g", "[G, Thm 5]"

    def derive(self, place: Place, prover: Search) -> Attempt:
        count, found = len(place.component.children()), Attempt()
        for split in reversed(range(1, count)):
            inner, outer = place.slice(0, split), place.slice(split, count)
            g = prover.attempt(outer, "output")
            f = prover.attempt(inner, "input") if g.steps else Attempt()
            for one, two in product(f.steps, g.steps):
                twice = disturbs(one.moved, outer) + disturbs(two.moved, inner)
                note = "" if twice else f"f = {inner.describe()};  g = {outer.describe()}"
                found.add(self, place, (one, two), twice, note=note)
        return found

    def schema(self, step: Step) -> Schema:
        return schema(Sequence.of(Assumed("f"), Assumed("g", side="output")), (0,), (1,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        inner, outer = step.premises
        construct(inner, run, target_output(inner, run))
        construct(outer, run, wanted)


class ThroughBefore(Rule):
    """c∘p with p fixed."""

    name, side = "T-before", "through"
    about = Sequence
    statement = "c∘p, p fixed"
    when, patch, source = "c is controllable through", "that of c", "[G] s.5"

    def derive(self, place: Place, prover: Search) -> Attempt:
        before, rest = place.parts()[0], place.slice(1, len(place.component.children()))
        return lifted(self, place, rest, (before,), prover.attempt(rest, "through"), note=before.describe())

    def schema(self, step: Step) -> Schema:
        return schema(Sequence.of(Unknown("p"), Assumed("c", side="through")), (1,))


class ThroughSum(Rule):
    """f₁ + … + f_k: one term is carried through, the others are given the values of the target run."""

    name, side = "T-sum", "through"
    about = Sum
    statement = "f₁ + … + f_k, disjoint parameters"
    when = "one term is controllable through; terms that are input-controllable are steered, others left as they are"
    patch, source = "the union; the first term makes up for the others", "[G, Thm 5] (new for several branches)"

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = Attempt()
        for carrier in reversed(place.parts()):  # a live model computes the last term last: nothing is missing then
            others = [p for p in place.parts() if p.path != carrier.path]
            attempt = prover.attempt(carrier, "through")
            found.failures += attempt.failures if not carrier.component.is_skip else []
            inside = {other: prover.attempt(other, "input").steps for other in others}
            beside = [(other, min(steps, key=_earliest)) for other, steps in inside.items() if steps]
            twice = tuple(
                p
                for other, step in beside
                for p in disturbs(step.moved, *(part for part in place.parts() if part.path != other.path))
            )
            for step in attempt.steps[:FEW]:
                premises, cost = (step, *(s for _, s in beside)), max((s.cost for _, s in beside), default=0)
                found.add(self, place, premises, twice + disturbs(step.moved, *others), cost=step.cost + cost)
        return found

    def schema(self, step: Step) -> Schema:
        carrier, *beside = (index_of(step, p.place) for p in step.premises)
        assumed = {i: Assumed(f"f{i + 1}") for i in beside} | {carrier: Assumed("c", side="through")}
        return schema(Sum(terms(step, {**assumed})), (carrier,), *((i,) for i in beside))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        carrier, *beside = step.premises
        for other in beside:
            construct(other, run, target_output(other, run))
        construct(carrier, run, rest_of_sum(step, carrier, run, wanted))


def _earliest(step: Step) -> tuple[int, tuple[int, ...]]:
    """Among the cheapest derivations, the one that steers what comes first."""
    return step.cost, min((s.place.path for s in step.walk() if s.update is not None), default=())
