"""Level exact: the whole block on random rational numbers, roots as algebraic numbers."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from controllability.arrays import ARITHMETICS, FLOAT_CONSTANT, Array, arithmetic
from controllability.arrays.lazy import mpmath, np, sympy
from controllability.checks.rebuilt_blocks import (
    MANY,
    Named,
    mixtures,
    rebuilt,
    replace_block,
    small_sizes,
    transcendental,
)
from controllability.checks.symbolic_block import norms_steered_through
from controllability.components.activation import Activation
from controllability.components.normalisation import Normalize
from controllability.errors import NotExact, SideConditionFailed
from controllability.execution.patch import Patch
from controllability.execution.patched_run import PatchedRun
from controllability.execution.sampling import sample
from controllability.execution.trace import Trace
from controllability.interfaces import Component, JointOptions, Params, Path, leaves
from controllability.prover.derivation import Derivation
from controllability.rules import construct
from controllability.symbolic.definitions import Definitions, definitions

WRONG = 1e-15  # a residual at a random point that rounding does not explain
MORE = 3  # tokens of one patch, where plain fractions do
NESTED = 4  # activations, each of the one before: their random cubics have numbers of 3ⁿ times as many digits
INSTANCES = 20  # that are tried for one that fulfils the side conditions
T = TypeVar("T")


def exact(proof: Derivation, seed: int) -> tuple[str, str]:
    """The whole block on rational numbers; transcendental activations become a random cubic."""
    if (nested := _nested(proof.block)) > NESTED:
        raise NotExact(
            f"{nested} activations, each of the one before, give numbers of too many digits (at most {NESTED} do not)"
        )
    rng = np.random.default_rng(seed)
    cubic = tuple(int(c) for c in rng.integers(1, 4, size=4))

    rootless = proof.jointly and bool(mixtures(proof.block))  # roots of algebraic numbers do not reduce in time
    steered = norms_steered_through(*proof.root.walk())

    def rational(leaf: Component) -> Component:
        if rootless and isinstance(leaf, Normalize) and id(leaf) not in steered:
            return _Rootless(leaf)
        return Named(Activation("cubic", coefficients=cubic)) if transcendental(leaf) else leaf

    # routings with the logits as scores
    block = rebuilt(proof.block, rational, lambda routing: replace(routing, score="identity", cap=None))
    fractions = rootless and not steered
    same, sizes = replace_block(proof, block), small_sizes(block)
    if fractions:
        wide = {name: size if name in ("E", "one") else MORE + 1 for name, size in sizes.items()}  # a mean takes one
        left: list[Any] = []
        for many, repeated in ((MANY, False), (MORE, False), (MORE, True)):
            if not any(e != 0 for e in left):
                left = _in_fractions(same, seed, wide, many, repeated)
        method = (
            "residual exactly 0 in fractions on a random instance, with factors and as stored; norms without their root"
        )
        served = f"; one patch for {MANY} tokens, and for {MORE}, one of them repeated or not; two targets of one state are refused"
        return _told(block, left, method + _scores(block) + served)
    if rootless and "h" in sizes and "h" not in proof.max_tokens.values():
        sizes["h"] = 1
    tokens = (MANY,) if proof.jointly else ()

    def digits(tried: int) -> int:  # SymPy cannot compare sizes
        same.patched_run(*sample(same.block, "mpmath", tried, tokens, **sizes)).deltas()
        return tried

    with mpmath.workdps(50):
        admissible = _first_admissible(seed, digits)
    params, v, v_target = sample(block, "rational", admissible, tokens, **sizes)
    params = {name: _number(value) for name, value in params.items()}
    left = reduced_residual(same, params, _number(v), _number(v_target))
    method = "residual exactly 0 on a random rational instance, roots as algebraic numbers; as stored to 30 digits"
    method += ("; other norms without their root" if rootless else "") + _scores(block) + _choice(block)
    method += f"; one patch for {MANY} tokens" if proof.jointly else ""
    return _told(block, left, method)


def _nested(part: Component) -> int:
    """How many activations that no fraction has are computed of one another."""
    inside = [*map(_nested, part.children())] or [int(bool(transcendental(part)))]
    return sum(inside) if part.in_line else max(inside)


def _told(block: Component, left: list[Any], method: str) -> tuple[str, str]:
    if not any(e != 0 for e in left):
        return "passed", method
    floats = any(isinstance(e, float) or getattr(e, "is_Float", False) for e in left)
    return "failed", f"residual left: {left}" + (f": {FLOAT_CONSTANT}" if floats else "")


def _scores(block: Component) -> str:
    return "; the logits themselves as scores (the theorem holds for any fixed score)" if mixtures(block) else ""


@dataclass(frozen=True)
class _Rootless(Component):
    """x/(mean(x²) + ε), of x − mean(x) for "layer": a norm without its root, whose values are fractions."""

    norm: Normalize

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        if self.norm.kind == "layer":
            x = x - xp.mean(x)
        return x / (xp.mean(x * x) + xp.number(self.norm.eps))

    def describe(self) -> str:
        return f"{self.norm.describe()}, without its root"


def _in_fractions(proof: Derivation, seed: int, sizes: dict[str, Any], many: int, repeated: bool = False) -> list[Any]:
    """What is left of patched(v) − original(v') in plain fractions: with the factors of the patch, and as stored.

    If ``repeated``, the last token has the first one's state and target; and with another target it must be refused.
    """

    def solved(tried: int) -> tuple[Patch, Params, Any, Any, Any]:
        params, v, v_target = sample(proof.block, "rational", tried, (many,), **sizes)
        again = _last_as_first if repeated else lambda state: state
        return proof.construct(params, again(v), again(v_target)), params, again(v), again(v_target), v_target

    try:
        patch, params, v, v_target, other = _first_admissible(seed, solved)
    except SideConditionFailed:
        if repeated:
            return ["a repeated token with one target is refused"]
        raise
    wanted = proof.block(params, v_target)
    patched = (patch.applied_to(params), patch.merged_into(params))
    left = [e for params in patched for e in (proof.block(params, v) - wanted).reshape(-1)]
    if repeated and not _refused(proof, params, v, other):
        left.append("two targets of one state are not refused")
    return left


def _last_as_first(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(map(_last_as_first, state))
    return np.concatenate([state[:-1], state[:1]])


def _refused(proof: Derivation, params: Params, v: Any, v_target: Any) -> bool:
    try:
        proof.construct(params, v, v_target)
    except SideConditionFailed:
        return True
    return False


def _first_admissible(seed: int, solved: Callable[[int], T]) -> T:
    """What is ``solved`` by the first seed from ``seed`` on whose instance fulfils the side conditions.

    Raises ``SideConditionFailed`` if none does.
    """
    failure: Exception = NotExact("the block has no value on the instances that were tried: it divides by zero")
    for tried in range(seed, seed + INSTANCES):
        try:
            return solved(tried)
        except SideConditionFailed as failed:
            failure = failed
        except ZeroDivisionError:  # scores that sum to 0, and are divided by their sum
            continue
    raise failure


def _choice(block: Component) -> str:
    chosen = ", ".join(sorted({str(m.routing.top_k) for m in mixtures(block)}))
    return f"; assumed, as symbols have no order: the first {chosen} experts are the chosen ones" if chosen else ""


def _number(values: Any) -> Any:
    """Rationals as SymPy numbers; a tuple for a block with several inputs."""
    return tuple(map(_number, values)) if isinstance(values, tuple) else ARITHMETICS["sympy"].array(values)


class _Given(Trace):
    """The target run, every value named: for the patch they are given."""

    def _compute(self, path: Path) -> Array:
        return ARITHMETICS["sympy"].name(super()._compute(path))


class _Recognised(PatchedRun):
    """The patched run; where it has a value of the target run it goes on with that value's name."""

    def __init__(self, table: Definitions, *run: Any) -> None:
        super().__init__(*run)
        self.table, self.point = table, Point(table)

    def _compute(self, path: Path) -> Array:
        return ARITHMETICS["sympy"].each(self._recognised, super()._compute(path))  # type: ignore[attr-defined]

    def _recognised(self, value: Any) -> Any:
        while (known := self.table.known(value)) == value and not value.is_Atom and (name := self.point.name_of(value)):
            shorter = self.table.expand_newest(value)
            if shorter == value or shorter.count_ops() > value.count_ops():
                return name if self.table.reduced(value - name) == 0 else known
            value = shorter
        return known

    def stored(self) -> list[Array]:
        """What each leaf that reads a moved parameter gives with it as stored, less what it gave here: at a random point."""
        deltas = self.deltas()
        readers = [(path, leaf) for path, leaf in leaves(self.block) if deltas.keys() & {*leaf.own_parameters()}]
        with mpmath.workdps(Point.DIGITS):
            params = {name: self.point.values(value) for name, value in self.params.items()}
            moved = {
                str(p): Patch({p: d.mapped(self.point.values)}).merged_into(params)[str(p)] for p, d in deltas.items()
            }
            left = []
            for path, leaf in readers:
                bound = {name: self.point.values(value) for name, value in self.params_at(path).items()} | moved
                left.append(leaf(bound, self.point.values(self.input(path))) - self.point.values(self.output(path)))
        return left


class Point:
    """One random point at which expressions have a value; what a name stands for is computed once."""

    DIGITS = 50  # more than are relied on: terms may cancel

    def __init__(self, table: Definitions) -> None:
        self.table = table
        self._known: dict[Any, Any] = {}
        self._names: dict[str, Any] = {}  # by value
        self._seen = 0  # names that are among those

    def name_of(self, e: Any) -> Any:
        """The oldest name of something that has this value here, if there is one: else writing the value out would not show any."""
        names = [*self.table.meaning][self._seen :]
        self._seen += len(names)
        for name in names:
            self._names.setdefault(self._shown(name), name)
        return self._names.get(self._shown(e))

    def _shown(self, e: Any) -> str:
        with mpmath.workdps(self.DIGITS):
            return str(mpmath.nstr(self._value(e), self.DIGITS // 2))

    def values(self, x: Array) -> Array:
        """Every entry's value, as many-digit numbers."""
        if x.dtype != object:  # places of experts
            return x
        with mpmath.workdps(self.DIGITS):
            return ARITHMETICS["mpmath"].each(  # type: ignore[attr-defined]
                lambda e: _real(self._value(sympy.sympify(e))), x
            )

    def _value(self, e: Any) -> Any:
        if e not in self._known:
            self._known[e] = self._computed(e)
        return self._known[e]

    def _computed(self, e: Any) -> Any:
        if e.is_Symbol:
            meaning = self.table.meaning.get(e)
            return mpmath.mpf(random.Random(str(e)).uniform(0.5, 1.5)) if meaning is None else self._value(meaning)
        if e.is_Rational:
            return mpmath.mpf(e.p) / e.q
        if e is sympy.I:  # of a root that was taken apart: it is squared in the end
            return mpmath.mpc(0, 1)
        inside = [*map(self._value, e.args)]
        if e.is_Add:
            return mpmath.fsum(inside)
        if e.is_Mul:
            return mpmath.fprod(inside)
        if e.is_Pow:
            return inside[0] ** (int(e.exp) if e.exp.is_Integer else inside[1])
        if isinstance(e, sympy.core.function.AppliedUndef):  # some fixed function of all that it reads
            own = random.Random(e.func.__name__).uniform(0.5, 1.5)
            return mpmath.sin(own + mpmath.fsum((i + 1) * a for i, a in enumerate(inside)))
        known = e.func(*(sympy.Float(a, self.DIGITS) for a in inside)) if inside else e
        return mpmath.mpf(str(known.evalf(self.DIGITS)))


def _real(value: Any) -> Any:
    """A value without the imaginary part that rounding left; raises ``NotExact`` where it has another."""
    if abs(mpmath.im(value)) > WRONG * max(1, abs(value)):
        raise NotExact("a value of the instance that was tried is not real")
    return mpmath.re(value)


def reduced_residual(proof: Derivation, params: dict[str, Array], v: Any, v_target: Any) -> list[Any]:
    """The entries of patched(v) − original(v') in normal form, SymPy expressions; or what a stored parameter does else."""
    xp = ARITHMETICS["sympy"]
    with definitions() as table:
        target = _Given(proof.block, params, v_target)
        run = _Recognised(table, proof.block, params, v, target, JointOptions() if proof.jointly else None)
        construct(proof.root, run, lambda: target.output(()))
        difference = xp.tidy(run.output(()) - target.output(())).reshape(-1)
        size = max([1, *map(abs, run.point.values(target.output(()).reshape(-1)))])
        if any(abs(e) > WRONG * size for e in run.point.values(difference)):
            return list(difference)  # not 0 at a random point: expanding would never end
        for left in run.stored():
            if any(abs(e) > WRONG for e in left.reshape(-1)):
                return list(left.reshape(-1))
        return [table.reduced(e) for e in difference]
