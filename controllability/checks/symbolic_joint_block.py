"""Level symbolic for joint proofs: the whole block on two tokens."""

from dataclasses import replace

from controllability.checks.exact_block import reduced_residual
from controllability.checks.rebuilt_blocks import MANY, each_param, mixtures, rebuilt, replace_block, small_sizes
from controllability.checks.symbolic_block import any_routings, generic
from controllability.checks.undefined_parts import ONE, SERVED, AnyNorm, GivenRouting
from controllability.execution.sampling import sample
from controllability.interfaces import Component
from controllability.prover.derivation import Derivation
from controllability.rules.mixture import OutputMixture
from controllability.rules.normalised import OutputNormalised


def whole_block(proof: Derivation) -> tuple[str, str]:
    """(status, method): patched(v_t) − original(v'_t) for two tokens of symbols, at small sizes.

    With experts any routing that gives the two tokens one expert in common; hidden width 1 within an expert.
    """
    norms = [step for step in proof.root.walk() if isinstance(step.rule, OutputNormalised)]
    if any(isinstance(step.rule, OutputMixture) for norm in norms for step in norm.walk()):  # steered through a norm
        return (
            "skipped",
            "not run: roots of what two tokens' experts add up to, all of it symbols, do not reduce in reasonable time; level exact takes rational numbers",
        )
    many = bool(mixtures(proof.block))
    change = generic(proof, AnyNorm if many else None)
    block = rebuilt(proof.block, lambda leaf: _narrow(change(leaf)), any_routings(GivenRouting))
    same, sizes = replace_block(proof, block), small_sizes(block)
    if many and "h" in sizes and "h" not in proof.max_tokens.values():  # no shared expert must tell the tokens apart
        sizes["h"] = ONE
    params, v, v_target = sample(block, "sympy", tokens=(MANY,), **sizes)
    left = reduced_residual(same, params, v, v_target)
    if any(e != 0 for e in left):
        return "failed", f"residual left: {left}"
    shown = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name != "one")
    known = "entry, ε and activation"
    if mixtures(block):
        served = " and ".join("{" + ", ".join(str(e + 1) for e in chosen) + "}" for chosen in SERVED)
        shown += f" (h = {ONE} in an expert), of which {served} serve the tokens"
        known = "entry, ε, share and activation"
    return "passed", f"residual reduced to 0 for {MANY} tokens with one patch, at {shown}: every {known} a symbol"


def _narrow(leaf: Component) -> Component:
    """Experts' maps with their hidden width at its smallest: sums over experts reduce slowly."""
    narrow: dict[int | str, int] = {"h": ONE, "2h": 2 * ONE}
    smaller = lambda p: replace(p, shape=tuple(narrow.get(size, size) for size in p.shape))  # noqa: E731
    return each_param(leaf, smaller) if leaf.per_expert else leaf
