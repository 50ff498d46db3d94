"""The rule table, once: what each rule concludes, from which premises, and how it constructs.

A rule turns sub-derivations into a derivation (``derive``) and, when a proof is executed, passes
the wanted output of its place on to its premises (``construct``).  The leaves' own rules
(I-linear, O-scale, …) state their formulas beside the component; here they only enter the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from typing import TYPE_CHECKING, Literal

from controllability import routes
from controllability.arrays import Array, arithmetic
from controllability.components.combinators import Identity, Product, Sequence, Sum
from controllability.components.normalisation import Normalize
from controllability.components.scale import Scale
from controllability.components.times import Times
from controllability.deltas import Delta, Shift
from controllability.interfaces import (
    Bijection,
    Component,
    Condition,
    InputControllable,
    OutputControllable,
    Param,
    Steering,
    overlap,
)
from controllability.trace import Goal, PatchedRun, Place

if TYPE_CHECKING:
    from controllability.prover import Prover

Side = Literal["input", "output"]
Wanted = Callable[[], Array]
LAST_RESORT = 3  # cost of the ball route where another one was asked for
MOST = 8  # derivations kept at one place: alternatives for numbers on which the first one fails


@dataclass(frozen=True)
class Step:
    """A node of a proof: a rule applied at a place, from premises, moving some parameters.

    ``cost`` orders alternatives: 0 moves weights, 1 a bias, 2 a scale whose condition is fragile.
    """

    rule: Rule
    place: Place
    premises: tuple[Step, ...] = ()
    moved: frozenset[Param] = frozenset()
    conditions: tuple[Condition, ...] = ()
    cost: int = 0
    note: str = ""
    steering: Steering | None = field(default=None, compare=False)

    def walk(self) -> Iterator[Step]:
        """This step and every step below it."""
        yield self
        for premise in self.premises:
            yield from premise.walk()


@dataclass(frozen=True)
class Failure:
    """Why a rule does not apply at a place; ``because`` are the failures below it."""

    place: Place
    rule: str
    reason: str
    hint: str
    because: tuple[Failure, ...] = ()
    weight: int = 0


@dataclass
class Attempt:
    """The derivations found at a place, best first, and what failed."""

    steps: list[Step] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Rule(ABC):
    """One row of the table.  ``statement``, ``when`` and ``patch`` are what a reader sees."""

    name: str
    side: Side
    statement: str
    when: str
    patch: str
    source: str

    @abstractmethod
    def derive(self, place: Place, prover: Prover) -> Attempt:
        """Every way in which this rule concludes its side at ``place``."""

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        """Pass the wanted output on.  By default to the only premise."""
        construct(step.premises[0], run, wanted)


def construct(step: Step, run: PatchedRun, wanted: Wanted) -> None:
    """Execute ``step``: announce to ``run`` which leaves are steered and to what."""
    step.rule.construct(step, run, wanted)


def _disturbs(moved: frozenset[Param], *places: Place) -> tuple[Param, ...]:
    return tuple(p for place in places for p in overlap(moved, place.component.parameters()))


def _shared(place: Place, rule: str, params: tuple[Param, ...]) -> Failure:
    names = ", ".join(dict.fromkeys(map(str, params)))
    return Failure(
        place, rule, f"parameter {names} is used twice: moving it for one use would change the other",
        f"untie {names}, or leave it out of the patch (frozen=...)", weight=2,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ leaves


class LeafRule(Rule):
    """A component's own rule: the table entry for what the component file states."""

    def __init__(self, name: str, side: Side, statement: str, when: str, patch: str, source: str, cost: int) -> None:
        self.name, self.side, self.statement, self.when = name, side, statement, when
        self.patch, self.source, self.cost = patch, source, cost

    def derive(self, place: Place, prover: Prover) -> Attempt:
        leaf = place.component
        steerings: tuple[Steering, ...] = ()
        if self.side == "input" and isinstance(leaf, InputControllable):
            steerings = leaf.input_steerings()
        if self.side == "output" and isinstance(leaf, OutputControllable):
            steerings = leaf.output_steerings()
        found = Attempt()
        for steering in steerings:
            if steering.rule != self.name:
                continue
            if self.name == "O-scale" and place.path in prover.normalised and prover.route not in ("auto", "scale"):
                reason = f"the scale of a normalised output may move alone on route scale only, not on {prover.route}"
                found.failures.append(Failure(place, self.name, reason, "ask for route='auto' or 'scale'", weight=1))
                continue
            if prover.is_frozen(steering.param):
                reason, hint = f"{steering.param} may not move (frozen)", f"allow {steering.param} to move"
                found.failures.append(Failure(place, self.name, reason, hint, weight=1))
                continue
            found.steps.append(
                Step(self, place, (), frozenset({steering.param}), steering.conditions, self.cost, "", steering)
            )
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        assert step.steering is not None
        run.steer(step.place.path, Goal(step.steering, wanted))


