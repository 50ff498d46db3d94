"""Level exact: the whole block on random rational numbers, roots as algebraic numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from controllability.arrays import ARITHMETICS, Array, arithmetic
from controllability.checks.instances import (
    MANY,
    Named,
    mixtures,
    rebuilt,
    replace_block,
    small_sizes,
    together_of,
    tokens_of,
    transcendental,
)
from controllability.components.activation import Activation
from controllability.components.normalisation import Normalize
from controllability.components.routing import Routing
from controllability.errors import NotExact, SideConditionFailed
from controllability.interfaces import Component, Params
from controllability.patch import Patch
from controllability.rules import construct
from controllability.rules.normalised import OutputNormalised
from controllability.sampling import sample
from controllability.symbols import Definitions, definitions
from controllability.trace import PatchedRun, Path, Trace, leaves

if TYPE_CHECKING:
    from controllability.proof import Proof

WRONG = 1e-15  # a residual at a random point that 30 digits do not explain
INSTANCES = 20  # that are tried for one that fulfils the side conditions


def exact(proof: Proof, seed: int) -> tuple[str, str]:
    """The whole block on rational numbers; transcendental activations become a random cubic."""
    rng = np.random.default_rng(seed)
    cubic = tuple(int(c) for c in rng.integers(1, 4, size=4))

    def rational(leaf: Component) -> Component:
        return Named(Activation("cubic", coefficients=cubic)) if transcendental(leaf) else leaf

    block = rebuilt(proof.block, rational, _linear_scores)
    fractions = _fractions_do(proof)
    if fractions:
        block = rebuilt(block, _without_root)
    same, sizes = replace_block(proof, block), small_sizes(block)
    if fractions:
        left = _in_fractions(same, seed, sizes)
        method = (
            "residual exactly 0 in fractions on a random instance, with factors and as stored; norms without their root"
        )
        return _told(block, left, method + _scores(block) + _many(proof))
    tokens = tokens_of(proof)
    params, v, v_target = sample(block, "rational", _admissible(same, sizes, seed), tokens, **sizes)
    params = {name: _number(value) for name, value in params.items()}
    left = reduced_residual(same, params, _number(v), _number(v_target))
    method = "residual exactly 0 on a random rational instance, roots as algebraic numbers; as stored to 30 digits"
    return _told(block, left, method + _scores(block) + _choice(block) + _many(proof))


def _told(block: Component, left: list[Any], method: str) -> tuple[str, str]:
    return ("failed", f"residual left: {left}") if any(e != 0 for e in left) else ("passed", method)


def _scores(block: Component) -> str:
    return "; the logits themselves as scores (the theorem holds for any fixed score)" if mixtures(block) else ""


def _many(proof: Proof) -> str:
    return f"; one patch for {MANY} tokens" if proof.jointly else ""


def _fractions_do(proof: Proof) -> bool:
    """Whether plain fractions are the way: experts and many tokens at once, which SymPy does not reduce in time.

    A norm that something is steered through needs its root.
    """
    steered = any(isinstance(step.rule, OutputNormalised) for step in proof.root.walk())
    return proof.jointly and bool(mixtures(proof.block)) and not steered


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


def _without_root(leaf: Component) -> Component:
    return _Rootless(leaf) if isinstance(leaf, Normalize) else leaf


def _in_fractions(proof: Proof, seed: int, sizes: dict[str, Any]) -> list[Any]:
    """What is left of patched(v) − original(v') in plain fractions: with the factors of the patch, and as stored."""
    failure: Exception = NotExact("the block has no value on the instances that were tried: it divides by zero")
    for tried in range(seed, seed + INSTANCES):
        params, v, v_target = sample(proof.block, "rational", tried, tokens_of(proof), **sizes)
        try:
            patch = proof.construct(params, v, v_target)
        except SideConditionFailed as failed:
            failure = failed
        except ZeroDivisionError:  # scores that sum to 0, and are divided by their sum
            continue
        else:
            wanted = proof.block(params, v_target)
            patched = (patch.applied_to(params), patch.merged_into(params))
            return [e for params in patched for e in (proof.block(params, v) - wanted).reshape(-1)]
    raise failure


def _admissible(proof: Proof, sizes: dict[str, Any], seed: int) -> int:
    """The first seed from ``seed`` on whose instance fulfils the side conditions: SymPy cannot compare sizes.

    Raises ``SideConditionFailed`` if none does.
    """
    import mpmath

    failure: Exception = NotExact("the block has no value on the instances that were tried: it divides by zero")
    for tried in range(seed, seed + INSTANCES):
        with mpmath.workdps(50):
            try:
                proof.patched_run(*sample(proof.block, "mpmath", tried, tokens_of(proof), **sizes)).deltas()
            except SideConditionFailed as failed:
                failure = failed
            except ZeroDivisionError:  # scores that sum to 0, and are divided by their sum
                continue
            else:
                return tried
    raise failure


def _choice(block: Component) -> str:
    chosen = ", ".join(sorted({str(m.routing.top_k) for m in mixtures(block)}))
    return f"; assumed, as symbols have no order: the first {chosen} experts are the chosen ones" if chosen else ""


def _linear_scores(routing: Routing) -> Routing:
    """The same routing with the logits as scores."""
    return replace(routing, score="identity", cap=None)


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
        self.table = table

    def _compute(self, path: Path) -> Array:
        return ARITHMETICS["sympy"].each(self._recognised, super()._compute(path))  # type: ignore[attr-defined]

    def _recognised(self, value: Any) -> Any:
        while (known := self.table.known(value)) == value and not value.is_Atom:
            shorter = self.table.expand_newest(value)
            if shorter == value or shorter.count_ops() > value.count_ops():
                break
            value = shorter
        return known

    def stored(self) -> list[Array]:
        """What each leaf that reads a moved parameter gives with it as stored, less what it gave here: to 30 digits."""
        import mpmath

        deltas = self.deltas()
        patched = {str(p): Patch({p: d}).merged_into(self.params)[str(p)] for p, d in deltas.items()}
        readers = [(path, leaf) for path, leaf in leaves(self.block) if deltas.keys() & {*leaf.own_parameters()}]
        with mpmath.workdps(30):
            moved = {name: self._digits(value) for name, value in patched.items()}
            left = []
            for path, leaf in readers:
                params = {name: self._digits(value) for name, value in self.params_at(path).items()} | moved
                left.append(leaf(params, self._digits(self.input(path))) - self._digits(self.output(path)))
        return left

    def _digits(self, x: Array) -> Array:
        if x.dtype != object:  # places of experts
            return x
        import mpmath

        return ARITHMETICS["mpmath"].each(  # type: ignore[attr-defined]
            lambda e: mpmath.mpf(str(self.table.value(e))), x
        )


def reduced_residual(proof: Proof, params: dict[str, Array], v: Any, v_target: Any) -> list[Any]:
    """The entries of patched(v) − original(v') in normal form, SymPy expressions; or what a stored parameter does else."""
    xp = ARITHMETICS["sympy"]
    with definitions() as table:
        target = _Given(proof.block, params, v_target)
        run = _Recognised(table, proof.block, params, v, target, together_of(proof))
        construct(proof.root, run, lambda: target.output(()))
        difference = xp.tidy(run.output(()) - target.output(())).reshape(-1)
        if any(abs(table.value(e)) > WRONG for e in difference):
            return list(difference)  # not 0 to 30 digits: expanding would never end
        for left in run.stored():
            if any(abs(e) > WRONG for e in left.reshape(-1)):
                return list(left.reshape(-1))
        return [table.reduced(e) for e in difference]
