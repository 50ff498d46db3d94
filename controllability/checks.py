"""The levels of proof (theory, section 6): what is run at each, and what it showed.

derived    the tree follows the rules; nothing is computed
symbolic   every leaf rule as an identity in generic coordinates, and the whole block at d = 2, h = 3
exact      the whole block on random rational numbers, roots as algebraic numbers: residual exactly 0
numeric    float32, float64 and 50 digits: the residual must fall with the precision, or be 0
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from controllability.arrays import ARITHMETICS, Array, relative_error
from controllability.components.activation import FORMULAS, Activation
from controllability.components.combinators import Product, Sequence, Sum
from controllability.components.normalisation import Normalize
from controllability.errors import BadInput, NotExact, SideConditionFailed
from controllability.interfaces import Component
from controllability.sampling import DEFAULT_SIZES, sample
from controllability.symbols import definitions

if TYPE_CHECKING:
    from controllability.proof import Proof

LEVELS = ("derived", "symbolic", "exact", "numeric")
SMALL = {"d": 2, "h": 3}
WRONG = 1e-15  # a residual at a random point that 30 digits do not explain
RATIONAL_ACTIVATIONS = ("identity", "relu", "relu2")


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


def rebuilt(block: Component, change: Callable[[Component], Component]) -> Component:
    """The same expression with every leaf passed through ``change``."""
    if isinstance(block, Sequence):
        return Sequence(tuple(rebuilt(p, change) for p in block.parts))
    if isinstance(block, Sum):
        return Sum(tuple(rebuilt(t, change) for t in block.terms))
    if isinstance(block, Product):
        return Product(tuple(rebuilt(f, change) for f in block.factors))
    return change(block)


def _leaf_identities(proof: Proof) -> list[dict[str, Any]]:
    """Each leaf rule used: raw output + effect of the delta − wanted output reduces to 0 in symbols."""
    results: dict[str, dict[str, Any]] = {}
    for step in proof.root.walk():
        if step.steering is None or step.rule.name in results:
            continue
        leaf, xp = step.place.component, ARITHMETICS["sympy"]
        params, x, _ = sample(leaf, "sympy", **_sizes(leaf))
        y = leaf(params, x)
        gap = _symbols("delta", y.shape)
        delta = step.steering.solve(params, x, gap)
        left = xp.tidy(step.steering.effect(x, delta) - gap)
        status = "passed" if all(e == 0 for e in left) else "failed"
        method = f"(W + ΔW)x − Wx − δ reduced to 0 with symbolic entries, size {x.shape[-1]} → {y.shape[-1]}"
        results[step.rule.name] = _result(
            step.rule.name, status, method.replace("W", "θ") if delta_is_vector(delta) else method
        )
    return list(results.values())


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
        if isinstance(leaf, Activation) and leaf.name in FORMULAS and leaf.name not in RATIONAL_ACTIVATIONS:
            return Activation(f"phi_{leaf.name}", symbol=True)
        return leaf

    block = rebuilt(proof.block, generic)
    sizes = _sizes(block)
    params, v, v_target = sample(block, "sympy", seed, **sizes)
    left = reduced_residual(replace_block(proof, block), params, v, v_target)
    status = "passed" if all(e == 0 for e in left) else "failed"
    shown = ", ".join(f"{k} = {n}" for k, n in sizes.items())
    return (
        status,
        f"residual reduced to 0 with symbolic entries, ε and activation at {shown}"
        if status == "passed"
        else f"residual left: {left}",
    )


def _exact(proof: Proof, seed: int) -> tuple[str, str]:
    """The whole block on rational numbers; transcendental activations become a random cubic."""
    rng = np.random.default_rng(seed)
    cubic = tuple(int(c) for c in rng.integers(1, 4, size=4))

    def rational(leaf: Component) -> Component:
        if isinstance(leaf, Activation) and leaf.name in FORMULAS and leaf.name not in RATIONAL_ACTIVATIONS:
            return Activation("cubic", coefficients=cubic)
        return leaf

    block = rebuilt(proof.block, rational)
    xp = ARITHMETICS["sympy"]
    params, v, v_target = sample(block, "rational", seed, **_sizes(block))
    params = {name: xp.array(value) for name, value in params.items()}
    left = reduced_residual(replace_block(proof, block), params, xp.array(v), xp.array(v_target))
    status = "passed" if all(e == 0 for e in left) else "failed"
    return (
        status,
        "residual exactly 0 on a random rational instance, roots as algebraic numbers"
        if status == "passed"
        else f"residual left: {left}",
    )


def reduced_residual(proof: Proof, params: dict[str, Array], v: Array, v_target: Array) -> list[Any]:
    """The entries of patched(v) − original(v') in normal form, SymPy expressions."""
    xp = ARITHMETICS["sympy"]
    with definitions() as table:
        run = proof.patched_run(params, v, v_target)
        difference = xp.tidy(run.output(()) - run.target.output(()))
        if any(abs(table.value(e)) > WRONG for e in difference.reshape(-1)):
            return list(difference.reshape(-1))  # not 0 at a random point: expanding would never end
        while any(e != 0 and e.free_symbols & set(table.meaning) for e in difference.reshape(-1)):
            difference = xp.tidy(xp.each(table.expand_once, difference))  # type: ignore[attr-defined]
        return list(difference.reshape(-1))


def replace_block(proof: Proof, block: Component) -> Proof:
    """The same question about another instance of the block (other ε, other activation)."""
    from controllability.prover import prove

    return prove(block, proof.via, proof.route, proof.frozen)  # type: ignore[arg-type]


def _numeric(proof: Proof, seed: int) -> tuple[str, str]:
    """float32, float64 and 50 digits on one random instance of several tokens."""
    import mpmath

    sizes: dict[str, Any] = {k: 2 * n for k, n in DEFAULT_SIZES.items()}
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
    named = {s for p in block.parameters() for s in p.shape if isinstance(s, str)}
    return {name: SMALL.get(name, 2) for name in sorted(named)}
