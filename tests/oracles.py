"""Judges that know nothing of the rules: they call a block as a function of its parameters, and nothing else.

``Function`` maps parameters (name -> array) to outputs (tokens, d); ``masks`` says which entries of
each parameter may move.  Numbers are fractions where the block is rational, else 50-digit floats.
Where the output is affine in everything that may move, any output can be reached exactly when the Jacobian
has full row rank (theory 2, independent oracle); elsewhere a generic solver tries one target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
from scipy.optimize import least_squares

Function = Callable[[Mapping[str, Any]], Any]
Masks = Mapping[str, np.ndarray]

DIGITS = 50
STRAIGHT = 1e-30  # second differences of an affine function at 50 digits, relative to the values
SURELY_BENT = 1e-6  # the same in float64: above this no rounding can be blamed
SCALES = (0.1, 1.0, 10.0, 1000.0)  # how far from the stored parameters lines are tried: kinks may be far away
LINES = 3  # lines of each scale in float64; one of each at 50 digits
DIRECTIONS = 6  # the solver's unknowns: random directions in the space of everything that may move
STEPS, STALLED = 60, 1e-4  # of each start: at most so many steps, and none that gains less than this part of the error
REACHED = 1e-9


@dataclass(frozen=True)
class Numbers:
    """One kind of exact or many-digit numbers in object arrays."""

    make: Callable[[Any], Any]
    exact: bool

    def array(self, values: Any) -> np.ndarray:
        source = np.asarray(values, dtype=object)
        flat = np.empty(source.size, dtype=object)
        flat[:] = [self.make(x) for x in source.reshape(-1)]
        return flat.reshape(source.shape)


RATIONAL, MANY_DIGITS = Numbers(Fraction, True), Numbers(mpmath.mpf, False)


def affine_jacobian(
    function_of: Callable[[Numbers], Function], values: Mapping[str, np.ndarray], masks: Masks, seed: int
) -> tuple[Numbers, dict[str, np.ndarray]] | None:
    """The Jacobian and its kind of numbers: fractions if they suffice, else 50 digits; None where it is not affine."""
    for numbers in (RATIONAL, MANY_DIGITS):
        function = function_of(numbers)
        try:
            if not is_affine(function, values, masks, numbers, seed):
                return None
            columns = jacobian(function, values, masks, numbers)
        except (ArithmeticError, ValueError, TypeError):  # a root, an exponential, an infinity: no fraction
            if numbers is RATIONAL:
                continue
            raise
        if numbers.exact and not all(isinstance(x, Fraction | int) for c in columns.values() for x in c.reshape(-1)):
            continue
        return numbers, columns
    raise AssertionError("unreachable: many digits suffice for everything")


def is_affine(function: Function, values: Mapping[str, np.ndarray], masks: Masks, numbers: Numbers, seed: int) -> bool:
    """Whether ``function`` is affine in the entries of ``masks``, on every line that is tried."""
    with mpmath.workdps(DIGITS):
        return all(
            _bend(function, base, step, numbers) <= (0 if numbers.exact else STRAIGHT)
            for base, step in _lines(values, masks, seed, 1)
        )


def surely_bent(function: Function, values: Mapping[str, np.ndarray], masks: Masks, seed: int) -> bool:
    """The same in float64, for functions that are clearly not affine: cheap."""
    with np.errstate(all="ignore"):
        return any(
            not _bend(function, base, step, None) < SURELY_BENT for base, step in _lines(values, masks, seed, LINES)
        )


def _lines(values: Mapping[str, np.ndarray], masks: Masks, seed: int, lines: int) -> Iterator[tuple[dict, dict]]:
    rng = np.random.default_rng(seed)
    for scale in SCALES * lines:
        drawn = [{name: value + 0.0 if i == 0 else value * 0.0 for name, value in values.items()} for i in range(2)]
        for parameters in drawn:
            for name, mask in masks.items():
                parameters[name] = parameters[name] + mask * rng.normal(size=mask.shape) * scale
        yield drawn[0], drawn[1]


def _bend(function: Function, base: dict, step: dict, numbers: Numbers | None) -> Any:
    """Largest violation of affinity on the line base + t·step at t = −1, 0, 1, 3, relative to the values."""

    def at(t: int) -> Any:
        if numbers is None:
            return np.asarray(function({name: base[name] + t * step[name] for name in base}), dtype=float)
        return function({name: numbers.array(base[name]) + t * numbers.array(step[name]) for name in base})

    low, middle, high, far = at(-1), at(0), at(1), at(3)
    size = max(abs(x) for x in np.concatenate([low, middle, high, far]).reshape(-1))
    bends = np.concatenate([low - 2 * middle + high, far - 3 * high + 2 * middle]).reshape(-1)
    largest = max((abs(x) for x in bends), key=_nan_last)
    return largest / size if size else largest


def _nan_last(x: Any) -> Any:
    return x if x == x else float("inf")


def jacobian(
    function: Function, values: Mapping[str, np.ndarray], masks: Masks, numbers: Numbers
) -> dict[str, np.ndarray]:
    """Parameter -> change of the output for one more of each entry that may move: (tokens, d, entries of the mask).

    The function must be affine in them: then these differences are the derivatives.
    """
    with mpmath.workdps(DIGITS):
        stored = {name: numbers.array(value) for name, value in values.items()}
        here = function(stored)
        columns = {}
        for name, mask in masks.items():
            changes = []
            for place in np.argwhere(mask):
                moved = stored[name].copy()
                moved[tuple(place)] += 1
                changes.append(function({**stored, name: moved}) - here)
            columns[name] = np.stack(changes, -1) if changes else np.empty((*here.shape, 0), dtype=object)
        return columns


def rank(matrix: np.ndarray, numbers: Numbers) -> int:
    """The rank of a small matrix by elimination with complete pivoting: exact, or to 30 of 50 digits."""
    with mpmath.workdps(DIGITS):
        rest = matrix.copy()
        zero = 0 if numbers.exact or not rest.size else max(abs(x) for x in rest.reshape(-1)) * STRAIGHT
        found = 0
        while found < min(matrix.shape):
            sizes = abs(rest)
            row, column = np.unravel_index(max(range(rest.size), key=lambda i: sizes.reshape(-1)[i]), rest.shape)
            if sizes[row, column] <= zero:
                return found
            rest = rest - np.outer(rest[:, column] / rest[row, column], rest[row])
            rest[row], rest[:, column] = numbers.make(0), numbers.make(0)
            found += 1
        return found


def solver_reaches(
    function: Function, values: Mapping[str, np.ndarray], masks: Masks, target: np.ndarray, seed: int, starts: int = 3
) -> bool:
    """Whether SciPy's least squares finds parameters whose output is ``target`` (…, d), in float64.

    The first start is at the stored parameters, the others beside them.  The unknowns are a few random
    directions (new ones at every start) in the space of everything that may move.
    """
    rng = np.random.default_rng(seed)
    free = sum(int(mask.sum()) for mask in masks.values())
    size = np.max(np.abs(target)) or 1.0
    if not free:
        return bool(np.max(np.abs(function(dict(values)) - target)) / size < REACHED)
    for start in range(starts):
        count = min(free, DIRECTIONS)
        directions = np.eye(free) if free <= DIRECTIONS else rng.normal(size=(free, count)) / count**0.5
        offset = rng.normal(size=free) * (start > 0)

        def residual(z: np.ndarray, directions: np.ndarray = directions, offset: np.ndarray = offset) -> np.ndarray:
            found = function(_moved(values, masks, offset + directions @ z))
            missing = np.nan_to_num((found - target).reshape(-1) / size, nan=1e6, posinf=1e6, neginf=-1e6)
            return np.append(missing, np.zeros(max(0, len(z) - len(missing))))  # it wants no fewer than unknowns

        with np.errstate(all="ignore"):
            answer = least_squares(
                residual,
                np.zeros(count),
                method="lm",
                max_nfev=STEPS * (count + 1),
                ftol=STALLED,
                xtol=1e-15,
                gtol=1e-15,
            )
        if np.max(np.abs(answer.fun)) < REACHED:
            return True
    return False


def _moved(values: Mapping[str, np.ndarray], masks: Masks, change: np.ndarray) -> dict[str, np.ndarray]:
    moved, used = dict(values), 0
    for name, mask in masks.items():
        count = int(mask.sum())
        moved[name] = moved[name].astype(float)
        moved[name][mask] += change[used : used + count]
        used += count
    return moved