# ------------------------------------------------------------------------------------- input side


class InputConstant(Rule):
    """A part that nothing has to be done for, inside a tuple: it does not see the input."""

    name, side = "I-constant", "input"
    statement = "a component that does not depend on its input"
    when, patch, source = "always", "none", "theory 2"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        constant = getattr(place.component, "constant", False)
        return Attempt([Step(self, place)] if constant else [])

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        return None


class InputBefore(Rule):
    """f∘p with p fixed."""

    name, side = "I-before", "input"
    statement = "f∘p, p fixed"
    when, patch, source = "f is input-controllable at (p(z), p(z'))", "that of f", "[G] s.5"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sequence):
            return Attempt()
        last = len(place.component.parts) - 1
        before, f = place.slice(0, last), place.parts()[last]
        attempt = prover.attempt(f, "input")
        found = Attempt(failures=list(attempt.failures))
        for step in attempt.steps:
            if twice := _disturbs(step.moved, before):
                found.failures.append(_shared(place, self.name, twice))
            else:
                found.steps.append(Step(self, place, (step,), step.moved, cost=step.cost, note=before.describe()))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        outlet = step.premises[0].place.outlet
        construct(step.premises[0], run, lambda: run.target.output(outlet))


class InputAfter(Rule):
    """q∘f with q fixed."""

    name, side = "I-after", "input"
    statement = "q∘f, q fixed"
    when, patch, source = "f is input-controllable", "that of f", "[G] s.5"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sequence):
            return Attempt()
        last = len(place.component.parts) - 1
        f, after = place.slice(0, last), place.parts()[last]
        attempt = prover.attempt(f, "input")
        found = Attempt(failures=list(attempt.failures))
        for step in attempt.steps:
            if twice := _disturbs(step.moved, after):
                found.failures.append(_shared(place, self.name, twice))
            else:
                found.steps.append(Step(self, place, (step,), step.moved, cost=step.cost, note=after.describe()))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        outlet = step.premises[0].place.outlet
        construct(step.premises[0], run, lambda: run.target.output(outlet))


class InputCombine(Rule):
    """q(f₁, …, f_k) with disjoint parameters: I-tuple, then I-after with q the sum or product."""

    name, side = "I-combine", "input"
    statement = "q(f₁, …, f_k), disjoint parameters (I-tuple, then I-after)"
    when, patch, source = "every f_i is input-controllable", "the union", "[G] s.5"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sum | Product):
            return Attempt()
        parts = place.parts()
        attempts = [prover.attempt(part, "input") for part in parts]
        failures = [
            Failure(
                part,
                self.name,
                "this part is not input-controllable",
                "give it a linear map before it",
                tuple(a.failures),
            )
            for part, a in zip(parts, attempts, strict=True)
            if not a.steps
        ]
        if failures:
            return Attempt(failures=failures)
        found = Attempt()
        for steps in islice(product(*(a.steps for a in attempts)), MOST * MOST):
            twice = _meet(steps, parts)
            if twice:
                found.failures.append(_shared(place, self.name, twice))
                continue
            moved = frozenset[Param]().union(*(s.moved for s in steps))
            found.steps.append(Step(self, place, steps, moved, cost=max(s.cost for s in steps)))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        for premise in step.premises:
            outlet = premise.place.outlet
            construct(premise, run, lambda outlet=outlet: run.target.output(outlet))


