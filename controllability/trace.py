"""Values at the nodes of an expression: computed on demand, or observed in a real run.

A node is addressed by its path: the child indices from the root.  ``Trace`` holds one run of a
block; ``PatchedRun`` is the source run with the patch of a proof, in which every delta is solved
the moment its component's input is known.  On a live model the same object is fed by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from controllability.arrays import Array, arithmetic
from controllability.components.combinators import Sequence
from controllability.components.mixture import CHOSEN, SHARES, Mixture
from controllability.deltas import Delta, ExpertLowRank, Shift, added
from controllability.errors import SideConditionFailed
from controllability.interfaces import Component, Condition, Param, Params, Steering, Together, measure
from controllability.jointly.known import Known

Path = tuple[int, ...]
NEAREST = "nearest, made good later"  # routes of a block whose rest a later one makes good: one scale that is near,
SHORT = "least squares, made good later"  # and targets that cannot all be reached
SIZED = "kept rms, sizes free"  # and of one whose sizes do not count behind it
ONE_NUMBER = "one number serves all features here: steer after it, by a map or a bias with a number for each feature"


@dataclass(frozen=True)
class Place:
    """A component and where it stands; a slice of a sequence keeps the paths of its parts."""

    component: Component
    path: Path = ()
    start: int = 0

    def parts(self) -> tuple[Place, ...]:
        """The places of the children."""
        return tuple(Place(child, (*self.path, self.start + i)) for i, child in enumerate(self.component.children()))

    def slice(self, start: int, stop: int) -> Place:
        """Parts start … stop of a sequence, as a place of their own."""
        assert isinstance(self.component, Sequence)
        if stop - start == 1:
            return self.parts()[start]
        return Place(Sequence(self.component.parts[start:stop]), self.path, self.start + start)

    @property
    def inlet(self) -> Path:
        """The node whose input is this place's input."""
        return self.parts()[0].inlet if isinstance(self.component, Sequence) else self.path

    @property
    def outlet(self) -> Path:
        """The node whose output is this place's output."""
        return self.parts()[-1].outlet if isinstance(self.component, Sequence) else self.path

    def describe(self) -> str:
        """The component's own description."""
        return self.component.describe()


def node(block: Component, path: Path) -> Component:
    """The component at ``path``."""
    for index in path:
        block = block.children()[index]
    return block


def leaves(block: Component, path: Path = ()) -> list[tuple[Path, Component]]:
    """Every leaf with its path, in the order of evaluation."""
    if not block.children():
        return [(path, block)]
    return [leaf for i, child in enumerate(block.children()) for leaf in leaves(child, (*path, i))]


class Trace:
    """One run of ``block``: state (..., d) in, node values on demand.

    ``observed`` maps paths to outputs that the real run already computed; they are not computed
    again.

    >>> import numpy as np
    >>> from controllability.components import Times
    >>> trace = Trace(Times(2) >> Times(5), {}, np.ones(1))
    >>> trace.output((0,)), trace.output(())
    (array([2.]), array([10.]))
    """

    def __init__(
        self, block: Component, params: Params, state: Array, observed: Mapping[Path, Array] | None = None
    ) -> None:
        self.block, self.params, self.state = block, params, state
        self.observed = dict(observed or {})
        self._outputs: dict[Path, Array] = dict(self.observed)
        self._inputs: dict[Path, Array] = {}
        self._bound: dict[Path, Params] = {}

    def observe_input(self, path: Path, value: Array) -> None:
        """Tell the trace what a real run fed into the node at ``path``."""
        self._inputs[path] = value

    def observe_output(self, path: Path, value: Array) -> None:
        """Tell the trace what a real run computed at ``path``."""
        self._outputs[path] = value

    def input(self, path: Path) -> Array:
        """The input of the node at ``path``."""
        if path in self._inputs:
            return self._inputs[path]
        if not path:
            return self.state
        parent, index = path[:-1], path[-1]
        component = node(self.block, parent)
        if isinstance(component, Sequence) and index > 0:
            return self.output((*parent, index - 1))
        return component.child_input(index, self.input(parent), lambda i: self.output((*parent, i)))

    def output(self, path: Path) -> Array:
        """The output of the node at ``path``."""
        if path not in self._outputs:
            self._outputs[path] = self._compute(path)
        return self._outputs[path]

    def known_output(self, path: Path) -> Array | None:
        """The output of the node at ``path`` if it was observed or computed already."""
        return self._outputs.get(path)

    def _compute(self, path: Path) -> Array:
        component = node(self.block, path)
        if not component.children():
            value = self.leaf(path, component)
        else:
            value = component.assemble(self.params_inside(path), lambda i: self.output((*path, i)))
            if isinstance(component, Sequence):
                return value
        return arithmetic(value).tidy(value)

    def bind(self, path: Path, values: Params) -> None:
        """Tell the trace what a real run bound at ``path`` (the experts that a mixture chose)."""
        self._bound[path] = dict(values)

    def bound(self, path: Path) -> Params:
        """What the component at ``path`` names for its parts."""
        if path not in self._bound:
            component = node(self.block, path)
            self._bound[path] = component.bindings(self.params, lambda i: self.output((*path, i)))
        return self._bound[path]

    def params_inside(self, path: Path) -> Params:
        """The parameters as the parts of the component at ``path`` see them: with what it binds."""
        known = self.params_at(path)
        return {**known, **self.bound(path)} if isinstance(node(self.block, path), Mixture) else known

    def params_of(self, param: Param) -> Array:
        """The stored value of a parameter."""
        return param.value(self.params)

    def params_at(self, path: Path) -> Params:
        """The parameters as the component at ``path`` sees them: with what the mixtures around it bind."""
        params = self.params
        for depth in range(len(path)):
            if path[depth] > 0 and isinstance(node(self.block, path[:depth]), Mixture):
                params = {**params, **self.bound(path[:depth])}
        return params

    def leaf(self, path: Path, component: Component) -> Array:
        """The output of a leaf at its input."""
        return component(self.params_at(path), self.input(path))


