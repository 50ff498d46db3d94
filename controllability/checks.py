"""The levels of proof (theory, section 6): what is run at each, and what it showed.

derived    the tree follows the rules; nothing is computed
symbolic   every leaf rule as an identity in generic coordinates, and the whole block at d = 2, h = 3
exact      the whole block on random rational numbers, roots as algebraic numbers: residual exactly 0
numeric    float32, float64 and 50 digits: the residual must fall with the precision, or be 0

Mixtures have h = 2 and one expert more than a token goes to in the first two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from controllability.arrays import ARITHMETICS, Array, arithmetic, relative_error
from controllability.components.activation import FORMULAS, Activation
from controllability.components.combinators import Product, Sequence, Sum
from controllability.components.fixed import Fixed
from controllability.components.glu import XIELU, Glu, Swish
from controllability.components.mixture import CHOSEN, SHARES, ExpertLinear, Mixture
from controllability.components.normalisation import Normalize
from controllability.components.routing import Routing
from controllability.errors import BadInput, NotExact, SideConditionFailed
from controllability.interfaces import Component, Params
from controllability.rules import Step, construct
from controllability.rules.mixture import OutputMixture
from controllability.sampling import DEFAULT_SIZES, sample
from controllability.symbols import Definitions, definitions
from controllability.trace import PatchedRun, Path, Place, Trace

if TYPE_CHECKING:
    from controllability.proof import Proof

LEVELS = ("derived", "symbolic", "exact", "numeric")
DERIVED = {"2h": "h", "E+1": "E"}  # sizes that follow from others
SMALL = {"d": 2, "h": 3, "one": 1}
WRONG = 1e-15  # a residual at a random point that 30 digits do not explain
RATIONAL_ACTIVATIONS = ("identity", "relu", "relu2")
INSTANCES = 20  # that are tried for one that fulfils the side conditions
TOP = 2  # experts that are steered in the identity of I-experts


def check(proof: Proof, level: str, seed: int = 0) -> list[dict[str, Any]]:
    """Run a level's checks: [{rule, status: passed | failed | skipped, method}].

    Raises ``BadInput`` for an unknown level.
    """
    if level not in LEVELS:
        raise BadInput(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    if level == "derived":
        return [_result(rule, "passed", "applied with all its premises by the prover") for rule in proof.rules]
    whole = {"symbolic": _symbolic, "exact": _exact, "numeric": _numeric}[level]
    results = _leaf_identities(proof) if level == "symbolic" else []
    started = time.perf_counter()
    try:
        status, method = whole(proof, seed)
    except (NotExact, SideConditionFailed) as reason:
        status, method = "skipped", str(reason).splitlines()[0]
    results.append(_result("whole block", status, f"{method} ({time.perf_counter() - started:.1f} s)"))
    return results


def _result(rule: str, status: str, method: str) -> dict[str, Any]:
    return {"rule": rule, "status": status, "method": method}


@dataclass(frozen=True)
class _Named(Component):
    """``inner``, its values named: what is computed from them stays small."""

    inner: Component

    def __call__(self, params: Params, x: Array) -> Array:
        value = self.inner(params, x)
        return arithmetic(value).name(value)

    def describe(self) -> str:
        return self.inner.describe()


def rebuilt(
    block: Component, change: Callable[[Component], Component], route: Callable[[Routing], Routing] = lambda r: r
) -> Component:
    """The same expression with every leaf passed through ``change`` and every routing through ``route``."""

    def again(part: Component) -> Component:
        return rebuilt(part, change, route)

    if isinstance(block, Sequence):
        return Sequence(tuple(map(again, block.parts)))
    if isinstance(block, Sum):
        return Sum(tuple(map(again, block.terms)))
    if isinstance(block, Product):
        return Product(tuple(map(again, block.factors)))
    if isinstance(block, Mixture):
        router, inner, last = map(again, block.children())
        return Mixture(router, route(block.routing), inner, last, block.weighted)
    if isinstance(block, Glu):
        return _Named(replace(block, activation=again(block.activation)))
    if isinstance(block, Fixed):
        return Fixed(again(block.inner))
    return change(block)


def _mixtures(block: Component) -> list[Mixture]:
    inside = [mixture for child in block.children() for mixture in _mixtures(child)]
    return [block, *inside] if isinstance(block, Mixture) else inside


def _transcendental(leaf: Component) -> str:
    """The name of an activation that no rational function computes; '' for everything else."""
    if isinstance(leaf, Activation):
        return leaf.name if leaf.name in FORMULAS and leaf.name not in RATIONAL_ACTIVATIONS else ""
    return "swish" if isinstance(leaf, Swish) else "xielu" if isinstance(leaf, XIELU) else ""


def _leaf_identities(proof: Proof) -> list[dict[str, Any]]:
    """Each leaf rule used: raw output + effect of the delta − wanted output reduces to 0 in symbols."""
    results: dict[str, dict[str, Any]] = {}
    for step in proof.root.walk():
        if step.steering is None or step.rule.name in results:
            continue
        identity = _mixture_identity if isinstance(step.place.component, Mixture) else _leaf_identity
        left, method = identity(step)
        status = "passed" if all(e == 0 for e in left.reshape(-1)) else "failed"
        results[step.rule.name] = _result(step.rule.name, status, method)
    return list(results.values())


def _leaf_identity(step: Step) -> tuple[Array, str]:
    """(W + ΔW)x − Wx − δ for one leaf, an expert's map for several experts at once."""
    assert step.steering is not None
    leaf, xp = step.place.component, ARITHMETICS["sympy"]
    experts = isinstance(leaf, ExpertLinear)
    params, x, _ = sample(leaf, "sympy", tokens=(TOP,) if experts else (), **_sizes(leaf))
    bound = params | {CHOSEN: np.arange(TOP)} if experts else params
    y = leaf(bound, x)
    gap = _symbols("delta", y.shape)
    delta = step.steering.solve(bound, x, gap)
    left = xp.tidy(step.steering.effect(x, delta) - gap)
    method = f"(W + ΔW)x − Wx − δ reduced to 0 with symbolic entries, size {x.shape[-1]} → {y.shape[-1]}"
    if delta_is_vector(delta):
        method = method.replace("W", "θ")
    return left, method + (f", for {TOP} chosen experts" if experts else "")


