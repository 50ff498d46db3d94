"""Mixtures of experts: their router and first maps on the input side, their last maps on the output side."""

from dataclasses import replace
from itertools import islice, product

from controllability.arrays import Array, arithmetic, dot
from controllability.components.joint_updates import one_sum_of_experts
from controllability.components.mixture import CHOSEN, SHARES, ExpertLinear, Mixture
from controllability.deltas import Delta
from controllability.errors import SideConditionFailed
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Condition, Params, Path, Place, overlap
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
    per_expert_rows,
    shared,
    target_output,
)
from controllability.rules.schema import Assumed, Unknown, UnknownRouting, schema

ROUNDING = 64  # machine epsilons by which two choices of experts must differ

MOST = 8
NO_EXPERT = "no expert's last matrix moves the output here: steer beside or after the mixture (a shared expert, a bias)"
KEPT = "via='output' keeps the experts that the source run chooses"
ROUNDED = f"rounding decides between experts: take more precision (float32 or better); or {KEPT}"


class OutputMixture(Rule):
    """Σ_j s_j W_j y_j: the least-norm change of the active experts' last matrices."""

    name, side = "O-mixture", "output"
    about = Mixture
    statement = "Σ_j s_j W_j y_j over the active experts"
    when = "some active j has s_j ≠ 0 and y_j ≠ 0"
    patch = "ΔW_j = s_j δ y_jᵀ / Σ_k s_k²‖y_k‖²"
    source = "theory 2 (new); [G] adds δ/S to every expert"
    jointly: bool | None = False

    def derive(self, place: Place, prover: Search) -> Attempt:
        last = place.parts()[2]
        if not isinstance(last.component, ExpertLinear):
            reason = "the experts do not end in their own linear map"
            return Attempt(failures=[Failure(last, self.name, reason, "end the experts with a linear map")])
        return self._concluded(place, last, prover, None, ())

    def _concluded(
        self, place: Place, last: Place, prover: Search, premises: tuple[Step, ...] | None, also: tuple[Condition, ...]
    ) -> Attempt:
        assert isinstance(last.component, ExpertLinear)
        weight = last.component.weight
        if prover.is_frozen(weight):
            reason, hint = f"{weight} may not move (frozen)", f"allow {weight} to move"
            return Attempt(failures=[Failure(last, self.name, reason, hint, weight=1)])
        if last.path in prover.per_expert_rows:
            return Attempt(failures=[per_expert_rows(last, self.name)])
        mixture = place.component
        routing = frozenset(mixture.own_parameters())
        elsewhere = disturbs(frozenset({weight}), *place.parts()[:2]) + overlap(frozenset({weight}), routing)
        if elsewhere:
            return Attempt(failures=[shared(place, self.name, elsewhere)])
        statement = "some active expert has a share and an activation that are not zero"
        if self.jointly:
            statement = "tokens whose stacked activations (s_j y_j)_j depend on each other have changes that depend in the same way"
        condition = Condition(statement, place.describe(), None if self.jointly else lambda x, delta: x, NO_EXPERT)
        update = last.component.output_updates()[0]
        moved = frozenset({weight}).union(*(p.moved for p in premises or ()))
        cost = sum(p.cost for p in premises or ())
        most = f"(experts used)·{last.component.width or 'h'}" if self.jointly else None
        return Attempt([Step(self, place, premises or (), moved, (condition, *also), cost, "", update, most)])

    def schema(self, step: Step) -> Schema:
        given = step.place.component
        assert isinstance(given, Mixture)
        assert isinstance(given.last, ExpertLinear)
        inner_width = given.last.width or "h"
        controlled = bool(step.premises)
        router = _part("router", controlled, (), "E")
        inner = _part("inner", controlled, ("k",), inner_width)
        mixture = Mixture(router, UnknownRouting(), inner, given.last, given.weighted)
        update = given.last.output_updates()[0]
        return schema(mixture, *([(0,), (1,)] if controlled else []), update=update)

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        assert step.update is not None
        path = _last_of(step)

        def delta() -> Array:
            y, share, now, goal = _seen(step, run, wanted)
            xp, missing = arithmetic(y, now, goal), goal - now
            part = share * y  # (..., k, h)
            room = dot(part, part).sum(-2) if xp.exact else xp.max(xp.largest(part)[..., 0])
            run.check(step.conditions[0], room, missing)
            part = part if xp.exact else part / room[..., None, :]  # sizes that cannot be squared
            size = dot(part, part)
            weight = size / size.sum(-2)[..., None, :] / xp.where(xp.is_zero(share), share + 1, share)
            return xp.tidy(weight * missing[..., None, :])

        run.steer(path, Goal(step.update, delta=delta))