def _meet(steps: tuple[Step, ...], parts: tuple[Place, ...]) -> tuple[Param, ...]:
    return tuple(
        p for i, step in enumerate(steps) for j, part in enumerate(parts) if i != j for p in _disturbs(step.moved, part)
    )


# ----------------------------------------------------------------------------- the two theorems


class Theorem1(Rule):
    """s + g∘f: steer f on the input side, then g on the output side by s(v') − s(v)."""

    name, side = "theorem-1", "input"
    statement = "s + g∘f, disjoint parameters"
    when = "f is input-controllable at (v, v') and g output-controllable at f(v')"
    patch = "θ' of f; then φ' of g with δ = s(v') − s(v), s read after the input patch"
    source = "[G, Thm 5]"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sum) or prover.via != "input-output":
            return Attempt()
        found = Attempt()
        for branch in place.parts():
            others = tuple(p for p in place.parts() if p.path != branch.path)
            if isinstance(branch.component, Sequence):
                for split in reversed(range(1, len(branch.component.parts))):  # the largest f first
                    self._split(place, branch, others, split, prover, found)
            elif not isinstance(branch.component, Identity):
                outer = prover.attempt(branch, "output")
                reason = "the branch is one component: there is no inner function before the outer one"
                found.failures.append(
                    Failure(branch, self.name, reason, "ask for via='output' (Theorem 1b)", tuple(outer.failures))
                )
        return found

    def _split(
        self, place: Place, branch: Place, others: tuple[Place, ...], split: int, prover: Prover, found: Attempt
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
            twice = _disturbs(one.moved, outer) + _disturbs(two.moved, inner, *others)
            if twice:
                found.failures.append(_shared(place, self.name, twice))
                continue
            note = f"f = {inner.describe()};  g = {outer.describe()}"
            cost = one.cost + two.cost
            found.steps.append(Step(self, place, (one, two), one.moved | two.moved, cost=cost, note=note))

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        inner, outer = step.premises
        construct(inner, run, lambda: run.target.output(inner.place.outlet))
        construct(outer, run, _rest_of_sum(step, outer, run, wanted))


class Theorem1b(Rule):
    """s + g: steer g at the source activation, whether or not anything before it can be steered."""

    name, side = "theorem-1b", "input"
    statement = "s + g"
    when = "g is output-controllable at the source activation"
    patch = "φ' of g with δ = s(v') − s(v) + g(v') − g(v)"
    source = "theory 1b (new)"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sum) or prover.via != "output":
            return Attempt()
        inner = OutputSum().derive(place, prover)
        steps = [Step(self, place, s.premises, s.moved, cost=s.cost) for s in inner.steps]
        return Attempt(steps, inner.failures)

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        construct(step.premises[0], run, _rest_of_sum(step, step.premises[0], run, wanted))


def _rest_of_sum(step: Step, moved: Step, run: PatchedRun, wanted: Wanted) -> Wanted:
    """What the moved term must give: the wanted sum less the other terms, as they are now."""
    inside = moved.place.outlet[: len(step.place.path) + 1]
    others = [part.outlet for part in step.place.parts() if part.path != inside]

    def rest() -> Array:
        value = wanted()
        xp = arithmetic(value)
        value = xp.lift(value)
        for outlet in others:
            value = value - xp.lift(run.output(outlet))
        return xp.name(value)

    return rest


def _no_outer(branch: Place, rule: str, attempt: Attempt) -> Failure:
    last = branch.parts()[-1].describe()
    reason = f"the outer function ends in {last}, and no parameter after or before it can move the output everywhere"
    return Failure(branch, rule, reason, "end the branch with a linear map, a scale or a bias", tuple(attempt.failures))


