"""What is different for many tokens with one patch: the normalised output, and the experts' last maps.  (theory 5; new)"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from controllability.arrays import Array, arithmetic
from controllability.components.mixture import CHOSEN, ExpertLinear, Mixture
from controllability.components.normalisation import Normalize
from controllability.components.scale import Scale
from controllability.deltas import Delta, Shift
from controllability.errors import NotExact
from controllability.interfaces import Condition
from controllability.jointly.known import Known
from controllability.jointly.span import UNIT_ROUNDINGS
from controllability.jointly.ways import one_sum_of_experts
from controllability.rules.base import Attempt, Failure, Search, Step, Wanted, construct, target_output
from controllability.rules.mixture import OutputMixture, ThroughMixture, shares_of, watch_choice
from controllability.rules.normalised import OutputNormalised
from controllability.trace import Goal, Margin, PatchedRun, Place, RouteTaken

if TYPE_CHECKING:
    from controllability.jointly.scales import JointScale

MAGNIFIED = (
    1e-5  # shrinkage of what enters a norm, times machine epsilon, above which a later block had better make good
)
NEAREST = "nearest, made good later"
KEEP = "let the RMS before the norm move (leave keep_rms out), or patch fewer tokens at once"


class NotContinued(Exception):
    """Tokens cannot be added to this patch one by one: it has to be solved anew."""


class JointNormalised(OutputNormalised):
    """m∘n(g) for many tokens: one scale m' with mean((G_t/m')²) = q_t, then g reaches every y*_t."""

    name = "O-normalised jointly"
    statement = "m∘n∘g, n the RMS normalisation"
    when = "g is jointly output-controllable; ε > 0 or a scale keeps every token's RMS"
    patch = "one m' by linear programming over 1/m'²; g reaches y*_t = u_t·√(r_t²+ε), u_t = G_t/m'"
    source = "theory 5 (new)"
    jointly = True

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = super().derive(place, prover)
        where = place.parts()[-1].describe() if found.steps else ""
        condition = Condition(
            "one scale serves all tokens: Σ_i G_ti² s_i/d = q_t with s_i = 1/m'_i² > 0", where, hint=KEEP
        )
        steps = [step for step in found.steps if step.note != "route ball"]
        if found.steps and not steps:
            reason = "one patch for many tokens moves the scale after the normalisation, and none may move"
            found.failures.append(Failure(place, self.name, reason, "let a scale after the norm move", weight=1))
        found.steps = [replace(step, conditions=(condition,), note="one scale for all tokens") for step in steps]
        return found

    def variants(self, step: Step) -> dict[str, Step]:
        return {"": step}

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        joint = _OneScale(step, run, wanted)
        construct(step.premises[0], run, joint.before)
        run.steer(joint.place.path, Goal(joint.scale.output_steerings()[0], delta=joint.delta))


class _OneScale:
    """One execution of the rule: solved when first asked for, then remembered."""

    def __init__(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        self.step, self.run, self.wanted = step, run, wanted
        parts = step.place.parts()
        self.place = parts[-1]
        scale, norm = self.place.component, parts[-2].component
        assert isinstance(scale, Scale) and isinstance(norm, Normalize)
        self.scale, self.eps = scale, norm.eps
        self._answer: tuple[Array, Array] | None = None  # (m' (d,), y* (T, d))

    def before(self) -> Array:
        """y*, what must enter the normalisation, (T, d)."""
        return self._solved()[1]

    def delta(self) -> Delta:
        """Δm, in stored form, (d,)."""
        return Shift(self._solved()[0] - self.scale.effective(self.run.params))

    def _solved(self) -> tuple[Array, Array]:
        if self._answer is None:
            run, inner = self.run, self.step.premises[0].place
            through = self.step.rule.side == "through"
            G, y = self.wanted(), run.target.output(inner.outlet) if through else run.raw_of(inner)
            xp = arithmetic(G, y)
            shape, rows = G.shape, (-1, G.shape[-1])  # inside a mixture a token is a row of its own
            G, y = xp.lift(G).reshape(rows), xp.lift(y).reshape(rows)
            scale, before = self._enlarged(G) if G.dtype == object else self._programmed(G, y)
            self._answer = scale, before.reshape(shape)
        return self._answer

    def _enlarged(self, G: Array) -> tuple[Array, Array]:
        """Fractions, symbols, many digits: m' = c·m (c alone where m is 0) with a rational c ≥ every RMS(G_t/m)."""
        xp = arithmetic(G)
        assert self.run.together is not None
        if self.run.together.keep_rms:
            raise NotExact("keep_rms is decided by linear programming, in floating-point numbers only")
        if self.eps == 0:
            raise self.step.conditions[0].failed(None)
        m = xp.or_one(self.scale.effective(self.run.params))
        ratio = G / m
        c = xp.mean(ratio * ratio).sum() + 1
        u = xp.name(ratio / c)
        eps = xp.number(self.eps)
        self.run.journal.routes.append(
            RouteTaken(self.place.describe(), "enlarged", lambda: "not in floating-point numbers: closed form")
        )
        return c * m, xp.name(u * xp.sqrt(eps / (1 - xp.mean(u * u))))

    def _programmed(self, G: Array, y: Array) -> tuple[Array, Array]:
        from controllability.jointly.certificates import Infeasible
        from controllability.jointly.scales import joint_scale  # SciPy is imported where it is needed

        run, xp = self.run, arithmetic(G, y)
        m = self.scale.effective(run.params)
        new = Known(xp.numbers(xp.mean(y * y)), xp.numbers(G), xp.numbers(G) * 0)
        known = run.known.get(self.place.path)
        tokens = Known.joined(known, new)
        square = tokens.x[:, 0]
        assert run.together is not None
        started = time.perf_counter()
        try:
            tolerance = UNIT_ROUNDINGS * xp.machine_epsilon(G)
            kept, like = distinct(np.column_stack([tokens.gap, np.sqrt(square)]), tolerance)
            answer = joint_scale(
                tokens.gap[kept], xp.numbers(m), square[kept], float(self.eps), self._rounding(m), run.together.keep_rms
            )
            answer = _for_all(answer, tokens.gap, like)
        except Infeasible as refused:
            failed = self.step.conditions[0].failed(None)
            proof = refused.certificate
            failed.certificate = proof.among(kept, like) if proof is not None else None
            failed.final = run.together.keep_rms
            raise failed from None
        if answer.resort != "kept rms" and self._better_later(
            answer, xp.machine_epsilon(run.params_of(self.scale.weight))
        ):
            answer = _nearest(answer, tokens.gap, square, self._rounding(m))
            if not run.together.exact:
                answer = replace(answer, resort="nearest")
        run.journal.margins.append(Margin(self.step.conditions[0], None))
        run.journal.scale_seconds += time.perf_counter() - started
        count = len(new.x)
        spread = _shrunk(answer, square, float(self.eps))[-count:]
        run.journal.routes.append(self._taken(answer, xp.array(spread, like=G)))
        if known is not None:
            self._move(known, answer.before[:-count])
        run.learned[self.place.path] = replace(tokens, raw=answer.before)
        return xp.array(answer.scale, like=G), xp.array(answer.before[-count:], like=G)

    def _move(self, known: Known, before: np.ndarray) -> None:
        """A new scale moves what the known tokens must give before the norm, too."""
        leaf = self.step.premises[0].place.outlet
        if leaf not in self.run.known:
            raise NotContinued(f"what stands before {self.place.describe()} is more than one map")
        self.run.moved[leaf] = before - known.raw

    def _better_later(self, answer: JointScale, eps: float) -> bool:
        together = self.run.together
        assert together is not None
        if not together.exact:  # what is left over by least squares would be magnified as rounding is
            return True
        return together.made_good and answer.shrinkage * eps > MAGNIFIED

    def _rounding(self, m: Array) -> Callable[[np.ndarray], np.ndarray]:
        """A wanted scale as the parameter will hold it, on NumPy arrays."""
        xp, params = arithmetic(m), self.run.params

        def stored(value: np.ndarray) -> np.ndarray:
            shift = self.scale.to_scale(params, xp.array(value, like=m)).value
            return xp.numbers(m + shift)

        return stored

    def _taken(self, answer: JointScale, amplified: Array) -> RouteTaken:
        told = f"largest relative change of the scale {answer.change:.3g}"
        why = f"{told}; {answer.certificate}" if answer.certificate is not None else told
        return RouteTaken(self.place.describe(), answer.resort, lambda: why, amplification=amplified)


