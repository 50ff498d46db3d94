"""The source run with somebody else's patch: what a derivation demands of it, what it gives, and its rounding."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import starmap
from typing import Any

import numpy as np

from controllability.arrays import Array, arithmetic
from controllability.components.mixture import CHOSEN, SHARES
from controllability.deltas import Delta, LowRank, PatchedMatrix, added
from controllability.errors import SideConditionFailed
from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Component, Condition, Param, Params, Path, Place, leaves, node
from controllability.rules import Step, construct
from controllability.rules.base import Target
from controllability.rules.mixture import mixtures_in
from controllability.rules.normalised import ROUTE_CONDITIONS, OutputNormalised, scale_update
from controllability.verification.plain_numbers import floats, per_token

DRAWS, TRIES = 4, 12  # random changes that measure rounding; some may change the choice of experts
SAFETY = 16  # the rounding of a whole computation, in such changes


@dataclass(frozen=True)
class Instance:
    """A block with numbers and a patch.  ``turned`` deltas were given transposed and are not applied."""

    block: Component
    params: Params
    given: Mapping[Param, Delta]
    source: Any
    target: Any
    turned: Mapping[Param, Delta] = field(default_factory=dict)
    coarse: float = 0.0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The leading axes of the states."""
        first = self.source[0] if isinstance(self.source, tuple | list) else self.source
        return tuple(first.shape[:-1])

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the coarsest numbers that are computed with; 0 in exact arithmetic."""
        states = [*self.source] if isinstance(self.source, tuple | list) else [self.source]
        outputs = [self.block(self.params, self.target)]
        return max(self.coarse, *(arithmetic(x).machine_epsilon(x) for x in states + outputs))

    def shaken(self, epsilon: float, seed: int) -> "Instance":
        """This instance with every stored number, state and delta changed by one ``epsilon``, up or down."""
        rng = np.random.default_rng(seed)

        def shake(x: Any) -> Any:
            if isinstance(x, PatchedMatrix):
                return x
            if isinstance(x, tuple | list):
                return tuple(map(shake, x))
            xp = arithmetic(x)
            x = xp.lift(x)
            signs = _signs(rng, tuple(x.shape))
            signs = signs.astype(x.dtype) if xp.kind == "numpy" else xp.array(signs, like=x)
            return x + x * (signs * xp.number(epsilon))

        def moved(delta: Delta) -> Delta:
            if isinstance(delta, LowRank):
                return replace(delta, left=shake(delta.left), right=shake(delta.right))
            return replace(delta, value=shake(delta.value))

        params = {name: shake(value) for name, value in self.params.items()}
        given = {param: moved(delta) for param, delta in self.given.items()}
        return replace(self, params=params, given=given, source=shake(self.source), target=shake(self.target))


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random signs, one bit each: a patch may hold many numbers."""
    count = math.prod(shape)
    bits = np.unpackbits(np.frombuffer(rng.bytes(count // 8 + 1), dtype=np.uint8))[:count]
    return (bits.view(np.int8) * 2 - 1).reshape(shape)


class GivenRun(PatchedRun):
    """A patched run whose deltas are the given ones; only leaves in ``mended`` get what their rule says."""

    def __init__(self, instance: Instance, mended: frozenset[Path] = frozenset(), fit: float = 0.0) -> None:
        super().__init__(instance.block, instance.params, instance.source, instance.target)
        self.given, self.mended, self.fit = instance.given, mended, fit

    def changed(self, params: Params, own: tuple[Param, ...]) -> Params:
        """``params`` with the given changes of ``own`` on them."""
        here = {p: self.given[p] for p in own if p in self.given}
        for path in self.mended & set(self.goals):  # a parameter that another leaf shares
            if self.goals[path].update.param in own:
                here[self.goals[path].update.param] = self.change(path)
        return {**params, **{str(p): added(_base(p, params), delta) for p, delta in here.items()}}

    def leaf(self, path: Path, component: Component) -> Array:
        if path in self.mended:
            return super().leaf(path, component) if path in self.goals else self.raw(path)
        return component(self.changed(self.params_at(path), component.own_parameters()), self.input(path))

    def bound(self, path: Path) -> Params:
        if path not in self._bound:
            mixture = node(self.block, path)
            params = self.changed(self.params, mixture.own_parameters())
            self._bound[path] = mixture.bindings(params, lambda i: self.output((*path, i)))
        return self._bound[path]

    def check(self, condition: Condition, x: Array, delta: Array) -> None:
        """Side conditions are about constructing a patch, and this one is there already."""

    def scale(self, scale: Component) -> Array:
        """What a scale multiplies by, with the given change on it, mended or not: what it makes of 1."""
        weight = scale_update(scale).param
        given = {str(weight): added(_base(weight, self.params), self.given[weight])} if weight in self.given else {}
        return scale({**self.params, **given}, 1)


def _base(param: Param, params: Params) -> Array:
    base = param.value(params)
    return base.dense() if isinstance(base, PatchedMatrix) else base


class AsGiven(OutputNormalised):
    """The rule with the scale that the patch gives: any scale will do that the matrix before it goes with."""

    def __init__(self, rule: OutputNormalised) -> None:
        self.side, self.name = rule.side, rule.name.removesuffix(" jointly")

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        assert isinstance(run, GivenRun)
        inner = step.premises[0]
        scale_path, scale = scale_of(step)

        def before() -> Array:
            G = wanted()
            G = arithmetic(G).lift(G)
            if scale is None or scale_path is None:
                return _in_the_ball(step, G if scale is None else G / run.scale(scale))
            mended = any(path in run.mended and rule.startswith("O") for path, rule, _ in rules_at(inner))
            theirs = None if mended else run.output(inner.place.outlet)
            if scale_path in run.mended and theirs is not None:
                return theirs
            m = run.scale(scale)
            return self._before(step, run, G, [m, m - scale.offset] if scale.offset else [m], theirs)

        construct(inner, run, before)
        if scale is not None and scale_path is not None:
            run.steer(scale_path, Goal(scale_update(scale), wanted))

    def _before(self, step: Step, run: GivenRun, G: Array, scales: list[Array], theirs: Array | None) -> Array:
        """What must enter the normalisation so that the given scale makes G of it; ``theirs`` if the scale is to blame.

        A scale goes with some matrix when mean((G/m')²) = r²/(r²+ε), r the RMS of what a route keeps.  A scale
        that would without its offset has that mistake, and the matrix was made for the scale without.
        """
        inner = step.premises[0]
        xp, eps = arithmetic(G), _epsilon_of(step, G)
        middle = (lambda y: y - xp.mean(y)) if _norm_of(step).normalises == "layer" else (lambda y: y)
        ours = [middle(xp.lift(y)) for y in (run.raw_of(inner.place), run.target.output(inner.place.outlet))]
        if self.side == "through":
            ours.reverse()
        sizes = [xp.mean(y * y) for y in ours]
        wanted = [_quotient(xp, G, m) for m in scales]
        answer = wanted[0] * xp.sqrt(sizes[0] + eps)
        if theirs is not None:
            theirs = answer = middle(xp.lift(theirs))
            sizes.append(xp.mean(answer * answer))
        for u in reversed(wanted):
            for r2 in reversed(sizes):
                fits = abs(xp.mean(u * u) - r2 / (r2 + eps)) <= run.fit
                answer = xp.where(fits, u * xp.sqrt(r2 + eps), answer)
            if theirs is not None:
                answer = xp.where(_parallel(xp, theirs, u, run.fit), theirs, answer)
        return answer


def _quotient(xp: Any, G: Array, m: Array) -> Array:
    """u = G/m', 0 where both are 0."""
    dead = xp.is_zero(m) & xp.is_zero(G)
    return xp.where(dead, xp.zeros_like(G), G / xp.where(dead, m + 1, m))


def _epsilon_of(step: Step, like: Array) -> Any:
    return arithmetic(like).number(_norm_of(step).norm_epsilon)


def _norm_of(step: Step) -> Component:
    """The norm that a normalised output is steered through: the last one."""
    return next(part for part in reversed(step.place.component.children()) if part.normalises)


def _parallel(xp: Any, a: Array, b: Array, fit: float) -> Array:
    factor = xp.sum(a * b) / xp.or_one(xp.sum(b * b))
    return (xp.largest(a - factor * b) <= fit * xp.largest(a)) & (factor > 0)


def _in_the_ball(step: Step, u: Array) -> Array:
    """y* with n(y*) = u.  Raises ``SideConditionFailed`` where u is outside: the scale would have to move."""
    xp, eps = arithmetic(u), _epsilon_of(step, u)
    room = 1 - xp.mean(u * u)
    if not xp.all(room > 0):
        raise SideConditionFailed(ROUTE_CONDITIONS["ball"], step.place.parts()[-1].describe(), None)
    return u * xp.sqrt(eps / room)


def scale_of(step: Step) -> tuple[Path | None, Component | None]:
    """The scale of a normalised output; its path only if the derivation moves it."""
    last = step.place.parts()[-1]
    if not last.component.scales:
        return None, None
    own = scale_update(last.component).param in step.moved and step.route != "ball"
    return (last.path if own else None), last.component


def as_given(step: Step) -> Step:
    """A derivation whose normalised outputs take the scale that the patch gives."""
    rule = AsGiven(step.rule) if isinstance(step.rule, OutputNormalised) else step.rule
    return replace(step, rule=rule, premises=tuple(map(as_given, step.premises)))


@dataclass(frozen=True)
class Steered:
    """A leaf at which a rule can be compared with a patch; ``rule`` is '' where the patch moves what no rule does."""

    path: Path
    rule: str
    param: Param


def rules_at(step: Step) -> Iterator[tuple[Path, str, Param]]:
    """(leaf, rule, parameter) of everything that a derivation steers."""
    for part in step.walk():
        if part.place.component.chosen and part.update is not None:
            yield (*part.place.path, part.place.component.binds[-1]), "O-mixture", part.update.param
        elif part.update is not None:
            yield part.place.path, part.rule.name, part.update.param
        elif isinstance(part.rule, AsGiven):
            path, scale = scale_of(part)
            if path is not None and scale is not None:
                yield path, part.rule.name, scale_update(scale).param


def steered(step: Step, instance: Instance) -> list[Steered]:
    """The leaves that a derivation steers, input side first; and those that only the patch moves."""
    found = list(starmap(Steered, rules_at(step)))
    known = {leaf.path for leaf in found}
    for path, leaf in leaves(instance.block):
        for param in leaf.own_parameters():
            if param in instance.given and param not in step.moved and path not in known:
                found.append(Steered(path, "", param))
    return sorted(found, key=lambda leaf: (leaf.rule.startswith("O"), leaf.path))


@dataclass
class Measured:
    """One execution of a derivation against a patch: (demanded, given) at every leaf, (..., out) each."""

    run: GivenRun
    leaves: dict[Path, tuple[Array, Array]]
    missing: Array
    choices: list[Array]


def measure(instance: Instance, step: Step | None, mended: frozenset[Path], fit: float) -> Measured:
    """Execute ``step`` (None: nothing is demanded inside) with the given patch, ``mended`` leaves by the rules."""
    run = GivenRun(instance, mended, fit)
    found: dict[Path, tuple[Array, Array]] = {}
    with np.errstate(all="ignore"):
        if step is not None:
            construct(step, run, lambda: run.target.output(()))
            for leaf in steered(step, instance):
                if leaf.path not in mended:
                    found[leaf.path] = _compared(run, leaf)
        out, wanted = run.output(()), run.target.output(())
        xp = arithmetic(out, wanted)
        missing = xp.lift(wanted) - xp.lift(out)
    choices = [floats(run.bound(place.path)[CHOSEN]) for place in mixtures_in(Place(instance.block))]
    return Measured(run, found, missing, choices)


def _compared(run: GivenRun, leaf: Steered) -> tuple[Array, Array]:
    raw, out = run.raw(leaf.path), run.output(leaf.path)
    xp = arithmetic(raw, out)
    raw, out = xp.lift(raw), xp.lift(out)
    if not leaf.rule:
        return xp.zeros_like(raw), out - raw
    goal = run.goals[leaf.path]
    if goal.delta is None:
        assert goal.wanted is not None
        wanted = goal.wanted()
        demand, given = xp.lift(wanted) - raw, out - raw
    else:
        demand, given = goal.delta(), out - raw
    if leaf.rule == "O-mixture":
        share = shares(run, leaf.path)
        return (demand * share).sum(-2), (given * share).sum(-2)
    return demand, xp.where(other_choice(run, leaf.path, demand), demand, given)


def shares(run: GivenRun, path: Path) -> Array:
    """What the outputs of a mixture's last maps are multiplied by: (..., k, 1)."""
    value = run.params_at(path)[SHARES]
    xp = arithmetic(value)
    value = xp.lift(value)[..., None]
    return value if node(run.block, path[:-1]).joined_by == "weighted sum" else xp.zeros_like(value) + 1


def other_choice(run: GivenRun, path: Path, like: Array) -> Array:
    """Where the patch chooses other experts than the target run: what is demanded of them cannot be compared."""
    xp = arithmetic(like)
    differs = xp.zeros_like(like) != 0
    for mixture in run.watched:
        if path[: len(mixture)] == mixture != path and path[len(mixture)] in node(run.block, mixture).binds:
            here: Array = run.bound(mixture)[CHOSEN]
            other: Array = here != run.target.bound(mixture)[CHOSEN]
            differs = differs | other.any(-1)[..., None, None]
    return differs


def rounding(instance: Instance, step: Step | None, base: Measured, epsilon: float) -> dict[Path | None, Array]:
    """How far rounding moves what is missing at every leaf (None: in the output), for every token.

    Random changes of all numbers by one epsilon stand for it: the rounding of every operation is one
    of the numbers that it reads.  Changes that alter the choice of experts are no rounding.
    """
    worst: dict[Path | None, Array] = {}
    drawn = 0
    for seed in range(TRIES if epsilon else 0):
        try:
            other = measure(instance.shaken(epsilon, seed), step, base.run.mended, base.run.fit)
        except SideConditionFailed:
            continue
        if not all(map(np.array_equal, base.choices, other.choices)):
            continue
        for key, error in _errors(base).items():
            change = per_token(_errors(other)[key] - error, instance.tokens)
            worst[key] = np.maximum(worst.get(key, change), change)
        drawn += 1
        if drawn == DRAWS:
            break
    unknown = np.full(instance.tokens, np.inf if epsilon else 0.0)
    return {key: worst.get(key, unknown) for key in _errors(base)}


def _errors(measured: Measured) -> dict[Path | None, Array]:
    inside = {path: demand - given for path, (demand, given) in measured.leaves.items()}
    return {None: measured.missing, **inside}