class JointMixture(OutputMixture):
    """Σ_j s_tj W_j y_tj for many tokens: joint O-linear on the stacked vectors (s_tj y_tj)_j."""

    name = "O-mixture jointly"
    when = "dependent stacked vectors (s_tj y_tj)_j have dependent δ_t: T ≤ (experts used)·h"
    patch = "[ΔW_j]_j = D Y⁺ with Y the stacked vectors"
    source = "theory 5 (new)"
    jointly = True

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        assert step.update is not None
        path, last = _last_of(step), step.place.parts()[2].component
        assert isinstance(last, ExpertLinear)

        def change() -> Delta:
            y, share, now, goal = _seen(step, run, wanted)
            params, missing = run.params_at(path), arithmetic(y, now, goal).tidy(goal - now)
            assert run.joint is not None
            solved = one_sum_of_experts(
                step.conditions[0], run.joint, y, share, params[CHOSEN], missing, now,
                last.layout == "in_out", last.count(params), run.known_at(path),
            )  # fmt: skip
            if solved.known is not None:
                run.served_after[path] = solved.known
            run.note_shortfall(path, step.conditions[0], solved.margin)
            return solved.delta

        run.steer(path, Goal(step.update, change=change))


def _last_of(step: Step) -> Path:
    """Where the experts' last maps stand."""
    return (*step.place.path, step.place.start + 2)


def _seen(step: Step, run: PatchedRun, wanted: Target) -> tuple[Array, Array, Array, Array]:
    """(the last maps' inputs y, the shares, the sum that they give now, the wanted sum)."""
    mixture, path = step.place.component, _last_of(step)
    assert isinstance(mixture, Mixture)
    y, raw, goal = run.input(path), run.raw(path), wanted()
    xp = arithmetic(y, raw, goal)
    y, raw, goal = xp.lift(y), xp.lift(raw), xp.lift(goal)
    share = shares_of(mixture, run.params_at(path), y)
    return y, share, (raw * share).sum(-2), goal


def _part(name: str, controlled: bool, rows: tuple[str, ...], out: int | str) -> Unknown:
    return (Assumed if controlled else Unknown)(name, rows, out)


def shares_of(mixture: Mixture, params: Params, y: Array) -> Array:
    """The share of each row of ``y`` (..., k, h), as (..., k, 1); 1 where the mixture adds its experts as they are."""
    xp = arithmetic(y)
    one = xp.zeros_like(y[..., :1]) + 1
    return xp.lift(params[SHARES])[..., None] * one if mixture.weighted else one


class InputMixture(Rule):
    """Router and experts' first maps are all steered; the shares and the last maps then follow."""

    name: str = "I-mixture"
    side: Side = "input"
    about = Mixture
    statement = "Σ_j s_j E_j: (router, experts' inner functions), disjoint parameters"
    when = "router and inner functions are input-controllable; the target's choice of experts is no near-tie"
    patch, source = "the union; experts that are not chosen stay as they are", "[G] s.5 (mixture of experts)"

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = Attempt()
        for steps in self._inner(place, prover, found):
            twice = disturbs(steps[0].moved | steps[1].moved, place.parts()[2])
            found.add(self, place, steps, twice, conditions=choice_conditions(place))
        return found

    def _inner(self, place: Place, prover: Search, found: Attempt) -> list[tuple[Step, Step]]:
        router, inner, _ = place.parts()
        attempts = [prover.attempt(router, "input"), prover.attempt(inner, "input")]
        for part, attempt in zip((router, inner), attempts, strict=True):
            if not attempt.steps:
                reason = "this part of the mixture is not input-controllable"
                hint = "give it a linear map before it, or ask for via='output'"
                found.failures.append(Failure(part, self.name, reason, hint, tuple(attempt.failures)))
        kept = []
        for one, two in islice(product(attempts[0].steps, attempts[1].steps), MOST):
            read = frozenset(place.component.own_parameters())  # by the routing itself
            if twice := disturbs(one.moved, inner) + disturbs(two.moved, router) + overlap(one.moved | two.moved, read):
                found.failures.append(shared(place, self.name, twice))
            else:
                kept.append((one, two))
        return kept

    def schema(self, step: Step) -> Schema:
        given = step.place.component
        assert isinstance(given, Mixture)
        router, inner = _part("router", True, (), "E"), _part("inner", True, ("k",), "h")
        last = Unknown("last", ("k",))
        return schema(Mixture(router, UnknownRouting(), inner, last, given.weighted), (0,), (1,))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        watch_choice(step.place, run)
        for premise in step.premises:
            construct(premise, run, target_output(premise, run))


