"""What is different for many tokens with one patch: the normalised output.  (theory 5; new)"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from controllability.arrays import Array, arithmetic
from controllability.components.normalisation import Normalize
from controllability.components.scale import Scale
from controllability.deltas import Delta, Shift
from controllability.errors import NotExact
from controllability.execution.journal import Margin, RouteTaken
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Condition, Place
from controllability.rules.base import Attempt, Failure, Search, Step, Target, construct
from controllability.rules.normalised import OutputNormalised
from controllability.solvers.free_sizes import sized_scale
from controllability.solvers.joint_scale_task import Chosen, _Numbers, distinct
from controllability.solvers.least_norm import UNIT_ROUNDINGS
from controllability.solvers.resorts import Resort
from controllability.solvers.served_tokens import Known, NotContinued

MAGNIFIED = 5e-6  # amplification, times machine epsilon, above which a block had better do something else
CALM = 10.0  # amplification up to which it need not in any precision
AFFINE = 1e-6  # differences of mean(u²) from q that count as none
KEEP = "let the RMS before the norm move (leave keep_rms out), or patch fewer tokens at once"


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
        steps = [step for step in found.steps if step.route != "ball"]
        if found.steps and not steps:
            reason = "one patch for many tokens moves the scale after the normalisation, and none may move"
            found.failures.append(Failure(place, self.name, reason, "let a scale after the norm move", weight=1))
        note = "one scale for all tokens"
        found.steps = [replace(step, conditions=(condition,), note=note, route="") for step in steps]
        return found

    def variants(self, step: Step) -> dict[str, Step]:
        return {"": step}

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        joint = _OneScale(step, run, wanted)
        construct(step.premises[0], run, joint.before)
        run.steer(joint.place.path, Goal(joint.scale.output_updates()[0], change=joint.delta))


class _OneScale:
    """One execution of the rule: solved when first asked for, then remembered."""

    def __init__(self, step: Step, run: PatchedRun, wanted: Target) -> None:
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
        assert self.run.joint is not None
        if self.run.joint.keep_rms:
            raise NotExact("keep_rms is decided by linear programming, in floating-point numbers only")
        if self.eps == 0:
            raise self.step.conditions[0].failed(None)
        m = xp.or_one(self.scale.effective(self.run.params))
        ratio = G / m
        c = xp.mean(ratio * ratio).sum() + 1
        u = xp.name(ratio / c)
        eps = xp.number(self.eps)
        self.run.journal.routes.append(
            RouteTaken(self.place.describe(), Resort.ENLARGED, lambda: "not in floating-point numbers: closed form")
        )
        return c * m, xp.name(u * xp.sqrt(eps / (1 - xp.mean(u * u))))

    def _programmed(self, G: Array, y: Array) -> tuple[Array, Array]:
        run, xp = self.run, arithmetic(G, y)
        m = self.scale.effective(run.params)
        new = Known(xp.numbers(xp.mean(y * y)), xp.numbers(G), xp.numbers(G) * 0)
        known = run.served.get(self.place.path)
        tokens = Known.joined(known, new)
        assert run.joint is not None
        started = time.perf_counter()
        task = _Numbers(tokens.delta, tokens.x[:, 0], xp.numbers(m), float(self.eps), self._rounding(m))
        chosen = self._exact(task, G, known) if run.joint.exact else self._fit(task, run.joint.ridge)
        run.journal.margins.append(Margin(self.step.conditions[0], None))
        run.journal.scale_seconds += time.perf_counter() - started
        count = len(new.x)
        spread = xp.array(task.amplification(chosen)[-count:], like=G)
        told = f"largest relative change of the scale {task.change(chosen):.3g}{chosen.remark}"
        run.journal.routes.append(RouteTaken(self.place.describe(), chosen.resort, lambda: told, amplification=spread))
        if known is not None:
            self._move(known, chosen.before[:-count])
        run.served_after[self.place.path] = replace(tokens, raw=chosen.before)
        return xp.array(chosen.scale, like=G), xp.array(chosen.before[-count:], like=G)

    def _exact(self, task: _Numbers, G: Array, known: Known | None) -> Chosen:
        """One scale with which every token reaches its target, or, where others make good, one that rounding survives."""
        from controllability.solvers.farkas_certificate import Infeasible
        from controllability.solvers.joint_scale import joint_scale  # SciPy is imported where it is needed

        run, xp = self.run, arithmetic(G)
        joint = run.joint
        assert joint is not None
        tolerance = UNIT_ROUNDINGS * xp.machine_epsilon(G)
        kept, like = distinct(np.column_stack([task.G, np.sqrt(task.square)]), tolerance)
        try:
            answer = joint_scale(task.G[kept], task.m, task.square[kept], task.eps, task.stored, joint.keep_rms)
        except Infeasible as refused:
            if joint.may_fall_short:
                return task.nearest(Resort.NEAREST)
            failed = self.step.conditions[0].failed(None)
            proof = refused.certificate
            failed.certificate = proof.among(kept, like) if proof is not None else None
            failed.final = joint.keep_rms
            raise failed from None
        remark = f"; {answer.certificate}" if answer.certificate is not None else ""
        exact = Chosen(answer.scale, task.reached(answer.scale, answer.before, like), answer.resort, remark)
        calm = max(CALM, MAGNIFIED / xp.machine_epsilon(run.params_of(self.scale.weight)))
        if joint.keep_rms or task.amplification(exact).max() <= calm:
            return exact
        if joint.read_by == "block":
            return task.nearest(Resort.NEAREST)
        sized = self._sized(task, G, known) if joint.read_by == "norm" else None
        return exact if sized is None else sized

    def _fit(self, task: _Numbers, ridge: float) -> Chosen:
        """The scale of a fit: it weighs its own change as the matrix before it does; without a weight an exact one will do."""
        from controllability.solvers.farkas_certificate import Infeasible
        from controllability.solvers.joint_scale import joint_scale

        if not ridge:
            try:
                answer = joint_scale(task.G, task.m, task.square, task.eps, task.stored, keep_rms=True)
                return Chosen(answer.scale, answer.before, answer.resort)
            except Infeasible:
                pass
        return task.nearest(Resort.FITTED, ridge)

    def _sized(self, task: _Numbers, G: Array, known: Known | None) -> Chosen | None:
        """Every RMS kept, the sizes of the block's outputs free; None where that cannot be had."""
        run, xp = self.run, arithmetic(G)
        if known is not None:
            raise NotContinued("the sizes of earlier tokens' outputs would change")
        one = run.wanted()[..., :1] * 0 + 1
        if one.shape[:-1] != G.shape[:-1]:
            return None  # inside a mixture
        try:
            run.output_sizes = one * 2
            output = xp.numbers(xp.lift(self.wanted()).reshape(G.shape)) - task.G  # what one more size adds to G
            found = sized_scale(task.G, output, task.q, (task.m, task.nearest(Resort.SIZED).scale), task.stored)
            if found is None:
                run.output_sizes = None
                return None
            run.output_sizes = xp.array(found.sizes[:, None], like=G)
            goal = xp.numbers(xp.lift(self.wanted()).reshape(G.shape))
        except BaseException:
            run.output_sizes = None
            raise
        unit = goal / found.scale
        if np.abs((unit**2).mean(-1) - task.q).max() > AFFINE:  # a bend between here and the block's output
            run.output_sizes = None
            return None
        remark = f"; outputs change their sizes by factors {found.sizes.min():.3f} to {found.sizes.max():.3f}"
        return Chosen(found.scale, unit * task.root, Resort.SIZED, remark)

    def _move(self, known: Known, before: np.ndarray) -> None:
        """A new scale moves what the known tokens must give before the norm, too."""
        leaf = self.step.premises[0].place.outlet
        if leaf not in self.run.served:
            raise NotContinued(f"what stands before {self.place.describe()} is more than one map")
        self.run.target_shift[leaf] = before - known.raw

    def _rounding(self, m: Array) -> Callable[[np.ndarray], np.ndarray]:
        """A wanted scale as the parameter will hold it, on NumPy arrays."""
        xp, params = arithmetic(m), self.run.params

        def stored(value: np.ndarray) -> np.ndarray:
            shift = self.scale.to_scale(params, xp.array(value, like=m)).value
            return xp.numbers(m + shift)

        return stored
