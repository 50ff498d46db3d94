"""The centred and normalised output m∘n(g) without a bias behind it: a new scale whose target has mean 0, too."""

from controllability.arrays import Array, arithmetic
from controllability.arrays.lazy import sympy
from controllability.components.normalisation import Normalize
from controllability.execution.journal import Margin
from controllability.interfaces import Condition, Place, Sequence
from controllability.rules.base import Attempt, Rule, Schema, Search, Step, disturbs
from controllability.rules.normalised import NewScale, OutputNormalised, Solution, scale_update
from controllability.rules.schema import Assumed, schema
from controllability.solvers.centred_scale import centred
from controllability.solvers.norm_scale import amplification

BOTH_SIGNS = "what the branch must give, over its scale, has entries of both signs, or none at all: Σ G_i/m'_i = 0"
HINT = "add a bias after the norm, or ask for route='scale', which leaves what enters the norm as it is"


class OneCentredToken(Solution):
    """Every token has a scale of its own, with the signs of the one that is there."""

    def solve(self, G: Array, y: Array) -> NewScale:
        xp = arithmetic(G, y)
        G, y = xp.name(G), xp.name(y)
        answer, margin = centred(G, xp.name(self.m), y, self.eps, self.stored)
        condition, rows = self.step.conditions[0], answer.open.reshape(-1)
        if not xp.all(answer.open):
            bad = int((~rows).nonzero()[0].reshape(-1)[0])
            left = None if margin is None else xp.to_float(margin.reshape(-1)[bad])
            raise condition.failed(left, bad, tuple(answer.open.shape[:-1]))
        self.run.journal.margins.append(Margin(condition, margin))
        spread = None if xp.exact else amplification(answer, G, y, self.eps)
        self.run.journal.took(self.place.describe(), answer.route, lambda: "the only one that keeps the mean", spread)
        return NewScale(answer.scale, xp.name(answer.before))


class OutputCentred(OutputNormalised):
    """m∘n(g) with n the centred normalisation (LayerNorm) and no bias behind it: m' and y* with mean(y*) = 0."""

    name = "O-centred"
    statement = "m∘n∘g, n the centred normalisation (layer), no bias behind it"
    when = "g is output-controllable; G∘m has entries of both signs, or vanishes (theory 4)"
    patch = "m' = c·sign(m)·√w/f, f_i = mean(abs x) − sign(x_i)·mean(x), x = G∘sign(m)/√w; g reaches y* = u·√(r²+ε), u = G/m'"
    source = "new"
    kind = "layer"
    solution = OneCentredToken

    def derive(self, place: Place, prover: Search) -> Attempt:
        parts = place.component.children()
        scale = parts[-1]
        if prover.route not in ("auto", "balanced") or not scale.scales or len(parts) < 3:
            return Attempt()
        weight = scale_update(scale).param
        crowded = place.parts()[-1].path in prover.per_expert_rows or prover.is_frozen(weight)
        if crowded or parts[-2].normalises != self.kind:
            return Attempt()
        inner = place.slice(0, len(parts) - 2)
        attempt = prover.attempt(inner, self.side)
        found, own = Attempt(failures=list(attempt.failures)), frozenset({weight})
        for step in attempt.steps:
            if not disturbs(own, inner) + disturbs(step.moved, *place.parts()[-2:]):
                condition = Condition(BOTH_SIGNS, place.parts()[-1].describe(), hint=HINT)
                found.add(self, place, (step,), (), own, conditions=(condition,), route="balanced")
        return found

    def schema(self, step: Step) -> Schema:
        norm = Normalize("layer", sympy.Symbol("epsilon", positive=True))
        return schema(Sequence.of(Assumed("g", side=self.side), norm, step.place.component.children()[-1]), (0,))

    variants = Rule.variants  # there is one way
