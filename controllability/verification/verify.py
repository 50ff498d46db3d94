"""Does a patch do what it promises?  The residual of a block, patched and unpatched, and why it is not zero."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from controllability.arrays import arithmetic
from controllability.errors import BadInput, within_depth
from controllability.execution.patch import Patch
from controllability.execution.validation import check_instance
from controllability.interfaces import Component, Layout, Params
from controllability.symbolic.definitions import definitions
from controllability.verification import Instance, Verification, diagnose, read_patch


@within_depth
def verify(block: Component, params: Params, patch: Mapping[str, Any], source: Any, target: Any) -> Verification:
    """Hold the patched block at ``source`` against the original block at ``target``, both (..., d).

    ``patch`` is a ``Patch``, or a mapping from parameter names to what is added to them: deltas, or arrays of the
    stored shape, with the token axes of the states before it or without.  An array of the transposed shape cannot
    be added; it is left out and reported.  Raises ``BadInput`` with everything that does not fit.  Source: new.

    >>> import numpy as np
    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> block, params = residual(Linear(Param("W"))), {"W": np.eye(2)}
    >>> v, target = np.array([1.0, 2.0]), np.array([2.0, 2.0])
    >>> gap = 2 * target - 2 * v
    >>> result = verify(block, params, {"W": np.outer(gap, v) / (v @ v)}, v, target)
    >>> result.ok, result.unpatched
    (True, 0.5)
    >>> print(verify(block, params, {"W": np.outer(gap, target) / (v @ v)}, v, target))
    wrong patch: residual 0.1; unpatched 0.5; rounding explains 9e-15
    compared with theorem-1b, moving W
    1. off by 0.2: O-linear at linear W, which reads the block's input
       should hold: ΔW y = δ, y the input in the patched run, δ what the output still lacks
       looks like: the right factor is y', this input in the target run, and not divided by its own
                   norm squared; the rule takes y, the block's input in the patched run
       do: ΔW = δ yᵀ/‖y‖², y being the block's input in the patched run
    """
    for here, there in _inputs(block, source, target):
        if here.shape != there.shape:
            raise BadInput(f"source has shape {here.shape}, target {there.shape}: they are compared entry by entry")
    first = source[0] if isinstance(source, tuple | list) else source
    if arithmetic(first).symbolic:
        return _in_symbols(block, params, patch, source, target)
    check_instance(Layout.of(block), params, source, target)
    given = read_patch(block, params, patch, tuple(first.shape[:-1]))
    with np.errstate(all="ignore"):  # what overflows is found in the result, and said there
        return diagnose(Instance(block, params, given.deltas, source, target, given.turned, given.epsilon))


def _inputs(block: Any, source: Any, target: Any) -> list[tuple[Any, Any]]:
    """The arrays of the two states in pairs: more than one for a block with several inputs."""
    if not isinstance(block, Component):
        raise BadInput(f"verify takes a component, got {type(block).__name__}; architectures.block(name) gives one")
    here, there = (tuple(x) if isinstance(x, tuple | list) else (x,) for x in (source, target))
    if len(here) != len(there):
        raise BadInput(f"source has {len(here)} inputs, target {len(there)}: they are compared one by one")
    for name, states in (("source", here), ("target", there)):
        if wrong := [type(x).__name__ for x in states if not hasattr(x, "shape")] or ([] if states else ["nothing"]):
            raise BadInput(f"the {name} state must be an array (..., d), or a tuple of them, got {wrong[0]}")
    return list(zip(here, there, strict=True))


def _in_symbols(block: Component, params: Params, patch: Mapping[str, Any], source: Any, target: Any) -> Verification:
    if not isinstance(patch, Patch):
        given = read_patch(block, params, patch, ())
        if given.turned:
            return Verification(None, None, False)
        patch = Patch(given.deltas)
    xp = arithmetic(source[0] if isinstance(source, tuple | list) else source)
    with definitions(patch.definitions) as table:
        difference = xp.tidy(block(patch.applied_to(params), source) - block(params, target))
        entries = [e for e in difference.reshape(-1) if e != 0]
        zero = all(abs(table.value(e)) < 1e-15 for e in entries) and all(table.reduced(e) == 0 for e in entries)
    return Verification(None, None, zero)
