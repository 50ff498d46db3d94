"""What is different for many tokens with one patch: the normalised output.  (theory 5; new)"""

import time
from dataclasses import replace

from controllability.arrays import Array, arithmetic
from controllability.arrays.lazy import np
from controllability.errors import NotExact
from controllability.execution.journal import Margin
from controllability.interfaces import Condition, JointOptions, Place
from controllability.rules.base import Attempt, Failure, Rule, Search
from controllability.rules.normalised import NewScale, OutputNormalised, Solution
from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.joint_scale_task import Chosen, ScaleTask
from controllability.solvers.least_norm import UNIT_ROUNDINGS
from controllability.solvers.norm_scale import enlarged
from controllability.solvers.resorts import Resort
from controllability.solvers.served_tokens import Known, NotContinued

KEEP = "let the RMS before the norm move (leave keep_rms out), or patch fewer tokens at once"


class OneScale(Solution):
    """One scale for all tokens."""

    def solve(self, G: Array, y: Array) -> NewScale:
        shape, rows = G.shape, (-1, G.shape[-1])  # inside a mixture a token is a row of its own
        G, y = G.reshape(rows), y.reshape(rows)
        if self.joint.damping is not None:
            return NewScale(self.m, self._damped(self.joint.damping, G, y).reshape(shape))
        scale, before = self._enlarged(G) if G.dtype == object else self._programmed(G, y)
        return NewScale(scale, before.reshape(shape))

    @property
    def joint(self) -> JointOptions:
        """How the tokens are solved for."""
        assert self.run.joint is not None
        return self.run.joint

    def _damped(self, nu: float, G: Array, y: Array) -> Array:
        """y* with the scale m as it is: what a channel with small m alone could give is left to the layers behind.  (theory 7)"""
        xp, m = arithmetic(G, y), self.m
        r, squares = xp.sqrt(xp.mean(y * y) + xp.number(self.eps)), m * m
        self.run.journal.took(self.place.describe(), Resort.DAMPED, lambda: "a fit leaves the scale alone")
        if self.joint.rows is not None:  # the scale as it is does not give every output: none is reached exactly
            self.run.joint = replace(self.joint, rows=replace(self.joint.rows, hard=None))
        return y + r * m * (G - m * y / r) / (squares + nu * xp.mean(squares))

    def _enlarged(self, G: Array) -> tuple[Array, Array]:
        """Fractions, symbols, many digits: the last resort, in closed form."""
        if self.joint.keep_rms:
            raise NotExact("keep_rms is decided by linear programming, in floating-point numbers only")
        if self.eps == 0:
            raise self.step.conditions[0].failed(None)
        why = "not in floating-point numbers: closed form"
        self.run.journal.took(self.place.describe(), Resort.ENLARGED, lambda: why)
        return enlarged(G, self.m, self.eps)

    def _programmed(self, G: Array, y: Array) -> tuple[Array, Array]:
        run, path, xp = self.run, self.place.path, arithmetic(G, y)
        new = Known(xp.numbers(xp.mean(y * y)), xp.numbers(G), xp.numbers(G) * 0)
        known = run.served.get(path)
        tokens = Known.joined(known, new)
        started = time.perf_counter()
        task = ScaleTask(tokens.delta, tokens.x[:, 0], xp.numbers(self.m), float(self.eps), self._rounded)
        chosen = self._exact(task, G, known) if self.joint.exact else task.fitted(self.joint.ridge)
        run.journal.margins.append(Margin(self.step.conditions[0], None))
        run.journal.scale_seconds += time.perf_counter() - started
        count = len(new.x)
        spread = xp.array(task.amplification(chosen)[-count:], like=G)
        run.journal.took(self.place.describe(), chosen.resort, lambda: task.told(chosen), spread)
        if known is not None:
            self._move(known, chosen.before[:-count])
        run.served_after[path] = replace(tokens, raw=chosen.before)
        return xp.array(chosen.scale, like=G), xp.array(chosen.before[-count:], like=G)

    def _rounded(self, scale: np.ndarray) -> np.ndarray:
        """A wanted scale as the parameter will hold it, on NumPy arrays."""
        xp = arithmetic(self.m)
        return xp.numbers(self.stored(xp.array(scale, like=self.m)))

    def _exact(self, task: ScaleTask, G: Array, known: Known | None) -> Chosen:
        """One scale with which every token reaches its target, or, where others make good, one that rounding survives."""
        joint, xp = self.joint, arithmetic(G)
        try:
            exact = task.exact(UNIT_ROUNDINGS * xp.machine_epsilon(G), joint.keep_rms)
        except Infeasible as refused:
            if joint.may_fall_short:
                return task.nearest(Resort.NEAREST)
            failed = self.step.conditions[0].failed(None)
            failed.certificate, failed.final = refused.certificate, joint.keep_rms
            raise failed from None
        assert self.scale is not None
        if joint.keep_rms or task.is_calm(exact, xp.machine_epsilon(self.scale.weight.value(self.run.params))):
            return exact
        if joint.read_by == "block":
            return task.nearest(Resort.NEAREST)
        return (self._sized(task, G, known) if joint.read_by == "norm" else None) or exact

    def _sized(self, task: ScaleTask, G: Array, known: Known | None) -> Chosen | None:
        """Every RMS kept, the sizes of the block's outputs free; None where that cannot be had."""
        run, xp = self.run, arithmetic(G)
        if known is not None:
            raise NotContinued("the sizes of earlier tokens' outputs would change")
        one = run.wanted()[..., :1] * 0 + 1
        if one.shape[:-1] != G.shape[:-1]:
            return None  # inside a mixture

        def goal(sizes: Array) -> np.ndarray:
            run.output_sizes = sizes
            return xp.numbers(xp.lift(self.wanted()).reshape(G.shape))

        chosen = None
        try:
            found = task.sized(goal(one * 2) - task.G)  # what one more size adds to G
            if found is not None:
                chosen = task.resized(found, goal(xp.array(found.sizes[:, None], like=G)))
        finally:
            if chosen is None:
                run.output_sizes = None
        return chosen

    def _move(self, known: Known, before: np.ndarray) -> None:
        """A new scale moves what the known tokens must give before the norm, too."""
        leaf = self.step.premises[0].place.outlet
        if leaf not in self.run.served:
            raise NotContinued(f"what stands before {self.place.describe()} is more than one map")
        self.run.target_shift[leaf] = before - known.raw


class JointNormalised(OutputNormalised):
    """m∘n(g) for many tokens: one scale m' with mean((G_t/m')²) = q_t, then g reaches every y*_t."""

    name = "O-normalised jointly"
    statement = "m∘n∘g, n the RMS normalisation"
    when = "g is jointly output-controllable; ε > 0 or a scale keeps every token's RMS"
    patch = "one m' by linear programming over 1/m'²; g reaches y*_t = u_t·√(r_t²+ε), u_t = G_t/m'"
    source = "theory 5 (new)"
    jointly, solution = True, OneScale

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = super().derive(place, prover)
        if any(step.route == "ball" for step in found.steps):
            reason = "one patch for many tokens moves the scale after the normalisation, and none may move"
            found.failures.append(Failure(place, self.name, reason, "let a scale after the norm move", weight=1))
            found.steps = []
        statement = "one scale serves all tokens: Σ_i G_ti² s_i/d = q_t with s_i = 1/m'_i² > 0"
        condition = Condition(statement, place.parts()[-1].describe(), hint=KEEP)
        how = {"conditions": (condition,), "note": "one scale for all tokens", "route": ""}
        found.steps = [replace(step, **how) for step in found.steps]
        return found

    variants = Rule.variants  # there is one way
