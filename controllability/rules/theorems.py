"""The two theorems: how a residual block is patched."""

from itertools import product

from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Component, Param, Place, Product, Sequence, Steerable, Sum
from controllability.rules.base import (
    Attempt,
    Failure,
    Rule,
    Schema,
    Search,
    Step,
    Target,
    construct,
    disturbs,
    rest_of_sum,
    target_output,
)
from controllability.rules.output_side import OutputSum
from controllability.rules.schema import Assumed, index_of, schema, terms


class Theorem1(Rule):
    """s + g∘f: steer f on the input side, then g on the output side by s(v') − s(v)."""

    name, side = "theorem-1", "input"
    about = Sum
    statement = "s + g∘f, disjoint parameters"
    when = "f is input-controllable at (v, v') and g output-controllable at f(v')"
    patch = "θ' of f; then φ' of g with δ = s(v') − s(v), s read after the input patch"
    source = "[G, Thm 5]"

    def derive(self, place: Place, prover: Search) -> Attempt:
        if prover.via != "input-output":
            return Attempt()
        found = Attempt()
        for branch in place.parts():
            others = tuple(p for p in place.parts() if p.path != branch.path)
            if branches_inside(branch.component):
                self._through(place, branch, others, prover, found)
            if branch.component.sequential:
                for split in reversed(range(1, len(branch.parts()))):  # the largest f first
                    self._split(place, branch, others, split, prover, found)
            elif not branch.component.is_skip:
                outer = prover.attempt(branch, "output")
                reason = "the branch is one component: there is no inner function before the outer one"
                found.failures.append(
                    Failure(branch, self.name, reason, "ask for via='output' (Theorem 1b)", tuple(outer.failures))
                )
        return found

    def _split(
        self, place: Place, branch: Place, others: tuple[Place, ...], split: int, prover: Search, found: Attempt
    ) -> None:
        inner, outer = branch.slice(0, split), branch.slice(split, len(branch.component.children()))
        f, g = prover.attempt(inner, "input"), prover.attempt(outer, "output")
        if not g.steps:
            if split == 1:
                found.failures.append(_no_outer(branch, self.name, g))
            return
        if not f.steps:
            if split == len(branch.component.children()) - 1:
                reason = "no part of the inner function is input-controllable"
                hint = "put a linear map before it, or ask for via='output' (Theorem 1b)"
                found.failures.append(Failure(inner, self.name, reason, hint, tuple(f.failures)))
            return
        for one, two in product(f.steps, g.steps):
            twice = disturbs(one.moved, outer) + disturbs(two.moved, inner, *others) + _misread(one.moved, others)
            note = "" if twice else f"f = {inner.describe()};  g = {outer.describe()}"
            found.add(self, place, (one, two), twice, note=note)

    def _through(self, place: Place, branch: Place, others: tuple[Place, ...], prover: Search, found: Attempt) -> None:
        attempt = prover.attempt(branch, "through")
        found.failures += attempt.failures
        for step in attempt.steps:
            found.add(self, place, (step,), disturbs(step.moved, *others))

    def schema(self, step: Step) -> Schema:
        at = index_of(step, step.premises[0].place)
        if len(step.premises) == 1:
            return schema(Sum(terms(step, {at: Assumed("c", side="through")})), (at,))
        branch = Sequence.of(Assumed("f"), Assumed("g", side="output"))
        return schema(Sum(terms(step, {at: branch})), (at, 0), (at, 1))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        if len(step.premises) == 1:
            construct(step.premises[0], run, rest_of_sum(step, step.premises[0], run, wanted))
            return
        inner, outer = step.premises
        construct(inner, run, target_output(inner, run))
        construct(outer, run, rest_of_sum(step, outer, run, wanted))


class Theorem1b(OutputSum):
    """s + g: steer g at the source activation, whether or not anything before it can be steered."""

    name, side = "theorem-1b", "input"
    statement = "s + g"
    when = "g is output-controllable at the source activation"
    patch = "φ' of g with δ = s(v') − s(v) + g(v') − g(v)"
    source = "theory 1b (new)"

    def derive(self, place: Place, prover: Search) -> Attempt:
        if prover.via != "output":
            return Attempt()
        inner = OutputSum().conclude(place, prover)
        steps = [Step(self, place, s.premises, s.moved, cost=s.cost) for s in inner.steps]
        return Attempt(steps, inner.failures)

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        construct(step.premises[0], run, rest_of_sum(step, step.premises[0], run, wanted))


class InputByOutput(Rule):
    """Theorem 1b without a skip: what reaches any output reaches that of the target run."""

    name, side = "I-by-output", "input"
    statement = "g, no sum of a skip and a branch"
    when = "g is output-controllable at the source activation"
    patch = "φ' of g with δ = g(z') − g(z)"
    source = "theory 1b with s = 0 (new)"

    def derive(self, place: Place, prover: Search) -> Attempt:
        component = place.component
        if prover.via != "output" or isinstance(component, Sum) or not component.children():
            return Attempt()
        attempt = prover.attempt(place, "output")
        return Attempt([Step(self, place, (s,), s.moved, cost=s.cost) for s in attempt.steps], attempt.failures)

    def schema(self, step: Step) -> Schema:
        return schema(Assumed("g", side="output"), ())

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        construct(step.premises[0], run, target_output(step.premises[0], run))


def branches_inside(component: Component) -> bool:
    """Whether a branch has branches of its own, in which inner and outer functions stand side by side."""
    side_by_side = component.children() and component.outlet is None and not isinstance(component, Product)
    return bool(side_by_side) or any(map(branches_inside, component.children()))


def _misread(moved: frozenset[Param], others: tuple[Place, ...]) -> tuple[Param, ...]:
    """Moved slices that a skip reads, but not the very same slice in a map that can compute with its patch."""
    reads = [read for place in others for read in _reads(place.component)]
    return tuple(p for p in moved if any(p.overlaps(q) and (p != q or not plainly) for q, plainly in reads))


def _reads(component: Component, plainly: bool = True) -> list[tuple[Param, bool]]:
    """Every parameter that is read, and whether by a map that takes one row a token and a patch for each."""
    here = plainly and isinstance(component, Steerable) and component.takes_patched
    reads = [(q, here) for q in component.own_parameters()]
    for i, child in enumerate(component.children()):
        reads += _reads(child, plainly and i not in component.binds)
    return reads


def _no_outer(branch: Place, rule: str, attempt: Attempt) -> Failure:
    last = branch.parts()[-1].describe()
    reason = f"the outer function ends in {last}, and no parameter after or before it can move the output everywhere"
    return Failure(branch, rule, reason, "end the branch with a linear map, a scale or a bias", tuple(attempt.failures))