def distinct(rows: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that differ, (K,); which of them each token repeats but for rounding, (T,)).

    A prefix that several sequences share is computed several times, and rounded differently: it is one equation, not many.
    """
    kept: list[int] = []
    like = np.zeros(len(rows), dtype=int)
    sizes = np.abs(rows).max(-1)
    for t, row in enumerate(rows):
        apart = np.abs(rows[kept] - row).max(-1) if kept else np.zeros(0)
        near = np.flatnonzero(apart <= tolerance * sizes[t])
        like[t] = near[0] if len(near) else len(kept)
        if not len(near):
            kept.append(t)
    return np.array(kept), like


def _for_all(answer: JointScale, G: np.ndarray, like: np.ndarray) -> JointScale:
    """The answer for distinct tokens as one for all: who repeats another enters the norm with the same RMS."""
    if len(G) == len(answer.unit):
        return answer
    unit = np.divide(G, answer.scale, out=np.zeros_like(G), where=G != 0)
    p, root = (unit**2).mean(-1), np.sqrt((answer.before**2).mean(-1))[like]
    before = unit * (root / np.sqrt(np.where(p == 0, 1.0, p)))[:, None]
    return replace(answer, unit=unit, before=before)


def _nearest(
    answer: JointScale, G: np.ndarray, square: np.ndarray, stored: Callable[[np.ndarray], np.ndarray]
) -> JointScale:  # fmt: skip
    """Every token keeps its RMS and gets the direction of its target, its size to a factor as near to 1 as one scale allows."""
    p = (answer.unit**2).mean(-1)
    alive = p > 0
    middle = float(np.sqrt(p[alive].min() * p[alive].max())) if alive.any() else 1.0
    scale = stored(answer.scale * np.sqrt(middle))
    unit = np.divide(G, scale, out=np.zeros_like(G), where=G != 0)
    size = np.sqrt((unit**2).mean(-1))
    unit = unit / np.where(size == 0, 1.0, size)[:, None]
    return replace(
        answer, scale=scale, unit=unit, before=unit * np.sqrt(square)[:, None], resort=NEAREST, shrinkage=1.0
    )


def _shrunk(answer: JointScale, square: np.ndarray, eps: float) -> np.ndarray:
    """How much the norm magnifies a rounding error of W y: RMS before ÷ RMS after, at least 1, (T, 1)."""
    after = np.sqrt((answer.before**2).mean(-1) + eps)
    return np.maximum(1.0, np.sqrt(square + eps) / np.where(after == 0, 1.0, after))[:, None]


class JointMixture(OutputMixture):
    """Σ_j s_tj W_j y_tj for many tokens: joint O-linear on the stacked vectors (s_tj y_tj)_j."""

    name, side = "O-mixture jointly", "output"
    when = "dependent stacked vectors (s_tj y_tj)_j have dependent δ_t: T ≤ (experts used)·h"
    patch = "[ΔW_j]_j = D Y⁺ with Y the stacked vectors"
    source = "theory 5 (new)"
    jointly = True

    def derive(self, place: Place, prover: Search) -> Attempt:
        return counted(super().derive(place, prover))

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
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

    def construct(self, step: Step, run: PatchedRun, wanted: Wanted) -> None:
        watch_choice(step.place, run)
        for premise in step.premises:
            construct(premise, run, target_output(premise, run))
        steer_stacked(step, run, wanted)


def counted(found: Attempt) -> Attempt:
    """How many tokens the stacked vectors serve: as many as they are long."""
    for i, step in enumerate(found.steps):
        mixture = step.place.component
        assert isinstance(mixture, Mixture)
        found.steps[i] = replace(step, most=f"(experts used)·{mixture.last.width or 'h'}")
    return found


def steer_stacked(step: Step, run: PatchedRun, wanted: Wanted) -> None:
    """Steer the experts' last matrices together."""
    assert step.steering is not None
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
        assert run.together is not None
        solved = one_sum_of_experts(
            step.conditions[0], run.together, y, share, params[CHOSEN], xp.tidy(goal - now), now,
            last.layout == "in_out", last.count(params), run.known_at(path),
        )  # fmt: skip
        if solved.known is not None:
            run.learned[path] = solved.known
        if run.together.exact:
            run.journal.margins.append(Margin(step.conditions[0], solved.room))
        return solved.delta

    run.steer(path, Goal(step.steering, delta=delta))