def _mixture_identity(step: Step) -> tuple[Array, str]:
    """Σ_j s_j (W_j + ΔW_j) y_j − Σ_j s_j W_j y_j − δ for symbolic shares and activations."""
    mixture, xp = step.place.component, ARITHMETICS["sympy"]
    assert isinstance(mixture, Mixture)
    assert isinstance(mixture.last, ExpertLinear)
    k = mixture.routing.top_k
    params, y, _ = sample(mixture.last, "sympy", tokens=(k,), **_sizes(mixture))
    bound = {CHOSEN: np.arange(k), SHARES: _symbols("s", (k,))}
    with definitions():
        raw = mixture.assemble(bound, lambda _: mixture.last(params | bound, y))
        gap = _symbols("delta", raw.shape)
        run = PatchedRun(mixture, params, y[0], y[0])  # its state is not read: what the last maps see is given
        run.bind((), bound)
        run.observe_input((2,), y)
        alone = Step(step.rule, Place(mixture), (), step.moved, step.conditions, steering=step.steering)
        OutputMixture().construct(alone, run, lambda: raw + gap)
        left = xp.tidy(run.output(()) - raw - gap)
    size = f"{k} experts, size {y.shape[-1]} → {len(gap)}"
    return left, f"Σ_j s_j ΔW_j y_j − δ reduced to 0 with symbolic entries, {size}"


def delta_is_vector(delta: object) -> bool:
    """Whether a delta changes a vector parameter."""
    from controllability.deltas import Shift

    return isinstance(delta, Shift)


def _symbols(name: str, shape: tuple[int, ...]) -> Array:
    import sympy

    flat = np.empty(int(np.prod(shape)), dtype=object)
    flat[:] = [sympy.Symbol(f"{name}_{i + 1}", real=True) for i in range(len(flat))]
    return flat.reshape(shape)


def _symbolic(proof: Proof, seed: int) -> tuple[str, str]:
    """The whole block with symbols for every entry, ε and the activation."""
    import sympy

    eps = sympy.Symbol("epsilon", positive=True)

    def generic(leaf: Component) -> Component:
        if isinstance(leaf, Normalize):
            return replace(leaf, eps=eps)
        name = _transcendental(leaf)
        return Activation(f"phi_{name}", symbol=True) if name else leaf

    block = rebuilt(proof.block, generic)
    sizes = _sizes(block)
    params, v, v_target = sample(block, "sympy", seed, **sizes)
    left = reduced_residual(replace_block(proof, block), params, v, v_target)
    if any(e != 0 for e in left):
        return "failed", f"residual left: {left}"
    shown = ", ".join(f"{k} = {n}" for k, n in sizes.items())
    return "passed", f"residual reduced to 0 with symbolic entries, ε and activation at {shown}" + _choice(block)