# ------------------------------------------------------------------------------------ output side


class OutputAfterFixed(Rule):
    """g∘p with p fixed."""

    name, side = "O-after-fixed", "output"
    statement = "g∘p, p fixed"
    when, patch, source = "g is output-controllable at p(y)", "that of g", "[G] s.5"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sequence):
            return Attempt()
        last = len(place.component.parts) - 1
        before, g = place.slice(0, last), place.parts()[last]
        attempt = prover.attempt(g, "output")
        found = Attempt(failures=list(attempt.failures))
        for step in attempt.steps:
            if twice := _disturbs(step.moved, before):
                found.failures.append(_shared(place, self.name, twice))
            else:
                found.steps.append(Step(self, place, (step,), step.moved, cost=step.cost, note=before.describe()))
        return found


def _is_rms(component: Component) -> bool:
    return isinstance(component, Normalize) and component.kind == "rms"


class OutputThroughBijection(Rule):
    """q∘g with q a bijection onto its image and the target in the image."""

    name, side = "O-through-bijection", "output"
    statement = "q∘g, q a bijection onto its image"
    when = "g is output-controllable and the target lies in the image of q"
    patch, source = "g reaches q⁻¹(q(g(y)) + δ)", "theory 2"

    def applies(self, q: Place) -> bool:
        """Whether this rule (and not a special case of it) undoes ``q``."""
        return isinstance(q.component, Bijection) and not isinstance(q.component, Times)

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sequence):
            return Attempt()
        last = len(place.component.parts) - 1
        inner, q = place.slice(0, last), place.parts()[last]
        if not self.applies(q):
            return Attempt()
        assert isinstance(q.component, Bijection)
        attempt = prover.attempt(inner, "output")
        found = Attempt(failures=list(attempt.failures))
        for step in attempt.steps:
            if twice := _disturbs(step.moved, q):
                found.failures.append(_shared(place, self.name, twice))
                continue
            conditions = q.component.image_conditions()
            found.steps.append(Step(self, place, (step,), step.moved, conditions, step.cost, q.describe()))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        q = step.place.parts()[-1].component
        assert isinstance(q, Bijection)

        def before() -> Array:
            value = wanted()
            value = arithmetic(value).lift(value)
            for condition in step.conditions:
                room = Condition(condition.statement, condition.where, lambda y, _: q.image_margin(run.params, y))
                run.check(room, value, value)
            return q.invert(run.params, value)

        construct(step.premises[0], run, before)


class OutputTimes(OutputThroughBijection):
    """c·g with a constant c ≠ 0."""

    name = "O-times"
    statement = "c·g, constant c"
    when, patch, source = "c ≠ 0 and g is output-controllable", "g's with δ/c", "theory 2"

    def applies(self, q: Place) -> bool:
        return isinstance(q.component, Times) and q.component.factor != 0


class OutputNormalised(Rule):
    """m∘n(g) with n the RMS normalisation: choose a scale m', then let g reach y* with m'∘n(y*) = G."""

    name, side = "O-normalised", "output"
    statement = "m∘n∘g, n the RMS normalisation"
    when = "g is output-controllable; the route's own condition (theory 4)"
    patch = "m' by the route (auto, secular, uniform, ball); g reaches y* = u·√(r²+ε), u = G/m'"
    source = "[G, App. B]; uniform, ball and auto new"

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sequence) or prover.route == "scale":
            return Attempt()
        parts = place.component.parts
        scaled = isinstance(parts[-1], Scale)
        norm = len(parts) - (2 if scaled else 1)
        if norm < 1 or not _is_rms(parts[norm]):
            return Attempt()
        inner = place.slice(0, norm)
        attempt = prover.attempt(inner, "output")
        found = Attempt(failures=list(attempt.failures))
        scale = parts[-1] if scaled else None
        free = isinstance(scale, Scale) and not prover.is_frozen(scale.weight)
        route = prover.route if free else "ball"
        own = frozenset({scale.weight}) if free and isinstance(scale, Scale) and route != "ball" else frozenset[Param]()
        for step in attempt.steps:
            twice = _disturbs(own, inner) + _disturbs(step.moved, *place.parts()[norm:])
            if twice:
                found.failures.append(_shared(place, self.name, twice))
                continue
            condition = Condition(ROUTE_CONDITIONS[route], place.parts()[-1].describe())
            cost = step.cost if own or prover.route == "ball" else step.cost + LAST_RESORT
            found.steps.append(Step(self, place, (step,), step.moved | own, (condition,), cost, f"route {route}"))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        joint = _Normalised(step, run, wanted)
        construct(step.premises[0], run, joint.before)
        scale = joint.scale_place
        if scale is not None and joint.route != "ball":
            assert isinstance(scale.component, Scale)
            steering = scale.component.output_steerings()[0]
            run.steer(scale.path, Goal(steering, delta=joint.scale_delta))


