"""The output side: g(y; φ') = g(y; φ) + δ for compositions.  [G, section 5; theory 2]"""

from dataclasses import replace

from controllability.arrays import Array, arithmetic
from controllability.components.times import Times
from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Bijection, Condition, Place, Product, Sequence, Sum
from controllability.rules.base import Attempt, Rule, Schema, Search, Side, Step, Target, construct, lifted, rest_of_sum
from controllability.rules.schema import Assumed, Unknown, index_of, schema, terms


class OutputAfterFixed(Rule):
    """g∘p with p fixed."""

    name, side = "O-after-fixed", "output"
    about = Sequence
    statement = "g∘p, p fixed"
    when, patch, source = "g is output-controllable at p(y)", "that of g", "[G] s.5"

    def derive(self, place: Place, prover: Search) -> Attempt:
        last = len(place.component.children()) - 1
        before, g = place.slice(0, last), place.parts()[last]
        return lifted(self, place, g, (before,), prover.attempt(g, "output"), note=before.describe())

    def schema(self, step: Step) -> Schema:
        return schema(Sequence.of(Unknown("p"), Assumed("g", side="output")), (1,))


class OutputThroughBijection(Rule):
    """q∘g with q a bijection onto its image and the target in the image."""

    name: str = "O-through-bijection"
    about = Sequence
    statement = "q∘g, q a bijection onto its image"
    when = "g is output-controllable and the target lies in the image of q"
    patch, source = "g reaches q⁻¹(q(g(y)) + δ)", "theory 2"

    def __init__(self, side: Side = "output") -> None:
        self.side = side  # "through": the same with g controllable through

    def applies(self, q: Place) -> bool:
        """Whether this rule (and not a special case of it) undoes ``q``."""
        return isinstance(q.component, Bijection) and not isinstance(q.component, Times)

    def derive(self, place: Place, prover: Search) -> Attempt:
        last = len(place.component.children()) - 1
        inner, q = place.slice(0, last), place.parts()[last]
        if not self.applies(q):
            return Attempt()
        assert isinstance(q.component, Bijection)
        conditions = q.component.image_conditions()
        attempt = prover.attempt(inner, self.side)
        return lifted(self, place, inner, (q,), attempt, conditions=conditions, note=q.describe())

    def schema(self, step: Step) -> Schema:
        q = step.place.parts()[-1].component
        return schema(Sequence.of(Assumed("g", side=self.side), q), (0,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        q = step.place.parts()[-1].component
        assert isinstance(q, Bijection)

        def before() -> Array:
            value = wanted()
            value = arithmetic(value).lift(value)
            for condition in step.conditions:
                margin = replace(condition, margin=lambda y, _: q.image_margin(run.params, y))
                run.check(margin, value, value)
            return q.invert(run.params, value)

        construct(step.premises[0], run, before)


class OutputTimes(OutputThroughBijection):
    """c·g with a constant c ≠ 0."""

    name = "O-times"
    statement = "c·g, constant c"
    when, patch, source = "c ≠ 0 and g is output-controllable", "g's with δ/c", "theory 2"

    def applies(self, q: Place) -> bool:
        return isinstance(q.component, Times) and q.component.factor != 0


class OutputSum(Rule):
    """g₁ + g₂ with one of them output-controllable, the other not reading what it moves."""

    name, side = "O-sum", "output"
    about = Sum
    statement = "g₁ + … + g_k"
    when = "one term is output-controllable and the others do not read what it moves"
    patch, source = "that term's", "theory 2"

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = Attempt()
        for term in place.parts():
            others = tuple(p for p in place.parts() if p.path != term.path)
            lift = lifted(self, place, term, others, prover.attempt(term, "output"))
            found.steps += lift.steps
            if not term.component.is_skip:
                found.failures += lift.failures
        return found

    def schema(self, step: Step) -> Schema:
        at = index_of(step, step.premises[0].place)
        return schema(Sum(terms(step, {at: Assumed("g", side="output")})), (at,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        construct(step.premises[0], run, rest_of_sum(step, step.premises[0], run, wanted))


class OutputFactor(Rule):
    """p∘g elementwise, p fixed and nowhere zero: g reaches the wanted output divided by p."""

    name: str = "O-factor"
    side: Side = "output"
    about = Product
    statement = "p(y) ∘ g(y), p fixed"
    when = "g is output-controllable, no entry of p(y) is zero"
    patch, source = "g's with δ/p(y)", "O-times, entry by entry (new)"

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = Attempt()
        for factor in place.parts():
            others = tuple(p for p in place.parts() if p.path != factor.path)
            names = " * ".join(p.describe() for p in others)
            statement = f"no entry of the other factor ({names}) is zero"
            smallest = lambda x, delta: arithmetic(x).smallest(x)  # noqa: E731
            condition = Condition(statement, place.describe(), smallest, NOTHING_PASSES)
            attempt = prover.attempt(factor, "output")
            lift = lifted(self, place, factor, others, attempt, conditions=(condition,), cost_at_least=2)
            found.steps += lift.steps
            found.failures += lift.failures
        return found

    def schema(self, step: Step) -> Schema:
        at = index_of(step, step.premises[0].place)
        return schema(Product(terms(step, {at: Assumed("g", side="output")})), (at,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
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


class InputFactor(OutputFactor):
    """The same on the input side, for a factor that no parameter could steer: g reaches the target's product divided by p."""

    name, side = "I-factor", "input"
    statement = "p(z) ∘ g(z), p without parameters"
    patch = "g's with δ = p(z')∘g(z')/p(z) − g(z)"

    def derive(self, place: Place, prover: Search) -> Attempt:
        bare = [part for part in place.parts() if not part.component.parameters()]
        return super().derive(place, prover) if len(bare) == len(place.parts()) - 1 else Attempt()

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        super().construct(step, run, lambda: run.target.output(step.place.outlet))


NOTHING_PASSES = "where the other factor is zero nothing passes: steer after the product, by a bias or a linear map"
