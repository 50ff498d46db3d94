"""The source run with the patch of a proof: every delta is solved the moment its component's input is known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from controllability.arrays import Array, arithmetic
from controllability.components.updates import turned
from controllability.deltas import Delta, Shift, added
from controllability.execution.journal import Journal, Margin
from controllability.execution.trace import Trace
from controllability.interfaces import Component, Condition, JointOptions, Layout, Param, Params, Path, Place, Update
from controllability.interfaces.condition import measure
from controllability.solvers.metric_fit import Drift
from controllability.solvers.resorts import Resort
from controllability.solvers.served_tokens import Known

ONE_NUMBER = "one number serves all features here: steer after it, by a map or a bias with a number for each feature"


class Metric(Protocol):
    """In which metric the change of a matrix is least: it is solved for ``seen`` inputs, and ``back`` is the one that reads them."""

    def seen(self, x: Array) -> Array:
        """L⁻¹x."""
        ...

    def back(self, change: Any, like: Array) -> Any:
        """ΔW of what was solved for L⁻¹x."""
        ...

    @property
    def drift(self) -> Drift:
        """How much ordinary text feels a change, for a fit."""
        ...


@dataclass
class Goal:
    """What a leaf is steered to: a wanted output, a wanted change δ of it, or a change of the parameter that another rule decides."""

    update: Update
    wanted: Callable[[], Array] | None = None
    delta: Callable[[], Array] | None = None
    change: Callable[[], Delta] | None = None


class PatchedRun(Trace):
    """The source run with the patch: raw outputs are computed or observed, changes solved, effects added.

    With ``joint`` axis 0 runs over the tokens and there is one delta for all of them; else every token has its own.
    """

    def __init__(
        self, block: Component, params: Params, source: Trace | Array, target: Trace | Array,
        joint: JointOptions | None = None, layout: Layout | None = None,
    ) -> None:  # fmt: skip
        known = source if isinstance(source, Trace) else Trace(block, params, source, layout=layout)
        super().__init__(block, params, known.state, layout=known.layout)
        self.target = target if isinstance(target, Trace) else Trace(block, params, target, layout=known.layout)
        self.unpatched = known
        self.goals: dict[Path, Goal] = {}
        self.raw_outputs: dict[Path, Array] = {}
        self.solved: dict[Path, Delta] = {}
        self.watched: dict[Path, Callable[[Params], None]] = {}  # what a rule asks of bound values, once they are known
        self.journal = Journal()
        self.joint = joint
        self.served: Mapping[Path, Known] = {}  # tokens that the patch serves already
        self.metrics: Mapping[str, Metric] = {}  # of matrices, by name; without one Frobenius' norm counts
        self.others: dict[Path, Array] = {}  # what else a leaf reads with the same change, (N, T, in)
        self.served_after: dict[Path, Known] = {}  # those and these
        self.target_shift: dict[Path, Array] = {}  # what the known tokens' outputs must give more, (T, ·)
        self.output_sizes: Array | None = None  # factors by which the outputs may differ from the target's, (T, 1)

    def wanted(self) -> Array:
        """What the block must give: the target's output, in the size that serves where sizes do not count."""
        output = self.target.output(())
        return output if self.output_sizes is None else arithmetic(output).lift(output) * self.output_sizes

    def steer(self, path: Path, goal: Goal) -> None:
        """Announce that the leaf at ``path`` will be patched."""
        self.goals[path] = goal

    def observe_raw(self, path: Path, value: Array) -> None:
        """Tell the run what a leaf computed with its stored parameters at its patched input."""
        self.raw_outputs[path] = value

    def raw(self, path: Path) -> Array:
        """The output of a leaf at its patched input, its own parameters as stored."""
        if path not in self.raw_outputs:
            if path in self.unpatched.observed and not any(self._reaches(g, path) for g in self.goals):
                value = self.unpatched.observed[path]
            else:
                value = self.layout.nodes[path](self.params_at(path), self.input(path))
            self.raw_outputs[path] = value
        return self.raw_outputs[path]

    def raw_of(self, place: Place) -> Array:
        """The output of ``place`` at its patched input, with none of its own parameters moved."""
        if not place.component.children():
            return self.raw(place.path)
        if place.outlet in self.raw_outputs and not self._moves_before_the_outlet(place):
            return self.raw_outputs[place.outlet]
        if place.component.outlet is not None:
            first, *rest = (place.parts()[i] for i in place.component.chain())
            value = self.raw_of(first)
            for part in rest:
                value = part.component(self.params_at(part.path), value)
            return value
        return place.component(self.params_at(place.path), self.input(place.inlet))

    def _moves_before_the_outlet(self, place: Place) -> bool:
        """Whether a leaf of ``place`` is steered that is not the one whose output is the place's own."""
        own = [part.path for part in place.parts()]
        return any(g != place.outlet and any(g[: len(p)] == p for p in own) for g in self.goals)

    def bound(self, path: Path) -> Params:
        new = path not in self._bound
        values = super().bound(path)
        if new and path in self.watched:
            self.watched[path](values)
        return values

    def bind(self, path: Path, values: Params) -> None:
        super().bind(path, values)
        if path in self.watched:
            self.watched[path](values)

    def leaf(self, path: Path, component: Component) -> Array:
        if path not in self.goals:
            return component(self._seen_by(path, component), self.input(path))
        x = self.input(path)
        delta = self.change(path)
        return self.raw(path) + self.goals[path].update.effect(self.params_at(path), x, delta)

    def _seen_by(self, at: Path, component: Component) -> Params:
        """The parameters as an unsteered leaf sees them: what it shares with a steered one is patched."""
        own = component.own_parameters()
        if not own:
            return self.params_at(at)
        shared = [(goal.update.param, path) for path, goal in self.goals.items() if goal.update.param in own]
        params = self.params_at(at)
        if not shared:
            return params
        return dict(params) | {str(p): added(p.value(self.params), self.change(path)) for p, path in shared}

    def change(self, path: Path) -> Delta:
        """The change of the parameter that the leaf at ``path`` moves, solved once."""
        if path not in self.solved:
            goal = self.goals[path]
            change = goal.change() if goal.change else self._solve(path, goal)
            if isinstance(change, Shift):
                base = goal.update.param.value(self.params)
                self._same_size(path, change.shaped(base), base)
            self.solved[path] = change
        return self.solved[path]

    def _solve(self, path: Path, goal: Goal) -> Delta:
        x = self.input(path)
        xp = arithmetic(x)
        x = xp.lift(x)
        if goal.delta is not None:
            delta = xp.tidy(goal.delta())
        else:
            assert goal.wanted is not None
            raw, wanted = self.raw(path), goal.wanted()
            delta = xp.tidy(xp.lift(wanted) - xp.lift(raw))
            self._same_size(path, delta, raw)
        metric = self.metrics.get(goal.update.param.name) if goal.update.kind == "linear" else None
        if self.joint is not None and self.joint.damping is not None:
            joint = self.joint if metric is None else replace(self.joint, drift=metric.drift)
            return self._solve_jointly(path, goal, x, delta, joint)
        seen = (lambda rows: rows) if metric is None else metric.seen
        if self.joint is not None:
            change = self._solve_jointly(path, goal, seen(x), delta, self.joint)
        else:
            for condition in goal.update.conditions:
                self.check(condition, x, delta)
            change = goal.update.solve(self.params_at(path), seen(x), delta)
            if path in self.others:
                change = turned(change, seen(x), seen(xp.lift(self.others[path])))
        return change if metric is None else metric.back(change, x)

    def _solve_jointly(self, path: Path, goal: Goal, x: Array, delta: Array, joint: JointOptions) -> Delta:
        way, params = goal.update.jointly, self.params_at(path)
        assert way is not None
        raw = arithmetic(delta).lift(self.raw(path))
        solved = way.solve(joint, params, x, delta, raw, self.known_at(path))
        if solved.known is not None:
            self.served_after[path] = solved.known
        self.note_shortfall(path, way.conditions[0], solved.margin)
        return solved.delta

    def note_shortfall(self, path: Path, condition: Condition, margin: Array) -> None:
        """Note how much room the tokens of a joint solution had, (T, 1), or that some of their targets are not reached."""
        assert self.joint is not None
        if not self.joint.exact:
            return
        if self.joint.may_fall_short and not arithmetic(margin).all(margin > 0):
            told = f"not all targets can be reached: {condition}"
            self.journal.took(self.layout.nodes[path].describe(), Resort.SHORT, lambda: told)
        else:
            self.journal.margins.append(Margin(condition, margin))

    def known_at(self, path: Path) -> Known | None:
        """The tokens that the leaf at ``path`` serves already, with the targets that they have now."""
        known = self.served.get(path)
        return known if known is None or path not in self.target_shift else known.moved(self.target_shift[path])

    def _same_size(self, path: Path, change: Array, changed: Array) -> None:
        if change.shape[-1] != changed.shape[-1]:
            where = self.layout.nodes[path].describe()
            numbers = Condition("there is a number for every feature that must change", where, hint=ONE_NUMBER)
            raise numbers.failed(float(changed.shape[-1] - change.shape[-1]))

    def check(self, condition: Condition, x: Array, delta: Array) -> None:
        """Test a side condition on the numbers and note its margin."""
        self.journal.margins.append(Margin(condition, measure(condition, x, delta)))

    def _reaches(self, earlier: Path, later: Path) -> bool:
        """Whether a change at ``earlier`` reaches the input of ``later``: it stands before it, or routes to it."""
        for depth, (a, b) in enumerate(zip(earlier, later, strict=False)):
            if a != b:
                return self.layout.nodes[earlier[:depth]].feeds(a, b)
        return False

    def forget(self) -> None:
        """Let go of every value and of how the goals are reached: the solved deltas and the journal stay."""
        self.goals = {path: Goal(goal.update) for path, goal in self.goals.items()}
        self.watched.clear()
        self.raw_outputs.clear()
        self.others.clear()
        for run in (self, self.unpatched, self.target):
            for held in (run.observed, run._outputs, run._inputs, run._bound):
                held.clear()

    def deltas(self) -> dict[Param, Delta]:
        """Every delta of the patch; solves what is not solved yet."""
        self.output(())
        return {goal.update.param: self.change(path) for path, goal in self.goals.items()}
