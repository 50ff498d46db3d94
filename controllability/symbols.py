"""Normal forms of SymPy expressions: rational functions over roots and unknown functions."""

from __future__ import annotations

from typing import Any


def normal_form(expression: Any, rounds: int = 4) -> Any:
    """Reduce an expression to a quotient of polynomials in its symbols, roots and function values.

    Roots and functions are replaced by new symbols, the rational function is cancelled, and even
    powers of a root become its radicand again; repeated until nothing changes.

    >>> import sympy
    >>> x, y = sympy.symbols("x y", positive=True)
    >>> normal_form(x**2 / (x**2 + y**2) + y**2 / (x**2 + y**2))
    1
    >>> normal_form((x / sympy.sqrt(x**2 + y)) ** 2 + y / (x**2 + y))
    1
    """
    import sympy

    expression = sympy.sympify(expression)
    for _ in range(rounds):
        if expression.is_Atom or isinstance(expression, sympy.core.function.AppliedUndef):
            return expression
        names = {atom: sympy.Dummy(positive=atom.is_positive) for atom in _opaque(expression)}
        reduced = sympy.cancel(sympy.together(expression.xreplace(names)))
        reduced = reduced.xreplace({name: atom for atom, name in names.items()})
        if reduced == expression:
            break
        expression = reduced
    return expression


def _opaque(expression: Any) -> set[Any]:
    """The largest subexpressions that are not rational functions of symbols."""
    import sympy

    found: set[Any] = set()
    pending = [expression]
    while pending:
        node = pending.pop()
        if isinstance(node, sympy.Pow) and not node.exp.is_Integer:
            found.add(sympy.sqrt(node.base) if node.exp.is_Rational and node.exp.q == 2 else node)
            if node.exp.is_Rational and node.exp.q == 2 and node.exp != sympy.Rational(1, 2):
                found.add(node)
        elif isinstance(node, sympy.Function):
            found.add(node)
        else:
            pending.extend(node.args)
    return found
