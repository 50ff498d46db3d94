"""Do these numbers fit this block?  Shapes, kinds of numbers and finiteness, before anything is computed."""

from collections.abc import Mapping
from typing import Any

from controllability.arrays import Array, arithmetic, errors_and_sizes
from controllability.arrays.lazy import np
from controllability.deltas import Delta, LowRank, PatchedMatrix
from controllability.errors import BadInput, NotVerified, SideConditionFailed
from controllability.interfaces import Layout, Param, Params


def check_instance(block: Layout, params: Params, source: Any, target: Any) -> None:
    """Raise one ``BadInput`` that lists everything in which parameters and states do not fit the ``block`` laid out.

    >>> import numpy as np
    >>> from controllability.components import Linear
    >>> from controllability.interfaces import Layout, Param
    >>> check_instance(Layout.of(Linear(Param("W", ("h", "d")))), {"W": np.zeros((3, 2))}, np.zeros(3), np.zeros(3))
    Traceback (most recent call last):
    controllability.errors.BadInput: the numbers do not fit the block: the states have width 3, the block takes 2
    """
    problems: list[str] = []
    if not isinstance(params, Mapping):
        raise BadInput(f"the parameters must be a mapping from names to arrays, got {type(params).__name__}")
    states = _states(block, source, target)
    kinds: dict[str, str] = {}
    for role, x in states:
        kinds[role] = arithmetic(x).kind
        if x.ndim == 0 or 0 in x.shape:
            raise BadInput(f"the {role} state has shape {tuple(x.shape)}: expected (..., d) with at least one token")
    several = len(set(block.inputs)) > 1  # inputs of unlike widths: then only the tokens are as many
    shapes = {tuple(x.shape[:-1] if several else x.shape) for _, x in states}
    if len(shapes) > 1:
        problems.append(", ".join(f"{role} has shape {tuple(x.shape)}" for role, x in states))
    sizes: dict[str, int] = {}
    for param in block.parameters:
        value = param.value(params)
        value = value.base if isinstance(value, PatchedMatrix) else value
        xp = arithmetic(value)
        kinds[str(param)] = xp.kind
        if not xp.is_finite(value):
            problems.append(f"{param} holds NaN or infinity")
        if not param.shape:
            continue
        shape = tuple(value.shape)[-len(param.shape) :]
        if len(shape) < len(param.shape):
            problems.append(f"{param} has shape {tuple(value.shape)}, expected {_shown(param.shape, sizes)}")
            continue
        for name, size in zip(param.shape, shape, strict=True):
            expected = sizes.setdefault(name, size) if isinstance(name, str) else name
            if size != expected:
                problems.append(f"{param} has shape {shape}, expected {_shown(param.shape, sizes)}")
                break
    for (role, x), name in zip(states, block.inputs * 2, strict=True):
        width = sizes.get(name) if isinstance(name, str) else name
        if width is not None and x.shape[-1:] != (width,):
            which = "states have" if len(block.inputs) == 1 else f"{role} has"
            problems.append(f"the {which} width {x.shape[-1] if x.shape else 0}, the block takes {width}")
            break
    if ("torch" in kinds.values()) and set(kinds.values()) != {"torch"}:
        other = next(name for name, kind in kinds.items() if kind != "torch")
        problems.append(f"torch tensors and NumPy arrays are mixed ({other} is not a tensor)")
    problems += [f"the {role} state holds NaN or infinity" for role, x in states if not arithmetic(x).is_finite(x)]
    if problems:
        raise BadInput("the numbers do not fit the block: " + "; ".join(problems))


def _states(block: Layout, source: Any, target: Any) -> list[tuple[str, Array]]:
    """Every state with its name.  Raises ``BadInput`` when a block with several inputs is not given as many."""
    count = len(block.inputs)
    if count == 1:
        return [("source", source), ("target", target)]
    for role, given in (("source", source), ("target", target)):
        if not isinstance(given, tuple | list) or len(given) != count:
            raise BadInput(f"the block has {count} inputs: give the {role} as a tuple of {count} states, each (..., d)")
    return [(f"{role} {i}", x) for role, given in (("source", source), ("target", target)) for i, x in enumerate(given)]


def _shown(shape: tuple[int | str, ...], sizes: dict[str, int]) -> str:
    return "(" + ", ".join(f"{n} = {sizes[n]}" if isinstance(n, str) and n in sizes else str(n) for n in shape) + ")"


def check_result(deltas: Mapping[Param, Delta]) -> None:
    """Raise ``SideConditionFailed`` for a patch that holds NaN or infinity: the numbers overflowed on the way."""
    for param, delta in deltas.items():
        parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta.value,)
        if not all(arithmetic(part).is_finite(part) for part in parts):
            hint = "scale the numbers, or take more precision (float64, mpmath)"
            raise SideConditionFailed("the construction stays finite", f"the patch of {param}", None, None, "", hint)


def missed(found: Array, wanted: Array, params: Params, exact: bool) -> float:
    """By how much a patched block misses its target at the worst token, relative to that token's size.

    Raises ``NotVerified`` where that is more than rounding explains, however ill the numbers are scaled, and ``exact`` was asked for.
    """
    xp = arithmetic(wanted)
    errors, sizes = map(xp.numbers, errors_and_sizes(found, wanted))
    if not np.any(errors != 0):
        return 0.0
    errors, sizes = errors.astype(float), sizes.astype(float)
    worst = float((errors / np.maximum(sizes, 1e-6 * sizes.max() + np.finfo(float).tiny)).max())
    held = [value.base if isinstance(value, PatchedMatrix) else value for value in (*params.values(), wanted)]
    rounding = max(arithmetic(x).machine_epsilon(x) for x in held if x.dtype == object or "float" in str(x.dtype))
    if exact and not worst <= max(1e-4, 3 * rounding**0.5):
        raise NotVerified(
            f"the patched block misses its target by {worst:.2g} (relative, at the worst token): these numbers magnify rounding too "
            "much; patch fewer tokens at once, scale the states, or take more precision (float64, mpmath)"
        )
    return worst
