"""What is different for many tokens with one patch: the experts' last maps.  (theory 5; new)"""

from __future__ import annotations

from dataclasses import replace

from controllability.arrays import arithmetic
from controllability.components.joint_updates import one_sum_of_experts
from controllability.components.mixture import CHOSEN, ExpertLinear, Mixture
from controllability.deltas import Delta
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Place
from controllability.rules.base import Attempt, Search, Step, Target, construct, target_output
from controllability.rules.mixture import OutputMixture, ThroughMixture, shares_of, watch_choice


class JointMixture(OutputMixture):
    """Σ_j s_tj W_j y_tj for many tokens: joint O-linear on the stacked vectors (s_tj y_tj)_j."""

    name, side = "O-mixture jointly", "output"
    when = "dependent stacked vectors (s_tj y_tj)_j have dependent δ_t: T ≤ (experts used)·h"
    patch = "[ΔW_j]_j = D Y⁺ with Y the stacked vectors"
    source = "theory 5 (new)"
    jointly = True

    def derive(self, place: Place, prover: Search) -> Attempt:
        return counted(super().derive(place, prover))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        steer_stacked(step, run, wanted)


class JointThroughMixture(ThroughMixture):
    """Theorem 1 inside a mixture, for many tokens with one patch."""

    name, side = "T-mixture jointly", "through"
    when = (
        "router and every f_j are jointly input-controllable; as O-mixture jointly; the target's choice is no near-tie"
    )
    patch = "those of the router and of f_j; [ΔW_j]_j = D Y⁺"
    source = "theory 5 (new)"
    jointly = True

    def derive(self, place: Place, prover: Search) -> Attempt:
        return counted(super().derive(place, prover))

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        watch_choice(step.place, run)
        for premise in step.premises:
            construct(premise, run, target_output(premise, run))
        steer_stacked(step, run, wanted)


def counted(found: Attempt) -> Attempt:
    """How many tokens the stacked vectors serve: as many as they are long."""
    for i, step in enumerate(found.steps):
        mixture = step.place.component
        assert isinstance(mixture, Mixture)
        found.steps[i] = replace(step, max_tokens=f"(experts used)·{mixture.last.width or 'h'}")
    return found


def steer_stacked(step: Step, run: PatchedRun, wanted: Target) -> None:
    """Steer the experts' last matrices together."""
    assert step.update is not None
    mixture, path = step.place.component, (*step.place.path, step.place.start + 2)
    assert isinstance(mixture, Mixture) and isinstance(mixture.last, ExpertLinear)
    last = mixture.last

    def delta() -> Delta:
        y, raw, goal = run.input(path), run.raw(path), wanted()
        xp = arithmetic(y, raw, goal)
        y, raw, goal = xp.lift(y), xp.lift(raw), xp.lift(goal)
        params = run.params_at(path)
        share = shares_of(mixture, params, y)
        now = (raw * share).sum(-2)
        assert run.joint is not None
        solved = one_sum_of_experts(
            step.conditions[0], run.joint, y, share, params[CHOSEN], xp.tidy(goal - now), now,
            last.layout == "in_out", last.count(params), run.known_at(path),
        )  # fmt: skip
        if solved.known is not None:
            run.served_after[path] = solved.known
        run.note_shortfall(path, step.conditions[0], solved.margin)
        return solved.delta

    run.steer(path, Goal(step.update, change=delta))