def _exact(proof: Proof, seed: int) -> tuple[str, str]:
    """The whole block on rational numbers; transcendental activations become a random cubic."""
    rng = np.random.default_rng(seed)
    cubic = tuple(int(c) for c in rng.integers(1, 4, size=4))

    def rational(leaf: Component) -> Component:
        return _Named(Activation("cubic", coefficients=cubic)) if _transcendental(leaf) else leaf

    block = rebuilt(proof.block, rational, _linear_scores)
    same, sizes = replace_block(proof, block), _sizes(block)
    params, v, v_target = sample(block, "rational", _admissible(same, sizes, seed), **sizes)
    params = {name: _number(value) for name, value in params.items()}
    left = reduced_residual(same, params, _number(v), _number(v_target))
    if any(e != 0 for e in left):
        return "failed", f"residual left: {left}"
    method = "residual exactly 0 on a random rational instance, roots as algebraic numbers"
    scores = "; the logits themselves as scores (the theorem holds for any fixed score)" if _mixtures(block) else ""
    return "passed", method + scores + _choice(block)


def _admissible(proof: Proof, sizes: dict[str, Any], seed: int) -> int:
    """The first seed from ``seed`` on whose instance fulfils the side conditions: SymPy cannot compare sizes.

    Raises ``SideConditionFailed`` if none does.
    """
    import mpmath

    failure: Exception = NotExact("the block has no value on the instances that were tried: it divides by zero")
    for tried in range(seed, seed + INSTANCES):
        with mpmath.workdps(50):
            try:
                proof.patched_run(*sample(proof.block, "mpmath", tried, **sizes)).deltas()
            except SideConditionFailed as failed:
                failure = failed
            except ZeroDivisionError:  # scores that sum to 0, and are divided by their sum
                continue
            else:
                return tried
    raise failure


def _choice(block: Component) -> str:
    chosen = ", ".join(sorted({str(m.routing.top_k) for m in _mixtures(block)}))
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


def reduced_residual(proof: Proof, params: dict[str, Array], v: Any, v_target: Any) -> list[Any]:
    """The entries of patched(v) − original(v') in normal form, SymPy expressions."""
    xp = ARITHMETICS["sympy"]
    with definitions() as table:
        target = _Given(proof.block, params, v_target)
        run = _Recognised(table, proof.block, params, v, target)
        construct(proof.root, run, lambda: target.output(()))
        difference = xp.tidy(run.output(()) - run.target.output(()))
        if any(abs(table.value(e)) > WRONG for e in difference.reshape(-1)):
            return list(difference.reshape(-1))  # not 0 at a random point: expanding would never end
        return [table.reduced(e) for e in difference.reshape(-1)]


def replace_block(proof: Proof, block: Component) -> Proof:
    """The same question about another instance of the block (other ε, other activation)."""
    from controllability.prover import prove

    known = {name for p in block.parameters() for name in (p.name, str(p))}  # a learned activation may be gone
    return prove(block, proof.via, proof.route, proof.frozen & known)  # type: ignore[arg-type]


def _numeric(proof: Proof, seed: int) -> tuple[str, str]:
    """float32, float64 and 50 digits on one random instance of several tokens."""
    import mpmath

    sizes: dict[str, Any] = {k: 2 * n for k, n in DEFAULT_SIZES.items() if k != "one"}
    errors: dict[str, float] = {}
    with mpmath.workdps(50):
        for kind, name in (("torch", "float32"), ("numpy", "float64"), ("mpmath", "50 digits")):
            params, v, v_target = sample(proof.block, kind, seed, tokens=(3,), **sizes)
            patch = proof.construct(params, v, v_target)
            found = proof.block(patch.applied_to(params), v)
            errors[name] = relative_error(found, proof.block(params, v_target))
            if kind == "numpy":
                unpatched = relative_error(proof.block(params, v), proof.block(params, v_target))
    falls = errors["50 digits"] <= 1e-40 and errors["float64"] <= 1e-10 and errors["float32"] <= 1e-3
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return "passed" if falls else "failed", f"residual: {shown}; unpatched {unpatched:.1e}"


def _sizes(block: Component) -> dict[str, Any]:
    """Small numbers for the named sizes; what follows from them is left to ``sample``."""
    named = {s for p in block.parameters() for s in p.shape if isinstance(s, str)}
    mixtures = _mixtures(block)
    small = SMALL | {"h": 2, "E": max(_experts(m.routing) for m in mixtures)} if mixtures else SMALL
    named = (named - set(DERIVED)) | {DERIVED[name] for name in named & set(DERIVED)}
    return {name: small.get(name, 2) for name in sorted(named)}


def _experts(routing: Routing) -> int:
    """One expert more than are chosen, in groups that can be compared."""
    groups = routing.groups[0] if routing.groups else 1
    members = max(-(-(routing.top_k + 1) // groups), routing.group_best if routing.groups else 1)
    return groups * members
