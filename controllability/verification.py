"""Does a patch do what it promises?  The residual of a block, patched and unpatched."""

from __future__ import annotations

from dataclasses import dataclass

from controllability.arrays import Array, arithmetic, relative_error
from controllability.errors import BadInput
from controllability.interfaces import Component, Params
from controllability.patch import Patch
from controllability.symbols import definitions


@dataclass(frozen=True)
class Verification:
    """``residual`` and the negative control ``unpatched``: max |difference| / max |target|.

    ``exact`` says that the difference is exactly 0: with symbols, that every entry reduced to 0 (the
    numbers are then None).
    """

    residual: float | None
    unpatched: float | None
    exact: bool


def verify(block: Component, params: Params, patch: Patch, source: Array, target: Array) -> Verification:
    """Hold the patched block at ``source`` against the original block at ``target``, both (..., d).

    Raises ``BadInput`` when the two states have different shapes.

    >>> import numpy as np
    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.prover import prove
    >>> block, params = residual(Linear(Param("W"))), {"W": np.eye(2)}
    >>> v, target = np.array([1.0, 2.0]), np.array([2.0, 2.0])
    >>> result = verify(block, params, prove(block, via="output").construct(params, v, target), v, target)
    >>> result.residual, result.unpatched
    (0.0, 0.5)
    """
    pairs = zip(*(x if isinstance(x, tuple | list) else (x,) for x in (source, target)), strict=True)
    for here, there in pairs:
        if here.shape != there.shape:
            raise BadInput(f"source has shape {here.shape}, target {there.shape}: they are compared entry by entry")
    xp = arithmetic(source[0] if isinstance(source, tuple | list) else source)
    if xp.kind == "sympy":
        with definitions(patch.definitions) as table:
            difference = xp.tidy(block(patch.applied_to(params), source) - block(params, target))
            entries = [e for e in difference.reshape(-1) if e != 0]
            zero = all(abs(table.value(e)) < 1e-15 for e in entries) and all(table.reduced(e) == 0 for e in entries)
        return Verification(None, None, zero)
    found, wanted = block(patch.applied_to(params), source), block(params, target)
    error = relative_error(found, wanted)
    return Verification(error, relative_error(block(params, source), wanted), error == 0)