class ThroughMixture(OutputMixture):
    """Theorem 1 inside a mixture: router and first maps as in the target run, then O-mixture."""

    name, side = "T-mixture", "through"
    statement = "Σ_j s_j W_j f_j(x): router and f_j steered, then W_j"
    when = "router and every f_j are input-controllable; as O-mixture; the target's choice is no near-tie"
    patch = "those of the router and of f_j; ΔW_j = s_j δ y_jᵀ / Σ_k s_k²‖y_k‖²"
    source = "[G, Thm 5] with theory 2, O-mixture"

    def derive(self, place: Place, prover: Search) -> Attempt:
        last = place.parts()[2]
        if not isinstance(last.component, ExpertLinear):
            return Attempt()
        found = Attempt()
        for steps in InputMixture()._inner(place, prover, found):
            if twice := disturbs(steps[0].moved | steps[1].moved, last):
                found.failures.append(shared(place, self.name, twice))
                continue
            tried = self._concluded(place, last, prover, steps, choice_conditions(place))
            found.steps += tried.steps
            found.failures += tried.failures
        return found

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        watch_choice(step.place, run)
        for premise in step.premises:
            construct(premise, run, target_output(premise, run))
        super().construct(step, run, wanted)


class JointThroughMixture(ThroughMixture, JointMixture):
    """Theorem 1 inside a mixture, for many tokens with one patch: router and first maps as for one, then O-mixture jointly."""

    name = "T-mixture jointly"
    when = (
        "router and every f_j are jointly input-controllable; as O-mixture jointly; the target's choice is no near-tie"
    )
    patch = "those of the router and of f_j; [ΔW_j]_j = D Y⁺"
    source = JointMixture.source


def choice_conditions(place: Place) -> tuple[Condition, Condition]:
    """That the target run's choice of experts has a margin, and that the patched router repeats it."""
    where = place.describe()
    near = Condition("the target run's choice of experts is no near-tie", where, hint=KEPT)
    return near, Condition("the patched router chooses the experts of the target run", where, hint=ROUNDED)


def mixtures_in(place: Place) -> list[Place]:
    """Every mixture at a place or below it."""
    inside = [mixture for part in place.parts() for mixture in mixtures_in(part)]
    return [place, *inside] if isinstance(place.component, Mixture) else inside


def watch_choice(place: Place, run: PatchedRun) -> None:
    """Let the run test the choice of experts as soon as it is made: the patched router must repeat the target run's."""
    mixture, path = place.component, place.path
    assert isinstance(mixture, Mixture)
    near, same = choice_conditions(place)

    def margin(logits: Array, delta: Array) -> Array:
        xp = arithmetic(logits)
        room = mixture.routing.margin(run.params, xp.lift(logits))
        return room - ROUNDING * xp.machine_epsilon(xp.lift(logits))

    def compare(here: Params) -> None:
        logits = run.target.output((*path, 0))
        try:
            run.check(replace(near, margin=margin), logits, logits)
        except SideConditionFailed as tie:
            # another derivation would leave the choice to rounding: whoever asks for the target's experts must know
            tie.final = True
            raise
        _refuse_other_choice(same, here, run.target.bound(path))

    run.watched[path] = compare


def _refuse_other_choice(same: Condition, here: Params, there: Params) -> None:
    """Raise ``SideConditionFailed`` for the first token whose experts, or their shares that are 0, are not those of the target run."""
    as_there: Array = (here[CHOSEN] == there[CHOSEN]) & ((here[SHARES] == 0) == (there[SHARES] == 0))
    differs = ~as_there.all(-1).reshape(-1)
    if bool(differs.any()):
        bad = int(differs.nonzero()[0].reshape(-1)[0])
        others = int((~as_there).reshape(-1, as_there.shape[-1])[bad].sum())
        raise same.failed(-float(others), bad, tuple(as_there.shape[:-1]))