ROUTE_CONDITIONS = {
    "auto": "some route is open for the target (uniform always is when ε > 0 or the activation is not zero)",
    "secular": "the target and the scale are finite; the hard case leaves dead channels",
    "uniform": "the target and the scale are finite",
    "ball": "mean((G/m)²) < 1: the target lies in the image of the normalisation (ε > 0)",
}


class _Normalised:
    """One execution of O-normalised: solved when first asked for, then remembered."""

    def __init__(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        self.step, self.run, self.wanted = step, run, wanted
        self.route = step.note.removeprefix("route ")
        parts = step.place.parts()
        self.scale_place = parts[-1] if isinstance(parts[-1].component, Scale) else None
        norm = parts[-2 if self.scale_place else -1].component
        assert isinstance(norm, Normalize)
        self.eps = norm.eps
        self.answer: routes.Candidate | None = None

    def solve(self) -> routes.Candidate:
        """The route's answer for these numbers."""
        if self.answer is None:
            self.answer = self._solve()
        return self.answer

    def _solve(self) -> routes.Candidate:
        run = self.run
        G, y = self.wanted(), run.raw_of(self.step.premises[0].place)
        xp = arithmetic(G, y)
        G, y = xp.lift(G), xp.lift(y)
        scale = self.scale_place.component if self.scale_place else None
        if isinstance(scale, Scale):
            m = scale.effective(run.params)
            stored = self._rounding(scale)
        else:
            m, stored = xp.zeros_like(y) + 1, lambda value: value
        where = self.step.place.parts()[-1].describe()
        if self.route == "auto":
            answer, used, why = routes.choose(G, m, y, self.eps, stored)
        else:
            answer, used, why = routes.candidate(self.route, G, m, y, self.eps, stored), self.route, "asked for"
        if not xp.all(answer.open):
            bad = int((~answer.open).reshape(-1).nonzero()[0].reshape(-1)[0])
            run.refuse(self.step.conditions[0], bad, f"route {self.route}", "take route='auto' or 'uniform'")
        run.journal.decisions[where] = used
        run.journal.decisions[f"{where}: why"] = why
        if not xp.exact:
            spread = routes.amplification(answer, G, y, self.eps)
            run.journal.numbers["amplification"] = xp.to_float(xp.max(spread.reshape(-1)).reshape(()))
        return answer

    def _rounding(self, scale: Scale) -> Callable[[Array], Array]:
        """A wanted scale as the parameter will hold it: stored + Δ, exactly as it is applied."""
        params = self.run.params
        current = scale.effective(params)
        if self.route == "ball":
            return lambda value: value
        return lambda value: current + scale.to_scale(params, value).value

    def before(self) -> Array:
        """y*, what must enter the normalisation."""
        return self.solve().before

    def scale_delta(self) -> Delta:
        """Δm, in stored form."""
        assert self.scale_place is not None
        scale = self.scale_place.component
        assert isinstance(scale, Scale)
        delta = self.solve().scale - scale.effective(self.run.params)
        return Shift(delta)


class OutputSum(Rule):
    """g₁ + g₂ with one of them output-controllable, the other not reading what it moves."""

    name, side = "O-sum", "output"
    statement = "g₁ + … + g_k"
    when, patch, source = (
        "one term is output-controllable and the others do not read what it moves",
        "that term's",
        "theory 2",
    )

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Sum):
            return Attempt()
        found = Attempt()
        for term in place.parts():
            others = [p for p in place.parts() if p.path != term.path]
            attempt = prover.attempt(term, "output")
            if not isinstance(term.component, Identity):
                found.failures += attempt.failures
            for step in attempt.steps:
                if twice := _disturbs(step.moved, *others):
                    found.failures.append(_shared(place, self.name, twice))
                else:
                    found.steps.append(Step(self, place, (step,), step.moved, cost=step.cost))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        construct(step.premises[0], run, _rest_of_sum(step, step.premises[0], run, wanted))