@dataclass(frozen=True, eq=False)
class Margin:
    """A side condition that was tested: how far each token's numbers, (..., 1), were from breaking it."""

    condition: Condition
    tokens: Array | None

    @property
    def value(self) -> float | None:
        """The smallest margin over the tokens; None when it is vacuous or symbolic."""
        if self.tokens is None:
            return None
        xp = arithmetic(self.tokens)
        smallest = xp.to_float(xp.min(self.tokens.reshape(-1)).reshape(()))
        return None if smallest is None or abs(smallest) == float("inf") else smallest


@dataclass(frozen=True, eq=False)
class RouteTaken:
    """How one normalised output was reached.

    ``route`` names every route that was taken, joined by "+".  ``winner`` (..., 1) says which of ``options`` each
    token took; None where all took the same.  ``amplification`` (..., 1) is None in exact arithmetics.
    """

    where: str
    route: str
    why: Callable[[], str]
    options: tuple[str, ...] = ()
    winner: Array | None = None
    amplification: Array | None = None


@dataclass
class Goal:
    """What a leaf is steered to: a wanted output, a wanted change of it, or a delta that another rule decides."""

    steering: Steering
    wanted: Callable[[], Array] | None = None
    gap: Callable[[], Array] | None = None
    delta: Callable[[], Delta] | None = None


@dataclass
class Journal:
    """What happened while a proof was executed: tested conditions and routes taken.

    It holds small arrays, one number a token; what is read off them is computed when somebody reads it.
    """

    margins: list[Margin] = field(default_factory=list)
    routes: list[RouteTaken] = field(default_factory=list)
    scale_seconds: float = 0.0  # spent on one scale for many tokens


