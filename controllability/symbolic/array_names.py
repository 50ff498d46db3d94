"""Names for arrays of symbolic size, what is known of them, and their values at random points."""

import math
import random
from collections.abc import Mapping
from typing import Any

from controllability.arrays.lazy import sympy
from controllability.errors import NotExact
from controllability.symbolic.definitions import Definitions, kept
from controllability.symbolic.indexed import IndexedArray
from controllability.symbolic.normal_form import normal_form
from controllability.symbolic.sums import axis_index, heads, summed

WRONG = 1e-6  # a value at a random point that rounding does not explain


def array_named_in(table: Definitions, x: IndexedArray) -> IndexedArray:
    """The array under its name; a new one if its entry was not seen before."""
    key = (x.shape, x.entry)
    if key not in table.array_names:
        table.array_names[key] = name = f"t{len(table.array_names) + 1}"
        table.arrays[name] = x
    return IndexedArray.named(table.array_names[key], x.shape)


def known_array(table: Definitions, x: IndexedArray) -> IndexedArray:
    """The array under its name if it has one."""
    return array_named_in(table, x) if (x.shape, x.entry) in table.array_names else x


def unfold_newest(table: Definitions, expression: Any) -> Any:
    """The entry with its newest array name replaced by what it stands for, in normal form."""
    known = [n for n in heads(expression) if n in table.arrays]
    if not known:
        return expression
    newest = max(known, key=lambda name: int(name[1:]))
    return normal_form(unfolded(expression, newest, table.arrays[newest]))


def unfolded_to_zero(table: Definitions, expression: Any) -> Any:
    """The entry with array names replaced, newest first, until it is 0 or has none left.

    One that is not 0 at a random point is left as it is: writing it out would never end.
    """
    if expression != 0 and not table.relations and abs(_at_a_point(table, expression)) > WRONG:
        return expression
    while expression != 0 and expression != (expression := unfold_newest(table, expression)):
        pass
    return expression


def _at_a_point(table: Definitions, expression: Any) -> complex:
    """The value at the first random point where nothing is divided by 0; 0 where there is none."""
    for draw in range(4):
        try:
            return RandomPoint(table.arrays, draw=draw).value(expression)
        except ZeroDivisionError:
            continue
    return 0j


def named_array(x: Any) -> Any:
    """An array of symbolic size, its entry in normal form; named if definitions are being kept."""
    x = IndexedArray(x.shape, normal_form(x.entry))
    table = kept()
    return x if table is None or x.entry.is_Atom or _is_named(x) else array_named_in(table, x)


def tag(x: Any) -> Any:
    """One symbol that stands for a whole array: the name of its entries.

    A part of an array has entries of the same name, and is named anew: it is another array.
    """
    table, x = kept(), named_array(x)
    if table is not None and not x.entry.is_Atom and _shape_of(table, str(x.entry.func), x.shape) != x.shape:
        x = array_named_in(table, x)
    return sympy.Symbol(str(x.entry.func if x.entry.args and _is_named(x) else x.entry), real=True)


def _shape_of(table: Definitions, name: str, seen: Any) -> Any:
    """The shape of the array called ``name``; of one that is no definition the first that was ``seen``."""
    return table.arrays[name].shape if name in table.arrays else table.shapes.setdefault(name, seen)


def _is_named(x: Any) -> bool:
    applied = isinstance(x.entry, sympy.core.function.AppliedUndef)
    return applied and x.entry == IndexedArray.named(str(x.entry.func), x.shape).entry


def assume(expression: Any, value: Any, unknown: Any) -> None:
    """From here on ``expression``, a number times one sum in which ``unknown`` occurs, is known to be ``value``.

    Raises ``NotExact`` for any other expression: it would be said of what the unknown does not decide.
    """
    table = kept()
    assert table is not None, "relations are kept with definitions"
    expression = normal_form(expression)
    sums = [factor for factor in sympy.Mul.make_args(expression) if isinstance(factor, sympy.Sum)]
    if len(sums) != 1 or unknown not in sums[0].free_symbols or (expression / sums[0]).has(sympy.Sum, unknown):
        raise NotExact(f"{unknown} is to be the root of {expression} = {value}, which is no number times one sum of it")
    if value.has(unknown):
        raise NotExact(f"{unknown} is to be the root of an equation that has it on both sides")
    table.relations[sums[0]] = value / (expression / sums[0])


def unused(name: str) -> Any:
    """A symbol for an unknown number; every root has one of its own."""
    table = kept()
    used = len(table.relations) if table is not None else 0
    return sympy.Symbol(f"{name}{used + 1}" if used else name, real=True)