class OutputFactor(Rule):
    """p∘g elementwise, p fixed and nowhere zero: g reaches the wanted output divided by p."""

    name, side = "O-factor", "output"
    statement = "p(y) ∘ g(y), p fixed"
    when, patch, source = (
        "g is output-controllable, no entry of p(y) is zero",
        "g's with δ/p(y)",
        "O-times, entry by entry (new)",
    )

    def derive(self, place: Place, prover: Prover) -> Attempt:
        if not isinstance(place.component, Product):
            return Attempt()
        found = Attempt()
        for factor in place.parts():
            others = [p for p in place.parts() if p.path != factor.path]
            attempt = prover.attempt(factor, "output")
            found.failures += attempt.failures
            for step in attempt.steps:
                if twice := _disturbs(step.moved, *others):
                    found.failures.append(_shared(place, self.name, twice))
                    continue
                names = " * ".join(p.describe() for p in others)
                condition = Condition(
                    f"no entry of the other factor ({names}) is zero", place.describe(), _smallest_entry
                )
                cost = max(step.cost, 2)
                found.steps.append(Step(self, place, (step,), step.moved, (condition,), cost))
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        inside = step.premises[0].place.outlet[: len(step.place.path) + 1]
        others = [part.outlet for part in step.place.parts() if part.path != inside]

        def quotient() -> Array:
            value = wanted()
            xp = arithmetic(value)
            for outlet in others:
                factor = xp.lift(run.output(outlet))
                run.check(step.conditions[0], factor, factor)
                value = xp.lift(value) / factor
            return value

        construct(step.premises[0], run, quotient)


def _smallest_entry(x: Array, gap: Array) -> Array:
    return arithmetic(x).smallest(x)


def _leaf_rules() -> tuple[LeafRule, ...]:
    return (
        LeafRule("I-linear", "input", "z ↦ W z (+ b)", "z ≠ 0", "ΔW = W(z'−z) zᵀ/‖z‖²", "[D] Thm 2.2", 0),
        LeafRule("I-bias", "input", "z ↦ f(z) + b", "always", "Δb = f(z') − f(z)", "theory 2", 1),
        LeafRule("I-scale", "input", "z ↦ m∘z", "z'_i = 0 or m_i = 0 wherever z_i = 0", "Δm = m∘(z'−z)/z", "[G] norm lemma", 2),
        LeafRule("O-linear", "output", "y ↦ W y (+ b)", "y ≠ 0", "ΔW = δ yᵀ/‖y‖²", "[G] lem:output_weight", 0),
        LeafRule("O-bias", "output", "y ↦ … + b", "always", "Δb = δ", "[G] lem:output_bias", 1),
        LeafRule("O-scale", "output", "y ↦ m∘y", "no y_i is 0 where δ_i ≠ 0", "Δm = δ/y", "[G] lem:output_elem_multiply", 2),
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    *_leaf_rules(), InputConstant(), InputBefore(), InputAfter(), InputCombine(), Theorem1(), Theorem1b(),
    OutputAfterFixed(), OutputThroughBijection(), OutputTimes(), OutputNormalised(), OutputSum(), OutputFactor(),
)  # fmt: skip
