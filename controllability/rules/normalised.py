"""The normalised output m∘n(g): a new scale and a new input of the normalisation, together."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from controllability.arrays import Array, arithmetic
from controllability.arrays.lazy import sympy
from controllability.components.normalisation import Normalize
from controllability.components.scale import Scale
from controllability.deltas import Delta, Shift
from controllability.errors import SideConditionFailed
from controllability.execution.journal import Margin
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Component, Condition, OutputControllable, Param, Place, Sequence, Update
from controllability.rules.base import Attempt, Rule, Schema, Search, Side, Step, Target, construct, disturbs
from controllability.rules.schema import Assumed, schema
from controllability.solvers import norm_scale as routes

LAST_RESORT = 3  # cost of the ball route where another one was asked for


class NewScale(NamedTuple):
    """A scale m', and what must enter the normalisation for it, y*."""

    scale: Array
    before: Array


class Solution(ABC):
    """One execution of the rule: m' and y* are solved for when somebody first asks, and then remembered."""

    def __init__(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        self.step, self.run, self.wanted = step, run, wanted
        parts = step.place.parts()
        self.place = parts[-1]
        last = self.place.component
        self.scale = last if isinstance(last, Scale) else None
        norm = parts[-1 if self.scale is None else -2].component
        assert isinstance(norm, Normalize)
        self.eps = norm.eps

    @abstractmethod
    def solve(self, G: Array, y: Array) -> NewScale:
        """m' and y* for what must come out and what enters the normalisation without them."""

    @cached_property
    def answer(self) -> NewScale:
        """m' and y*."""
        run, inner = self.run, self.step.premises[0].place
        # through: the inner functions are those of the target run, and so is what enters the normalisation
        through = self.step.rule.side == "through"
        G, y = self.wanted(), run.target.output(inner.outlet) if through else run.raw_of(inner)
        xp = arithmetic(G, y)
        return self.solve(xp.lift(G), xp.lift(y))

    @cached_property
    def m(self) -> Array:
        """The effective scale as it is."""
        assert self.scale is not None
        return self.scale.effective(self.run.params)

    def stored(self, wanted: Array, side: int = 0) -> Array:
        """A wanted scale as the parameter will hold it, stored + Δ: the nearest value, or the next one on a ``side``."""
        assert self.scale is not None
        return self.m + self.scale.to_scale(self.run.params, wanted, side).value

    def before(self) -> Array:
        """y*, what must enter the normalisation."""
        return self.answer.before

    def scale_delta(self) -> Delta:
        """Δm, in stored form."""
        return Shift(self.answer.scale - self.m)


class OneToken(Solution):
    """Every token has a scale of its own, by a route."""

    def solve(self, G: Array, y: Array) -> NewScale:
        xp, route = arithmetic(G, y), self.step.route
        G, y = xp.name(G), xp.name(y)
        m = xp.zeros_like(y) + 1 if self.scale is None else xp.name(self.m)
        given = (G, m, y, self.eps, self.stored)
        answer = routes.choose(*given) if route == "auto" else routes.candidate(route, *given)
        if not xp.all(answer.open):
            raise self._closed(answer, G, y)
        margin = routes.room(answer) if route == "ball" else None
        self.run.journal.margins.append(Margin(self.step.conditions[0], margin))
        spread = None if xp.exact else routes.amplification(answer, G, y, self.eps)
        why = "the least amplification of noise, nearly" if route == "auto" else "asked for"
        self.run.journal.took(self.place.describe(), answer.route, lambda: why, spread)
        return NewScale(answer.scale, arithmetic(answer.before).name(answer.before))

    def _closed(self, answer: routes.Candidate, G: Array, y: Array) -> SideConditionFailed:
        """What to say of the first token for which no route is open."""
        xp, where, route = arithmetic(G, y), self.place.describe(), self.step.route
        bad, tokens = int((~answer.open).reshape(-1).nonzero()[0].reshape(-1)[0]), tuple(answer.open.shape[:-1])
        if not xp.exact and not xp.all(xp.is_zero((G + y) * 0)):
            hint = "the layer overflows on this input: take another dtype"
            finite = Condition("the activations around the normalisation are finite", where, hint=hint)
            return finite.failed(None, bad, tokens)
        left = None
        if route == "ball":
            left = xp.to_float((1 - xp.mean(answer.unit * answer.unit)).reshape(-1)[bad])
        return self.step.conditions[0].failed(left, bad, tokens, f"route {route}")


class OutputNormalised(Rule):
    """m∘n(g) with n the RMS normalisation: choose a scale m', then let g reach y* with m'∘n(y*) = G."""

    name = "O-normalised"
    statement = "m∘n∘g, n the RMS normalisation"
    when = "g is output-controllable; the route's own condition (theory 4)"
    patch = "m' by the route (auto, secular, uniform, ball); g reaches y* = u·√(r²+ε), u = G/m'"
    source = "[G, App. B]; uniform, ball and auto new"
    about = Sequence
    kind = "rms"
    jointly: bool | None = False
    solution: type[Solution] = OneToken

    def __init__(self, side: Side = "output") -> None:
        self.side = side  # "through": the same with g controllable through

    def derive(self, place: Place, prover: Search) -> Attempt:
        if prover.route == "scale":
            return Attempt()
        parts = place.component.children()
        scaled = isinstance(parts[-1], Scale)
        norm = len(parts) - (2 if scaled else 1)
        if norm < 1 or parts[norm].normalises != self.kind:
            return Attempt()
        inner = place.slice(0, norm)
        attempt = prover.attempt(inner, self.side)
        found = Attempt(failures=list(attempt.failures))
        scale = parts[-1] if scaled and place.parts()[-1].path not in prover.per_expert_rows else None
        free = isinstance(scale, Scale) and not prover.is_frozen(scale.weight)
        route = prover.route if free else "ball"
        own = frozenset({scale.weight}) if free and isinstance(scale, Scale) and route != "ball" else frozenset[Param]()
        for step in attempt.steps:
            twice = disturbs(own, inner) + disturbs(step.moved, *place.parts()[norm:])
            hint = _advice(prover.route, route, scale)
            condition = Condition(ROUTE_CONDITIONS[route], place.parts()[-1].describe(), hint=hint)
            cost = step.cost if own or prover.route == "ball" else step.cost + LAST_RESORT
            found.add(self, place, (step,), twice, own, conditions=(condition,), cost=cost, route=route)
        return found

    def schema(self, step: Step) -> Schema:
        parts = step.place.component.children()
        scaled = isinstance(parts[-1], Scale)
        norm = Normalize("rms", sympy.Symbol("epsilon", positive=True))
        return schema(Sequence.of(Assumed("g", side=self.side), norm, *parts[-1:] if scaled else ()), (0,))

    def variants(self, step: Step) -> dict[str, Step]:
        taken = ("balanced", "uniform", "secular", "ball", "scale") if step.route == "auto" else (step.route,)
        return {f"route {r}": replace(step, route=r) for r in taken}

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        found = self.solution(step, run, wanted)
        construct(step.premises[0], run, found.before)
        if found.scale is not None and step.route != "ball" and not (run.joint and run.joint.damping is not None):
            run.steer(found.place.path, Goal(found.scale.output_updates()[0], change=found.scale_delta))


def scale_update(scale: Component) -> Update:
    """How a scale is moved."""
    assert isinstance(scale, OutputControllable)
    return scale.output_updates()[0]


ROUTE_CONDITIONS = {
    "auto": "some route is open for the target (uniform always is when ε > 0 or the activation is not zero)",
    "secular": "the target and the scale are finite; the hard case leaves dead channels",
    **dict.fromkeys(("balanced", "uniform"), "the target and the scale are finite"),
    "ball": "mean((G/m)²) < 1: the target lies in the image of the normalisation (ε > 0)",
}


def _advice(asked: str, route: str, scale: Component | None) -> str:
    """What helps where a route is closed."""
    if route != "ball":
        return "the numbers around the normalisation are too large to be squared: take another dtype"
    inside = "with the scale as it is only targets with mean((G/m)²) < 1 are reached"
    if asked == "ball":
        return f"{inside}: take route='auto' or 'balanced', which move a scale after the norm"
    if isinstance(scale, Scale):
        return f"{inside}: let {scale.weight} move"
    return f"{inside}: let a scale after the norm move, or add a bias after it"