class PatchedRun(Trace):
    """The source run with the patch: raw outputs are computed or observed, gaps solved, effects added.

    With ``together`` axis 0 runs over the tokens and there is one delta for all of them; else every token has its own.
    """

    def __init__(
        self,
        block: Component,
        params: Params,
        source: Trace | Array,
        target: Trace | Array,
        together: Together | None = None,
    ) -> None:
        known = source if isinstance(source, Trace) else Trace(block, params, source)
        super().__init__(block, params, known.state)
        self.target = target if isinstance(target, Trace) else Trace(block, params, target)
        self.unpatched = known
        self.goals: dict[Path, Goal] = {}
        self.raw_outputs: dict[Path, Array] = {}
        self.solved: dict[Path, Delta] = {}
        self.same_choice: dict[Path, tuple[Condition, Condition]] = {}
        self.journal = Journal()
        self.together = together
        self.known: Mapping[Path, Known] = {}  # tokens that the patch serves already
        self.learned: dict[Path, Known] = {}  # those and these
        self.moved: dict[Path, Array] = {}  # what the known tokens' outputs must give more, (T, ·)
        self.sizes: Array | None = None  # by which factors the block's outputs may differ from the target's, (T, 1)

    def wanted(self) -> Array:
        """What the block must give: the target's output, in the size that serves where sizes do not count."""
        output = self.target.output(())
        return output if self.sizes is None else arithmetic(output).lift(output) * self.sizes

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
                value = node(self.block, path)(self.params_at(path), self.input(path))
            self.raw_outputs[path] = value
        return self.raw_outputs[path]

    def raw_of(self, place: Place) -> Array:
        """The output of ``place`` at its patched input, with none of its own parameters moved."""
        if not place.component.children():
            return self.raw(place.path)
        parts = place.parts()
        if isinstance(place.component, Sequence):
            value = self.raw_of(parts[0])
            for part in parts[1:]:
                value = part.component(self.params_at(part.path), value)
            return value
        return place.component(self.params_at(place.path), self.input(place.inlet))

    def bound(self, path: Path) -> Params:
        new = path not in self._bound
        values = super().bound(path)
        if new and path in self.same_choice:
            self._compare_choice(path, values)
        return values

    def bind(self, path: Path, values: Params) -> None:
        super().bind(path, values)
        if path in self.same_choice:
            self._compare_choice(path, values)

    def _compare_choice(self, path: Path, values: Params) -> None:
        """The patched router must choose the experts that the target run chose."""
        near, same = self.same_choice[path]
        logits = self.target.output((*path, 0))
        try:
            self.check(near, logits, logits)
        except SideConditionFailed as tie:
            # another derivation would leave the choice to rounding: whoever asks for the target's experts must know
            tie.final = True
            raise
        here: Array = values[CHOSEN]
        there: Array = self.target.bound(path)[CHOSEN]
        same_experts: Array = (here == there) & ((values[SHARES] == 0) == (self.target.bound(path)[SHARES] == 0))
        differs = ~same_experts.all(-1).reshape(-1)
        if bool(differs.any()):
            bad = int(differs.nonzero()[0].reshape(-1)[0])
            others = int((~same_experts).reshape(-1, same_experts.shape[-1])[bad].sum())
            raise same.failed(-float(others), bad, tuple(same_experts.shape[:-1]))

    def leaf(self, path: Path, component: Component) -> Array:
        if path not in self.goals:
            return component(self._seen_by(path, component), self.input(path))
        x = self.input(path)
        delta = self.delta(path)
        if self.together is not None and isinstance(delta, ExpertLowRank):
            return self.raw(path) + delta.routed(x, self.params_at(path)[CHOSEN])
        return self.raw(path) + self.goals[path].steering.effect(x, delta)

    def _seen_by(self, at: Path, component: Component) -> Params:
        """The parameters as an unsteered leaf sees them: what it shares with a steered one is patched."""
        own = component.own_parameters()
        if not own:
            return self.params_at(at)
        shared = [(goal.steering.param, path) for path, goal in self.goals.items() if goal.steering.param in own]
        params = self.params_at(at)
        if not shared:
            return params
        return dict(params) | {str(p): added(p.value(self.params), self.delta(path)) for p, path in shared}

    def delta(self, path: Path) -> Delta:
        """The delta of the leaf at ``path``, solved once."""
        if path not in self.solved:
            goal = self.goals[path]
            delta = goal.delta() if goal.delta else self._solve(path, goal)
            if isinstance(delta, Shift):
                self._same_size(path, delta.value, goal.steering.param.value(self.params))
            self.solved[path] = delta
        return self.solved[path]

    def _solve(self, path: Path, goal: Goal) -> Delta:
        x = self.input(path)
        xp = arithmetic(x)
        x = xp.lift(x)
        if goal.gap is not None:
            gap = xp.tidy(goal.gap())
        else:
            assert goal.wanted is not None
            raw, wanted = self.raw(path), goal.wanted()
            gap = xp.tidy(xp.lift(wanted) - xp.lift(raw))
            self._same_size(path, gap, raw)
        if self.together is not None:
            return self._solve_jointly(path, goal, x, gap)
        for condition in goal.steering.conditions:
            self.check(condition, x, gap)
        return goal.steering.solve(self.params_at(path), x, gap)

    def _solve_jointly(self, path: Path, goal: Goal, x: Array, gap: Array) -> Delta:
        way, params = goal.steering.jointly, self.params_at(path)
        assert way is not None and self.together is not None
        raw = arithmetic(gap).lift(self.raw(path))
        solved = way.solve(self.together, params, x, gap, raw, self.known_at(path))
        if solved.known is not None:
            self.learned[path] = solved.known
        self.fell_short(path, way.conditions[0], solved.room)
        return solved.delta

    def fell_short(self, path: Path, condition: Condition, room: Array) -> None:
        """Note how much room the tokens of a joint solution had, (T, 1), or that some of their targets are not reached."""
        assert self.together is not None
        if not self.together.exact:
            return
        if self.together.short and not arithmetic(room).all(room > 0):
            where = node(self.block, path).describe()
            self.journal.routes.append(RouteTaken(where, SHORT, lambda: f"not all targets can be reached: {condition}"))
        else:
            self.journal.margins.append(Margin(condition, room))

    def known_at(self, path: Path) -> Known | None:
        """The tokens that the leaf at ``path`` serves already, with the targets that they have now."""
        known = self.known.get(path)
        return known if known is None or path not in self.moved else known.moved(self.moved[path])

    def _same_size(self, path: Path, change: Array, changed: Array) -> None:
        """One number cannot serve several features, though they broadcast."""
        if change.shape[-1] != changed.shape[-1]:
            where = node(self.block, path).describe()
            numbers = Condition("there is a number for every feature that must change", where, hint=ONE_NUMBER)
            raise numbers.failed(float(changed.shape[-1] - change.shape[-1]))

    def check(self, condition: Condition, x: Array, gap: Array) -> None:
        """Test a side condition on the numbers and note its margin."""
        self.journal.margins.append(Margin(condition, measure(condition, x, gap)))

    def _reaches(self, earlier: Path, later: Path) -> bool:
        """Whether a change at ``earlier`` reaches the input of ``later``: it stands before it, or routes to it."""
        for depth, (a, b) in enumerate(zip(earlier, later, strict=False)):
            if a != b:
                return a < b and isinstance(node(self.block, earlier[:depth]), Sequence | Mixture)
        return False

    def deltas(self) -> dict[Param, Delta]:
        """Every delta of the patch; solves what is not solved yet."""
        self.output(())
        return {goal.steering.param: self.delta(path) for path, goal in self.goals.items()}
