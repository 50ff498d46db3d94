"""The normalised output m∘n(g): a new scale and a new input of the normalisation, together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from controllability.arrays import Array, arithmetic
from controllability.components.normalisation import Normalize
from controllability.components.scale import Scale
from controllability.deltas import Delta, Shift
from controllability.execution.journal import Margin, RouteTaken
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Component, Condition, Param, Place, Sequence
from controllability.rules.base import Attempt, Rule, Schema, Search, Side, Step, Target, construct, disturbs, shared
from controllability.rules.schema import Assumed, schema
from controllability.solvers import norm_scale as routes

LAST_RESORT = 3  # cost of the ball route where another one was asked for


def _is_rms(component: Component) -> bool:
    return isinstance(component, Normalize) and component.kind == "rms"


class OutputNormalised(Rule):
    """m∘n(g) with n the RMS normalisation: choose a scale m', then let g reach y* with m'∘n(y*) = G."""

    name = "O-normalised"
    statement = "m∘n∘g, n the RMS normalisation"
    when = "g is output-controllable; the route's own condition (theory 4)"
    patch = "m' by the route (auto, secular, uniform, ball); g reaches y* = u·√(r²+ε), u = G/m'"
    source = "[G, App. B]; uniform, ball and auto new"
    jointly: bool | None = False

    def __init__(self, side: Side = "output") -> None:
        self.side = side  # "through": the same with g controllable through

    def derive(self, place: Place, prover: Search) -> Attempt:
        if not isinstance(place.component, Sequence) or prover.route == "scale":
            return Attempt()
        parts = place.component.parts
        scaled = isinstance(parts[-1], Scale)
        norm = len(parts) - (2 if scaled else 1)
        if norm < 1 or not _is_rms(parts[norm]):
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
            if twice:
                found.failures.append(shared(place, self.name, twice))
                continue
            hint = _advice(prover.route, route, scale)
            condition = Condition(ROUTE_CONDITIONS[route], place.parts()[-1].describe(), hint=hint)
            cost = step.cost if own or prover.route == "ball" else step.cost + LAST_RESORT
            found.steps.append(Step(self, place, (step,), step.moved | own, (condition,), cost, route=route))
        return found

    def schema(self, step: Step) -> Schema:
        import sympy

        parts = step.place.component.children()
        scaled = isinstance(parts[-1], Scale)
        norm = Normalize("rms", sympy.Symbol("epsilon", positive=True))
        return schema(Sequence.of(Assumed("g", side=self.side), norm, *parts[-1:] if scaled else ()), (0,))

    def variants(self, step: Step) -> dict[str, Step]:
        taken = ("uniform", "secular", "ball", "scale") if step.route == "auto" else (step.route,)
        return {f"route {r}": replace(step, route=r) for r in taken}

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        joint = _Normalised(step, run, wanted)
        construct(step.premises[0], run, joint.before)
        scale = joint.scale_place
        if scale is not None and joint.route != "ball":
            assert isinstance(scale.component, Scale)
            update = scale.component.output_updates()[0]
            run.steer(scale.path, Goal(update, change=joint.scale_delta))


ROUTE_CONDITIONS = {
    "auto": "some route is open for the target (uniform always is when ε > 0 or the activation is not zero)",
    "secular": "the target and the scale are finite; the hard case leaves dead channels",
    "uniform": "the target and the scale are finite",
    "ball": "mean((G/m)²) < 1: the target lies in the image of the normalisation (ε > 0)",
}


def _advice(asked: str, route: str, scale: Component | None) -> str:
    """What helps where a route is closed."""
    if route != "ball":
        return "the numbers around the normalisation are too large to be squared: take another dtype"
    inside = "with the scale as it is only targets with mean((G/m)²) < 1 are reached"
    if asked == "ball":
        return f"{inside}: take route='auto' or 'uniform', which move a scale after the norm"
    if isinstance(scale, Scale):
        return f"{inside}: let {scale.weight} move"
    return f"{inside}: let a scale after the norm move, or add a bias after it"


class _Normalised:
    """One execution of O-normalised: solved when first asked for, then remembered."""

    def __init__(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        self.step, self.run, self.wanted = step, run, wanted
        self.route = step.route
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
        inner = self.step.premises[0].place
        # through: the inner functions are those of the target run, and so is what enters the normalisation
        through = self.step.rule.side == "through"
        G, y = self.wanted(), run.target.output(inner.outlet) if through else run.raw_of(inner)
        xp = arithmetic(G, y)
        G, y = xp.name(xp.lift(G)), xp.name(xp.lift(y))
        scale = self.scale_place.component if self.scale_place else None
        if isinstance(scale, Scale):
            m = xp.name(scale.effective(run.params))
            stored = self._rounding(scale)
        else:
            m, stored = xp.zeros_like(y) + 1, lambda value: value
        where = self.step.place.parts()[-1].describe()
        if self.route == "auto":
            answer, used, why = routes.choose(G, m, y, self.eps, stored)
        else:
            answer, used, why = routes.candidate(self.route, G, m, y, self.eps, stored), self.route, lambda: "asked for"
        if not xp.all(answer.open):
            bad, tokens = int((~answer.open).reshape(-1).nonzero()[0].reshape(-1)[0]), tuple(answer.open.shape[:-1])
            if not xp.exact and not xp.all(xp.is_zero((G + y) * 0)):
                hint = "the layer overflows on this input: take another dtype"
                finite = Condition("the activations around the normalisation are finite", where, hint=hint)
                raise finite.failed(None, bad, tokens)
            left = None
            if self.route == "ball":
                left = xp.to_float((1 - xp.mean(answer.unit * answer.unit)).reshape(-1)[bad])
            raise self.step.conditions[0].failed(left, bad, tokens, f"route {self.route}")
        margin = routes.room(answer) if self.route == "ball" else None
        run.journal.margins.append(Margin(self.step.conditions[0], margin))
        spread = answer.amplified
        if spread is None and not xp.exact:
            spread = routes.amplification(answer, G, y, self.eps)
        run.journal.routes.append(RouteTaken(where, used, why, answer.options, answer.winner, spread))
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
        before = self.solve().before
        return arithmetic(before).name(before)

    def scale_delta(self) -> Delta:
        """Δm, in stored form."""
        assert self.scale_place is not None
        scale = self.scale_place.component
        assert isinstance(scale, Scale)
        delta = self.solve().scale - scale.effective(self.run.params)
        return Shift(delta)