def unfolded(expression: Any, name: str, array: Any) -> Any:
    """``expression`` with every entry of the array ``name`` written out; sums are built anew around it."""
    if str(getattr(expression, "func", "")) == name:
        return array.at(expression.args)
    if expression.is_Atom:
        return _written_whole(array) if str(expression) == name else expression
    if isinstance(expression, sympy.Sum):
        if name not in heads(expression):
            return expression
        fresh = {bound: sympy.Dummy(integer=True, nonnegative=True) for bound, *_ in expression.limits}
        total = unfolded(expression.function.xreplace(fresh), name, array)
        for bound, low, high in expression.limits:  # SymPy writes sums of sums as one, the inner index first
            total = summed(total, fresh[bound], high - low + 1)
        return total
    return expression.func(*(unfolded(a, name, array) for a in expression.args))


def _written_whole(array: Any) -> Any:
    """What stands for a whole array that is written out: its shape and its entry at (…, j_1, j_0).

    These indices are the array's own: no index that is put in or summed over elsewhere reaches them.
    """
    table = kept()
    if all(n == 1 for n in array.shape):
        return array.entry
    if table is not None and _is_named(array) and table.shapes.get(str(array.entry.func)) == array.shape:
        return sympy.Symbol(str(array.entry.func), real=True)
    own = {axis_index(p): sympy.Symbol(f"j_{p}", integer=True, nonnegative=True) for p in range(array.ndim)}
    return sympy.Function("array", real=True)(array.entry.xreplace(own), *array.shape)


class RandomPoint:
    """Values of entries at a random point, with small sizes: functions become fixed random ones.

    ``arrays`` are the definitions.  Equal arguments give equal values, so that an identity holds at every point.  Values are positive
    at the first ``draw`` and of both signs at others.
    """

    def __init__(self, arrays: Mapping[str, Any], size: int = 2, draw: int = 0) -> None:
        self.arrays, self.size, self.draw = arrays, size + draw, draw
        self._known: dict[Any, complex] = {}

    def value(self, e: Any) -> complex:
        """The value of an entry; what it has no number for (a free index, a size) is drawn as well."""
        if e not in self._known:
            self._known[e] = self._value(e)
        return self._known[e]

    def _value(self, e: Any) -> complex:
        if e.is_Number:
            return complex(e)
        if isinstance(e, sympy.Sum):
            return self._total(e)
        if isinstance(e, sympy.Piecewise):
            return self.value(next(case.args[0] for case in e.args if self._holds(case.args[1])))
        if isinstance(e, sympy.KroneckerDelta):
            return complex(self.value(e.args[0]) == self.value(e.args[1]))
        head = str(e if e.is_Symbol else e.func)
        if head == "array":  # as the name of an array: what stands first in it
            return self.value(e.args[0])
        if head in self.arrays:
            return self.value(self.arrays[head].at(e.args) if e.args else self.arrays[head].entry)
        if e.is_Symbol:
            return self._symbol(head, e)
        values = [self.value(a) for a in e.args]
        if isinstance(e, sympy.core.function.AppliedUndef):
            drawn = random.Random(repr((head, [_rounded(v) for v in values])))
            size = drawn.uniform(0.5, 1.5)
            return complex(size if not self.draw or e.is_positive or drawn.random() < 0.5 else -size)
        if e.is_Pow:
            return values[0] ** values[1]
        if e.is_Add or e.is_Mul:
            return sum(values) if e.is_Add else math.prod(values, start=1 + 0j)
        return complex(e.func(*map(sympy.sympify, values)))

    def _holds(self, relation: Any) -> bool:
        """Whether a comparison of places is true here."""
        sides = [self.value(side).real for side in relation.args]
        return bool(relation.func(*sides) if sides else relation)

    def _symbol(self, name: str, symbol: Any) -> complex:
        if symbol.is_integer:
            return complex(0 if name.startswith(("i_", "j_", "k_")) else self.size)
        return complex(random.Random(name).uniform(0.5, 1.5))

    def _total(self, e: Any) -> complex:
        *inner, (bound, low, high) = e.limits
        inside = sympy.Sum(e.function, *inner) if inner else e.function
        start, stop = (round(self.value(end).real) for end in (low, high))
        return sum((self.value(inside.xreplace({bound: sympy.Integer(i)})) for i in range(start, stop + 1)), 0j)


def _rounded(value: complex) -> str:
    return f"{value.real:.9g},{value.imag:.9g}"
