"""Random or symbolic instances of a block: parameters and two states, for checks and for play."""

import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from controllability.arrays import ARITHMETICS, Array
from controllability.arrays.lazy import np, sympy
from controllability.errors import BadInput, within_depth
from controllability.interfaces import Component, Layout
from controllability.symbolic.indexed import IndexedArray

DEFAULT_SIZES = {
    "d": 4,
    "h": 6,
    "E": 4,
    "l": 3,
    "r": 2,
    "m": 5,
    "one": 1,
}  # width, hidden, experts, latent, rank, mixed


def symbolic_sizes(block: Component) -> dict[str, Any]:
    """Symbols for the named sizes of a block's parameters; what follows from others is written with them."""
    named = {s for p in block.parameters() for s in p.shape if isinstance(s, str)}
    names = {*map(stem, named), *DEFAULT_SIZES}
    symbols = {n: sympy.Symbol(n, integer=True, positive=True) for n in names} | {"one": 1}
    return symbols | {n: number(n, symbols) for n in named}


def stem(size: str) -> str:
    """The size that a size follows from: 2h is twice h, E+1 one more than E.

    >>> stem("2h"), stem("E+1"), stem("d")
    ('h', 'E', 'd')
    """
    return size.lstrip("0123456789").removesuffix("+1") or size


def number(size: int | str, known: Mapping[str, Any]) -> Any:
    """What a size is where the sizes that others follow from are ``known``."""
    if not isinstance(size, str) or size in known:
        return known[size] if isinstance(size, str) else size
    times = re.match(r"\d*", size)
    assert times is not None
    return int(times[0] or 1) * known[stem(size)] + int(size.endswith("+1"))


def sizes_of(block: Component, **sizes: int) -> dict[str, int]:
    """Numbers for the named sizes of a block's parameters; raises ``BadInput`` for an unknown name."""
    named = {s for p in block.parameters() for s in p.shape if isinstance(s, str)}
    usable = named | {*DEFAULT_SIZES} | {*map(stem, named)}
    for name, size in sizes.items():
        if name not in usable or isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadInput(f"size {name}={size!r}: give whole numbers from 1 on for {', '.join(sorted(usable))}")
    known = DEFAULT_SIZES | sizes
    if unknown := {n for n in named if n not in known and stem(n) not in known}:
        raise BadInput(f"give a number for size {', '.join(sorted(unknown))}")
    return {n: number(n, known) for n in named} | known


@within_depth
def sample(
    block: Component, kind: str = "numpy", seed: int = 0, tokens: tuple[int, ...] = (), **sizes: int
) -> tuple[dict[str, Array], Any, Any]:
    """(parameters, source state, target state) of a block, drawn at random or as symbols.

    ``kind`` is numpy (float64), torch (float32), rational, mpmath, sympy (real symbols) or indexed (index notation:
    every size a symbol); states have shape (*tokens, d); a block with several inputs has a tuple of them.  Raises
    ``BadInput`` when a shape is not known.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> params, v, v_target = sample(residual(Linear(Param("W", ("d", "d")))), d=3)
    >>> params["W"].shape, v.shape
    ((3, 3), (3,))
    """
    if not isinstance(block, Component):
        raise BadInput(f"sample takes a component, got {type(block).__name__}; architectures.block(name) gives one")
    if kind not in ARITHMETICS:
        raise BadInput(f"unknown kind of numbers {kind!r}: choose one of {', '.join(ARITHMETICS)}")
    known = symbolic_sizes(block) if kind == "indexed" else sizes_of(block, **sizes)
    rng = None if ARITHMETICS[kind].symbolic else np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for param in sorted(block.parameters(), key=str):
        if not param.shape:
            raise BadInput(f"the shape of {param} is not known: give Param({param.name!r}, shape=(…))")
        shapes[str(param)] = tuple(number(s, known) for s in param.shape)
    widths = Layout.of(block).inputs
    if any(width is None for width in widths):
        raise BadInput("the width of the block's input is not known: no parameter of it says so")
    shapes_in = [(*tokens, number(width, known)) for width in widths if width is not None]
    params = {name: _draw(kind, name, shape, rng) for name, shape in shapes.items()}
    v, v_target = _states(kind, shapes_in, rng)
    return (_told_apart(params, v, v_target) if kind == "sympy" else params), v, v_target


def _states(kind: str, shapes: list[tuple[int, ...]], rng: Any) -> tuple[Any, Any]:
    if len(shapes) == 1:
        return _draw(kind, "v", shapes[0], rng), _draw(kind, "v'", shapes[0], rng)
    source = tuple(_draw(kind, f"v{i + 1}", shape, rng) for i, shape in enumerate(shapes))
    return source, tuple(_draw(kind, f"v{i + 1}'", shape, rng) for i, shape in enumerate(shapes))


def _draw(kind: str, name: str, shape: tuple[int, ...], rng: Any) -> Array:
    if kind == "indexed":
        return IndexedArray.named(name, shape)
    if kind == "sympy":
        return _symbols(name, shape)
    # multiples of 1/8, never 0: exact in every arithmetic, so that all of them see the same instance
    numbers = rng.integers(1, 17, size=shape) * rng.choice([-1, 1], size=shape)
    if kind == "numpy":
        return numbers / 8.0
    if kind == "torch":
        import torch

        return torch.as_tensor(numbers / 8.0, dtype=torch.float32)
    fractions = np.array([Fraction(int(n), 8) for n in numbers.reshape(-1)], dtype=object).reshape(shape)
    return ARITHMETICS[kind].array(fractions)


def _told_apart(params: dict[str, Array], *states: Any) -> dict[str, Array]:
    """The parameters, their symbols renamed where one stands for two entries (a.up and b.up, W_111)."""

    def entries(x: Any) -> list[Any]:
        return [e for part in x for e in entries(part)] if isinstance(x, tuple) else [*np.asarray(x).reshape(-1)]

    met = Counter(e for x in (*params.values(), *states) for e in entries(x))
    apart: dict[str, Array] = {}
    for name, array in params.items():
        apart[name] = array
        if any(met[e] > 1 for e in entries(array)):
            apart[name] = np.empty(np.shape(array), dtype=object)
            for at in np.ndindex(*np.shape(array)):
                place = ",".join(str(i + 1) for i in at)
                apart[name][at] = sympy.Symbol(f"{name}[{place}]", real=True)
    return apart


def _symbols(name: str, shape: tuple[int, ...]) -> Any:
    parts = name.split(".")
    short = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
    flat = np.empty(int(np.prod(shape)), dtype=object)
    for i, index in enumerate(np.ndindex(*shape)):
        flat[i] = sympy.Symbol(f"{short}_{''.join(str(k + 1) for k in index)}", real=True)
    return flat.reshape(shape)
