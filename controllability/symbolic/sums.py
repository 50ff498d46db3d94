"""Sums over an index, and the names in them."""

from functools import cache, lru_cache
from typing import Any

from controllability.arrays.lazy import sympy
from controllability.symbolic.definitions import kept
from controllability.symbolic.normal_form import normal_form, opaque


@cache
def axis_index(place: int) -> Any:
    """The index of the axis that stands ``place`` places before the last one."""
    return sympy.Symbol(f"i_{place}", integer=True, nonnegative=True)


def summed(entry: Any, index: Any, size: Any) -> Any:
    """Σ_index entry: linear in its terms, with what does not depend on the index before the sum.

    Equal sums look equal: the bound index is k_1 for a sum without sums inside, k_2 around that, and so on.

    >>> import sympy
    >>> i, n, a = sympy.Symbol("i", integer=True), sympy.Symbol("n", positive=True), sympy.Symbol("a")
    >>> x = sympy.Function("x")
    >>> summed(a * x(i) + 1, i, n)
    a*Sum(x(k_1), (k_1, 0, n - 1)) + n
    """
    above, below = sympy.fraction(normal_form(entry))
    divisors = _divisors(below)
    total = sympy.Integer(0)
    for term in sympy.Add.make_args(above):
        outside, inside = sympy.Integer(1), sympy.Integer(1)
        for factor in (*sympy.Mul.make_args(term), *divisors):
            if index in factor.free_symbols:
                inside *= factor
            else:
                outside *= factor
        total += outside * _sum_of(inside, index, size)
    return total


@lru_cache(maxsize=10_000)
def _divisors(below: Any) -> tuple[Any, ...]:
    """Factors whose product is 1/below, each with the sign that SymPy prefers."""
    if not below.has(sympy.Add):
        return tuple(1 / factor for factor in sympy.Mul.make_args(below))
    names = {atom: sympy.Dummy() for atom in opaque(below)}
    back = {name: atom for atom, name in names.items()}
    content, factors, *_ = sympy.factor_list(below.xreplace(names))
    found = []
    for factor, power in factors:
        known = factor.xreplace(back)
        if known.could_extract_minus_sign():
            known, content = -known, content * (-1) ** power
        found.append(known**-power)
    return (1 / content, *found)


def _sum_of(inside: Any, index: Any, size: Any) -> Any:
    if inside == 1:
        return size
    for factor in sympy.Mul.make_args(inside):
        if isinstance(factor, sympy.KroneckerDelta) and index in factor.args:
            (other,) = [a for a in factor.args if a != index]
            return (inside / factor).xreplace({index: other})
    levels = [int(str(limit[0])[2:]) for s in inside.atoms(sympy.Sum) for limit in s.limits]
    bound = sympy.Symbol(f"k_{1 + max(levels, default=0)}", integer=True, nonnegative=True)
    total = sympy.Sum(inside.xreplace({index: bound}), (bound, 0, size - 1))
    table = kept()
    return total if table is None else table.relations.get(total, total)


def delta(a: Any, b: Any) -> Any:
    """1 where two places, or two values that stand in places, are equal, else 0."""
    if a.func == b.func and getattr(a.func, "distinct", False) and a.args[:-1] == b.args[:-1]:
        a, b = a.args[-1], b.args[-1]  # equal values stand in one place
    return sympy.KroneckerDelta(a, b)


def again(expression: Any) -> Any:
    """The expression, its sums over comparisons of places evaluated anew: a place was put in."""
    if not expression.has(sympy.KroneckerDelta):
        return expression
    parts = [*map(again, expression.args)]
    if isinstance(expression, sympy.KroneckerDelta):
        return delta(*parts)
    if not isinstance(expression, sympy.Sum):
        return expression.func(*parts)
    total = again(expression.function)
    for bound, low, high in expression.limits:
        total = summed(total, bound, high - low + 1)
    return total


def heads(expression: Any) -> set[str]:
    """The names that occur in an entry: of arrays and of symbols."""
    applied = {e.func for e in expression.atoms(sympy.core.function.AppliedUndef)}
    return {str(name) for name in applied | expression.free_symbols}


def renamed_heads(expression: Any, names: dict[str, str]) -> Any:
    """``expression`` with arrays called otherwise, also where one stands for itself as a whole."""
    applied = expression.atoms(sympy.core.function.AppliedUndef)
    called = {e.func: sympy.Function(names[str(e.func)], real=True) for e in applied if str(e.func) in names}
    whole = {s: sympy.Symbol(names[str(s)], real=True) for s in expression.free_symbols if str(s) in names}
    return expression.xreplace(whole).replace(lambda e: e.func in called, lambda e: called[e.func](*e.args))
