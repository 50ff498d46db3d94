"""The input side: f(z; θ') = f(z'; θ) for compositions.  [G, section 5]"""

from itertools import islice, product

from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Place, Product, Sequence, Sum
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
    lifted,
    target_output,
)
from controllability.rules.mixture import choice_conditions, mixtures_in, watch_choice
from controllability.rules.schema import Assumed, Unknown, Unseeing, schema

MOST = 64  # combinations of the parts' derivations that are looked at


class InputConstant(Rule):
    """A part that nothing has to be done for, inside a tuple: it does not see the input."""

    name, side = "I-constant", "input"
    statement = "a component that does not depend on its input"
    when, patch, source = "always", "none", "theory 2"

    def derive(self, place: Place, prover: Search) -> Attempt:
        constant = getattr(place.component, "constant", False)
        return Attempt([Step(self, place)] if constant else [])

    def schema(self, step: Step) -> Schema:
        return Schema(Unseeing("c"))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        return None


class InputBefore(Rule):
    """f∘p with p fixed."""

    name, side = "I-before", "input"
    about = Sequence
    statement = "f∘p, p fixed"
    when, patch, source = "f is input-controllable at (p(z), p(z'))", "that of f", "[G] s.5"

    def derive(self, place: Place, prover: Search) -> Attempt:
        last = len(place.component.children()) - 1
        before, f = place.slice(0, last), place.parts()[last]
        return lifted(self, place, f, (before,), prover.attempt(f, "input"), note=before.describe())

    def schema(self, step: Step) -> Schema:
        return schema(Sequence.of(Unknown("p"), Assumed("f")), (1,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        construct(step.premises[0], run, target_output(step.premises[0], run))


class InputAfter(Rule):
    """q∘f with q fixed."""

    name, side = "I-after", "input"
    about = Sequence
    statement = "q∘f, q fixed"
    when = "f is input-controllable; a choice of experts inside q is no near-tie"
    patch, source = "that of f", "[G] s.5"

    def derive(self, place: Place, prover: Search) -> Attempt:
        last = len(place.component.children()) - 1
        f, after = place.slice(0, last), place.parts()[last]
        # q reads what f reproduces up to rounding, which must not decide between experts
        choices = tuple(c for mixture in mixtures_in(after) for c in choice_conditions(mixture))
        return lifted(self, place, f, (after,), prover.attempt(f, "input"), choices, note=after.describe())

    def schema(self, step: Step) -> Schema:
        return schema(Sequence.of(Assumed("f"), Unknown("q")), (0,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        for mixture in mixtures_in(step.place.parts()[-1]):
            watch_choice(mixture, run)
        construct(step.premises[0], run, target_output(step.premises[0], run))


class InputCombine(Rule):
    """q(f₁, …, f_k) with disjoint parameters: I-tuple, then I-after with q the sum or product."""

    name, side = "I-combine", "input"
    about = Sum | Product
    statement = "q(f₁, …, f_k), disjoint parameters (I-tuple, then I-after)"
    when, patch, source = "every f_i is input-controllable", "the union", "[G] s.5"

    def derive(self, place: Place, prover: Search) -> Attempt:
        parts = place.parts()
        attempts = [prover.attempt(part, "input") for part in parts]
        found, reason, hint = Attempt(), "this part is not input-controllable", "give it a linear map before it"
        for part, attempt in zip(parts, attempts, strict=True):
            if not attempt.steps:
                found.failures.append(Failure(part, self.name, reason, hint, tuple(attempt.failures)))
        for steps in islice(product(*(a.steps for a in attempts)), MOST):
            others = ((step, part) for i, step in enumerate(steps) for j, part in enumerate(parts) if i != j)
            twice = tuple(p for step, part in others for p in disturbs(step.moved, part))
            found.add(self, place, steps, twice, cost=max(s.cost for s in steps))
        return found

    def schema(self, step: Step) -> Schema:
        own = step.place.component.map_children(lambda i, _: Assumed(f"f{i + 1}"))
        return schema(own, *((i,) for i in range(len(step.premises))))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        for premise in step.premises:
            construct(premise, run, target_output(premise, run))
