"""Arrays of symbolic size in index notation: one entry stands for all of them.

An ``IndexedArray`` of shape (h, d) with h and d symbols holds the expression of its entry (i, j).  Products
are sums over a bound index, so an identity that holds between two entries holds for every size.  The
code that runs on NumPy runs on these arrays unchanged.
"""

import operator
from collections.abc import Iterable, Sequence
from functools import cache, partialmethod, reduce
from itertools import zip_longest
from typing import Any

from controllability.arrays.lazy import np, sympy
from controllability.errors import BadInput, NotExact
from controllability.symbolic.sums import again, axis_index, delta, summed


class IndexedArray:
    """An array whose shape may hold symbols; ``entry`` is its element at (…, i_1, i_0).

    Axes of size 1 have no index, so arrays broadcast by themselves.

    >>> import sympy
    >>> x = IndexedArray.named("x", (sympy.Symbol("d", integer=True, positive=True),))
    >>> (x * x).sum(-1).entry
    Sum(x(k_1)**2, (k_1, 0, d - 1))
    """

    __array_ufunc__ = None  # NumPy leaves the operators to us

    def __init__(self, shape: tuple[Any, ...], entry: Any) -> None:
        self.shape, self.entry = shape, entry

    def __array_function__(self, function: Any, _: Any, given: Any, more: Any) -> Any:
        return concatenated(*given, **more) if function is np.concatenate else NotImplemented

    @staticmethod
    def named(name: str, shape: tuple[Any, ...]) -> "IndexedArray":
        """The array whose entries are called ``name(…, i_1, i_0)``."""
        places = IndexedArray(shape, None).indices
        entry = sympy.Function(name, real=True)(*places) if places else sympy.Symbol(name, real=True)
        return IndexedArray(shape, entry)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def indices(self) -> list[Any]:
        """The indices of the axes that are longer than 1, the first axis first."""
        return [axis_index(p) for p in reversed(range(self.ndim)) if self.shape[-1 - p] != 1]

    def at(self, places: Iterable[Any]) -> Any:
        """The entry at these places of the axes that are longer than 1."""
        return self.entry.xreplace(dict(zip(self.indices, places, strict=True)))

    def __repr__(self) -> str:
        return f"IndexedArray({self.shape}, {self.entry})"

    __hash__ = None  # type: ignore[assignment]

    def _with(self, other: Any, operation: Any) -> "IndexedArray":
        if isinstance(other, np.ndarray):
            if other.size != 1:
                return NotImplemented
            other = other.reshape(-1)[0]
        if not isinstance(other, IndexedArray):
            return IndexedArray(self.shape, operation(self.entry, sympy.sympify(_exact(other))))
        return IndexedArray(_broadcast(self.shape, other.shape), operation(self.entry, other.entry))

    __add__ = __radd__ = partialmethod(_with, operation=operator.add)
    __mul__ = __rmul__ = __and__ = __rand__ = partialmethod(_with, operation=operator.mul)
    __sub__ = partialmethod(_with, operation=operator.sub)
    __rsub__ = partialmethod(_with, operation=lambda a, b: b - a)
    __truediv__ = partialmethod(_with, operation=operator.truediv)
    __rtruediv__ = partialmethod(_with, operation=lambda a, b: b / a)
    __pow__ = partialmethod(_with, operation=operator.pow)

    def __neg__(self) -> "IndexedArray":
        return IndexedArray(self.shape, -self.entry)

    def __eq__(self, other: object) -> Any:
        """1 or 0 where it is known; an undecided comparison of places is a Kronecker delta."""
        if not isinstance(other, IndexedArray):
            return _known(self.entry == other, self.ndim)
        if self.entry == other.entry:
            return _known(True, max(self.ndim, other.ndim))
        return IndexedArray(_broadcast(self.shape, other.shape), delta(self.entry, other.entry))

    def __invert__(self) -> "IndexedArray":
        return 1 - self

    def __bool__(self) -> bool:
        """Of a comparison: one that is undecided is not known to hold."""
        return self.entry == 1

    def all(self, *_: Any, **__: Any) -> "IndexedArray":
        return _known(bool(self), 1)

    any = all

    def __or__(self, other: Any) -> "IndexedArray":
        return self + other - self * other

    def argmax(self) -> int:
        """One generic entry stands for all: the first."""
        return 0

    def swapaxes(self, a: int, b: int) -> "IndexedArray":
        """As in NumPy, for the last two axes."""
        assert {a, b} == {-1, -2}, "only the last two axes are ever swapped"
        one, two = axis_index(0), axis_index(1)
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return IndexedArray(shape, self.entry.xreplace({one: two, two: one}))

    def sum(self, axis: int, keepdims: bool = False) -> "IndexedArray":
        """The sum over one axis, counted from the end."""
        assert axis < 0, "axes are counted from the end"
        place = -1 - axis
        total = self.entry if self.shape[axis] == 1 else summed(self.entry, axis_index(place), self.shape[axis])
        if keepdims:
            shape = (*self.shape[:axis], 1, *self.shape[len(self.shape) + axis + 1 :])
            return IndexedArray(shape, total)
        places = [p for p in reversed(range(self.ndim)) if p != place]
        return self._moved(total, places, tuple(self.shape[-1 - p] for p in places))

    def __matmul__(self, other: "IndexedArray") -> "IndexedArray":
        if other.ndim == 1:
            return (self * other).sum(-1)
        left = self[..., None, :]  # (…, 1, n) against (m, n)
        right = other.swapaxes(-1, -2)
        return (left * (right if other.ndim == 2 else right[..., None, :, :])).sum(-1)

    def reshape(self, *shape: Any) -> "IndexedArray":
        """(n,) from anything with one long axis, (experts · rows, in) into (experts, rows, in) and back, and the last axis into two or back."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        long = [p for p in reversed(range(self.ndim)) if self.shape[-1 - p] != 1]
        if shape in ((-1,), ()) and len(long) <= 1:
            return self._moved(self.entry, long, tuple(self.shape[-1 - p] for p in long) or (1,) * len(shape))
        row, column, place = _places()
        first, second, third = map(axis_index, range(3))
        if shape == self.shape:
            return self
        if len(shape) == 3 and self.ndim == 2 and shape[1] == -1:
            rows = self.shape[0] / shape[0]
            return IndexedArray((shape[0], rows, shape[2]), self.entry.xreplace({second: place(third, second, rows)}))
        if len(shape) == 2 and self.ndim == 3 and shape[1] == self.shape[2]:
            at = {third: row(second, self.shape[1]), second: column(second, self.shape[1])}
            return IndexedArray(shape, self.entry.xreplace(at))
        if shape[-1:] == (-1,) and shape[:-2] == self.shape[:-1]:
            inner = sympy.sympify(self.shape[-1]) / shape[-2]
            inner = int(inner) if inner.is_Integer else inner
            raised = {axis_index(p): axis_index(p + 1) for p in range(1, self.ndim)}
            return IndexedArray(
                (*shape[:-1], inner), self.entry.xreplace(raised | {first: place(second, first, inner)})
            )
        if shape[-1:] == (-1,) and shape[:-1] == self.shape[:-2]:
            at = {second: row(first, self.shape[-1]), first: column(first, self.shape[-1])}
            lowered = {axis_index(p): axis_index(p - 1) for p in range(2, self.ndim)}
            entry = self.entry.xreplace(lowered | at)
            return IndexedArray((*self.shape[:-2], self.shape[-2] * self.shape[-1]), entry)
        raise NotExact(f"an array of shape {self.shape} cannot be reshaped to {shape} in index notation")

    def __getitem__(self, key: Any) -> "IndexedArray":
        if isinstance(key, IndexedArray):
            return self._gathered(key)
        key = key if isinstance(key, tuple) else (key,)
        taken = sum(1 for k in key if k is not None and k is not Ellipsis)
        if Ellipsis in key:
            at = key.index(Ellipsis)
            key = (*key[:at], *[slice(None)] * (self.ndim - taken), *key[at + 1 :])
        else:
            key = (*key, *[slice(None)] * (self.ndim - taken))
        return self._picked(key)

    def _picked(self, key: tuple[Any, ...]) -> "IndexedArray":
        entry, places, shape = self.entry, [], []
        axis = 0
        for part in key:
            if part is None:
                places.append(None)
                shape.append(1)
                continue
            place, size = self.ndim - 1 - axis, self.shape[axis]
            axis += 1
            if isinstance(part, int):
                entry = entry.xreplace({axis_index(place): sympy.Integer(part)})
                continue
            index, length = _sliced(part, axis_index(place), size)
            entry = entry.xreplace({axis_index(place): index})
            places.append(place)
            shape.append(length)
        return self._moved(entry, places, tuple(shape))

    def _moved(self, entry: Any, places: list[Any], shape: tuple[Any, ...]) -> "IndexedArray":
        """``entry`` whose remaining axes stood at ``places``, with their indices renamed to where they stand now."""
        last = len(places) - 1
        renamed = {axis_index(p): axis_index(last - k) for k, p in enumerate(places) if p is not None}
        return IndexedArray(shape, entry.xreplace(renamed))

    def _gathered(self, index: "IndexedArray") -> "IndexedArray":
        """``self[index]``: the first axis replaced by those of ``index``."""
        inner = self.ndim - 1
        pushed = {axis_index(p): axis_index(p + inner) for p in range(index.ndim)}
        entry = again(self.entry.xreplace({axis_index(inner): index.entry.xreplace(pushed)}))
        return IndexedArray((*index.shape, *self.shape[1:]), entry)


@cache
def _places() -> tuple[Any, Any, Any]:
    """place(i, j, n) of entry (i, j) among rows of n numbers one after the other; row(k, n) and column(k, n) undo it."""

    def evaluated(of_numbers: Any, of_itself: Any) -> Any:
        def rule(_: Any, *given: Any) -> Any:
            if all(each.is_number for each in given):
                return sympy.Integer(of_numbers(*(round(sympy.re(each)) for each in given)))
            return of_itself(*given)

        return {"eval": classmethod(rule), "is_integer": True, "is_nonnegative": True}

    def undone(which: int) -> Any:
        return lambda k, n: k.args[which] if k.func == place and k.args[2] == n else None

    def joined(i: Any, j: Any, n: Any) -> Any:
        return i.args[0] if (i.func, j.func) == (row, column) and i.args == j.args == (i.args[0], n) else None

    row = type("row", (sympy.Function,), evaluated(lambda k, n: k // n, undone(0)))
    column = type("column", (sympy.Function,), evaluated(lambda k, n: k % n, undone(1)))
    place = type("place", (sympy.Function,), evaluated(lambda i, j, n: i * n + j, joined))
    return row, column, place


def concatenated(parts: Sequence[Any], axis: int = 0) -> IndexedArray:
    """Arrays one after the other: which part an entry is of hangs on its index."""
    axis = axis if axis < 0 else axis - parts[0].ndim
    index, start, cases = axis_index(-1 - axis), sympy.Integer(0), []
    for part in parts:
        cases.append((part.entry.xreplace({index: index - start}), index < start + part.shape[axis]))
        start += part.shape[axis]
    shapes = ([1 if i == part.ndim + axis else n for i, n in enumerate(part.shape)] for part in parts)
    shape = [*reduce(_broadcast, map(tuple, shapes))]
    shape[axis] = start
    return IndexedArray(tuple(shape), sympy.Piecewise(*cases[:-1], (cases[-1][0], True)))


def _exact(value: Any) -> Any:
    """Python and NumPy numbers as exact ones."""
    if isinstance(value, float):
        return sympy.Rational(repr(value))
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, bool) else value


def _known(truth: bool, ndim: int) -> IndexedArray:
    return IndexedArray((1,) * ndim, sympy.Integer(bool(truth)))


def _sliced(part: Any, index: Any, size: Any) -> tuple[Any, Any]:
    """(index in the old axis, length) of a slice, or of a list that repeats a size of 1."""
    if isinstance(part, list):
        assert size == 1, "lists repeat an axis of size 1"
        return index, len(part)
    start, step = part.start or 0, part.step or 1
    stop = size if part.stop is None else part.stop
    length = (stop - start) if step == 1 else size / step
    if length == 1:  # an axis of size 1 has no index
        return sympy.Integer(start), 1
    return (index if (start, step) == (0, 1) else start + step * index), length


def _broadcast(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    shape = []
    for one, two in zip_longest(reversed(a), reversed(b), fillvalue=1):
        if one != two and 1 not in (one, two):
            raise BadInput(f"shapes {a} and {b} do not broadcast")
        shape.append(two if one == 1 else one)
    return tuple(reversed(shape))
