"""Do these numbers fit this block?  Shapes, kinds of numbers and finiteness, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping

from controllability.arrays import Array, arithmetic
from controllability.deltas import Delta, LowRank, PatchedMatrix
from controllability.errors import BadInput, SideConditionFailed
from controllability.interfaces import Component, Param, Params


def check_instance(block: Component, params: Params, source: Array, target: Array) -> None:
    """Raise one ``BadInput`` that lists everything in which parameters and states do not fit ``block``.

    >>> import numpy as np
    >>> from controllability.components import Linear
    >>> from controllability.interfaces import Param
    >>> check_instance(Linear(Param("W", ("h", "d"))), {"W": np.zeros((3, 2))}, np.zeros(3), np.zeros(3))
    Traceback (most recent call last):
    controllability.errors.BadInput: the numbers do not fit the block: the states have width 3, the block takes 2
    """
    problems: list[str] = []
    if not isinstance(params, Mapping):
        raise BadInput(f"the parameters must be a mapping from names to arrays, got {type(params).__name__}")
    for role, x in (("source", source), ("target", target)):
        arithmetic(x)
        if x.ndim == 0 or 0 in x.shape:
            raise BadInput(f"the {role} state has shape {tuple(x.shape)}: expected (..., d) with at least one token")
    kinds = {"source": arithmetic(source).kind, "target": arithmetic(target).kind}
    if source.shape != target.shape:
        problems.append(f"source has shape {tuple(source.shape)}, target {tuple(target.shape)}")
    sizes: dict[str, int] = {}
    for param in sorted(block.parameters(), key=str):
        value = param.value(params)
        value = value.base if isinstance(value, PatchedMatrix) else value
        kinds[str(param)] = arithmetic(value).kind
        if not _finite(value):
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
    width = sizes.get(block.width) if isinstance(block.width, str) else block.width
    if width is not None and source.shape[-1:] != (width,):
        problems.append(f"the states have width {source.shape[-1] if source.shape else 0}, the block takes {width}")
    if ("torch" in kinds.values()) and set(kinds.values()) != {"torch"}:
        other = next(name for name, kind in kinds.items() if kind != "torch")
        problems.append(f"torch tensors and NumPy arrays are mixed ({other} is not a tensor)")
    problems += [
        f"the {role} state holds NaN or infinity"
        for role, x in (("source", source), ("target", target))
        if not _finite(x)
    ]
    if problems:
        raise BadInput("the numbers do not fit the block: " + "; ".join(problems))


def _shown(shape: tuple[int | str, ...], sizes: dict[str, int]) -> str:
    return "(" + ", ".join(f"{n} = {sizes[n]}" if isinstance(n, str) and n in sizes else str(n) for n in shape) + ")"


def check_result(deltas: Mapping[Param, Delta]) -> None:
    """Raise ``SideConditionFailed`` for a patch that holds NaN or infinity: the numbers overflowed on the way."""
    for param, delta in deltas.items():
        parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta.value,)
        if not all(_finite(part) for part in parts):
            hint = "scale the numbers, or take more precision (float64, mpmath)"
            raise SideConditionFailed("the construction stays finite", f"the patch of {param}", None, None, "", hint)


def _finite(x: Array) -> bool:
    xp = arithmetic(x)
    return xp.exact or bool(xp.is_zero(x * 0).all())
