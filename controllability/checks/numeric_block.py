"""Level numeric: from bfloat16 to 50 digits against a 50-digit evaluation; the residual falls, or is 0."""

import math
from itertools import pairwise
from typing import Any

from controllability.arrays import ARITHMETICS, Array, arithmetic, relative_error
from controllability.arrays.lazy import mpmath, np
from controllability.errors import SideConditionFailed
from controllability.execution.patch import Patch
from controllability.execution.sampling import DEFAULT_SIZES, sample
from controllability.prover.derivation import Derivation

DIGITS = 50
PRECISIONS = {"bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53, "50 digits": 10.0**-DIGITS}
ROUNDING = 100  # machine epsilons that count as rounding whatever the coarser residual was
TOKENS = 3
INSTANCES = 20  # that are tried for one that fulfils the side conditions in every precision


def numeric(proof: Derivation, seed: int) -> tuple[str, str]:
    """(status, method) on a random instance of several tokens.

    Raises ``SideConditionFailed`` if the conditions fail, in some precision, on every instance that was tried.
    """
    failure: SideConditionFailed | None = None
    for tried in range(seed, seed + INSTANCES):
        try:
            residuals, plain, unpatched = residuals_of(proof, tried)
        except SideConditionFailed as failed:
            failure = failure or failed
            continue
        shown = ", ".join(f"{n} {e:.1e} (plain run {plain[n]:.1e})" for n, e in residuals.items())
        status = "passed" if falls(residuals) else "failed"
        factors = ", ".join(_factor(a, b) for a, b in pairwise(residuals.values()))
        return status, f"residual against 50 digits: {shown}; it falls by {factors}; unpatched {unpatched:.1e}"
    assert failure is not None
    raise failure


def _factor(coarse: float, fine: float) -> str:
    return f"{coarse / fine:.0e}" if fine else "everything"


def falls(residuals: dict[str, float]) -> bool:
    """Whether every residual is 0, rounding, or smaller than the one before by the root of the precisions' ratio.

    >>> falls({"float32": 1e-6, "float64": 2e-15}), falls({"float32": 1e-6, "float64": 1e-7})
    (True, False)
    """
    for (coarse, before), (fine, now) in pairwise(residuals.items()):
        expected = before * math.sqrt(PRECISIONS[fine] / PRECISIONS[coarse])
        if not now <= max(expected, ROUNDING * PRECISIONS[fine]):  # NaN does not fall
            return False
    return True


def residuals_of(proof: Derivation, seed: int) -> tuple[dict[str, float], dict[str, float], float]:
    """(patched residuals, errors of the plain target run, unpatched error), each against 50 digits."""
    sizes: dict[str, Any] = {k: 2 * n for k, n in DEFAULT_SIZES.items() if k != "one"}
    residuals: dict[str, float] = {}
    plain: dict[str, float] = {}
    with mpmath.workdps(DIGITS):
        params, v, v_target = sample(proof.block, "mpmath", seed, tokens=(TOKENS,), **sizes)
        truth = proof.block(params, v_target)
        for name in PRECISIONS:
            params, v, v_target = _drawn(proof, name, seed, sizes)
            patch = proof.construct(params, v, v_target)
            residuals[name] = relative_error(_digits(proof.block(patch.applied_to(params), v)), truth)
            if name == f"{DIGITS} digits":  # and stored as dense arrays, where no rounding hides a fault
                residuals[name] = max(residuals[name], relative_error(_as_stored(proof, patch, params, v), truth))
            plain[name] = relative_error(_digits(proof.block(params, v_target)), truth)
        unpatched = relative_error(_digits(proof.block(params, v)), truth)
    return residuals, plain, unpatched


def _as_stored(proof: Derivation, patch: Patch, params: dict[str, Any], v: Any) -> Array:
    """The block's output with each token's patch added to the stored parameters, the tokens stacked; or with one for all."""
    if proof.jointly:
        return proof.block(patch.merged_into(params), v)
    rows = []
    for t in range(TOKENS):
        alone = Patch({param: delta.row(t) for param, delta in patch.deltas.items()})
        rows.append(proof.block(alone.merged_into(params), v)[t])  # what reads other positions sees them all
    return np.stack(rows)


def _drawn(proof: Derivation, precision: str, seed: int, sizes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The same instance (eighths: exact in all of them) in one precision."""
    kind = {"float64": "numpy", "50 digits": "mpmath"}.get(precision, "torch")
    params, v, v_target = sample(proof.block, kind, seed, tokens=(TOKENS,), **sizes)
    if precision != "bfloat16":
        return params, v, v_target
    halved = {name: value.bfloat16() for name, value in params.items()}
    return halved, _halved(v), _halved(v_target)


def _halved(state: Any) -> Any:
    return tuple(map(_halved, state)) if isinstance(state, tuple) else state.bfloat16()


def _digits(x: Array) -> Array:
    if arithmetic(x).kind == "torch":
        x = x.double().numpy()
    return x if x.dtype == object else ARITHMETICS["mpmath"].array(x)
