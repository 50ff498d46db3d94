"""Normal forms of SymPy expressions: rational functions over roots and unknown functions."""

from functools import lru_cache
from typing import Any

from controllability.arrays.lazy import sympy

ROUNDS = 4  # of naming roots and functions and cancelling: nested ones show one after the other


def normal_form(expression: Any) -> Any:
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
    return _normal_form(sympy.sympify(expression))


@lru_cache(maxsize=20_000)
def _normal_form(expression: Any) -> Any:
    for _ in range(ROUNDS):
        if expression.is_Atom or isinstance(expression, sympy.core.function.AppliedUndef):
            return expression
        names, meaning = {}, {}
        roots: dict[Any, Any] = {}
        atoms = opaque(expression)
        halves = [a for a in atoms if isinstance(a, sympy.Pow) and (2 * a.exp).is_Integer]
        taken = [_root(atom.base) for atom in halves]
        alone = {radicand for _, radicands in taken for radicand, _ in radicands}
        for atom, (factor, radicands) in zip(halves, taken, strict=True):  # A^(k/2) is a power of one root
            for radicand, sign in ((part, sign) for whole, sign in radicands for part in _parts(whole, alone)):
                name = roots.setdefault(radicand, sympy.Dummy(positive=radicand.is_positive))
                factor, meaning[name] = factor * name**sign, sympy.sqrt(radicand)
            names[atom] = factor ** (2 * atom.exp)
        for atom in atoms:
            if atom not in names:
                name = sympy.Dummy(positive=atom.is_positive)
                names[atom], meaning[name] = name, atom
        plain = expression.xreplace(names)
        quotient = any(isinstance(p, sympy.Pow) and p.exp.is_negative for p in sympy.preorder_traversal(plain))
        reduced = sympy.cancel(sympy.together(plain)) if quotient else sympy.expand(plain)
        reduced = reduced.xreplace(meaning)
        if reduced == expression:
            break
        expression = reduced
    return expression


def _settled(expression: Any) -> Any:
    """The expression with the arguments of roots and functions in normal form: equal ones must look equal."""
    inside = {atom: atom.func(*(normal_form(_settled(a)) for a in atom.args)) for atom in opaque(expression)}
    return expression.xreplace(inside)


def _root(base: Any) -> tuple[Any, list[tuple[Any, int]]]:
    """√base as a rational factor times roots (or their inverses): √(A/B) = √A/√B, and numbers leave a root.

    Bases are positive: what is normalised by, and sums of squares.  So √(4A) and 2√A look equal.
    """
    factor, found = sympy.Integer(1), []
    for part, sign in zip(sympy.fraction(sympy.together(base)), (1, -1), strict=True):
        content, primitive = part.as_content_primitive()
        inside = 1
        for prime, power in sympy.factorint(content.p * content.q).items():
            factor *= sympy.Integer(prime) ** (sign * (power // 2))
            inside *= prime ** (power % 2)
        factor /= sympy.Integer(content.q) ** sign
        square, primitive = _square_part(primitive)
        factor *= square**sign
        found += [(r, sign) for r in (sympy.Integer(inside), primitive) if r != 1]
    return factor, found


def _parts(radicand: Any, alone: set[Any]) -> list[Any]:
    """The factors of a product under a root that stand under roots of their own too, and what is left: √(AB) = √A·√B."""
    own = [part for part in radicand.args if part in alone] if radicand.is_Mul else []
    for part in own:
        radicand = radicand / part
    return [radicand, *own] if radicand != 1 else own


def _square_part(expression: Any) -> tuple[Any, Any]:
    """(A, B) with expression = A²·B, A a product of factors that cannot be negative."""
    if not expression.is_Add:  # products are taken apart by SymPy itself
        return sympy.Integer(1), expression
    names = {atom: sympy.Dummy() for atom in opaque(expression)}
    back = {name: atom for atom, name in names.items()}
    content, factors, *_ = sympy.factor_list(expression.xreplace(names))
    square, rest = sympy.Integer(1), content
    for part, power in factors:
        part = part.xreplace(back)
        whole = power // 2 if _nonnegative(part) else 0
        square, rest = square * part**whole, rest * part ** (power - 2 * whole)
    return square, rest


def _nonnegative(expression: Any) -> bool:
    """Whether an expression is a sum of products of squares, roots and positive symbols."""
    if isinstance(expression, sympy.Add | sympy.Mul):
        return all(map(_nonnegative, expression.args))
    if isinstance(expression, sympy.Sum):
        return _nonnegative(expression.function)
    if isinstance(expression, sympy.Pow):
        power = expression.exp
        even, rooted = power % 2 == 0 and expression.base.is_real, power.is_Rational and not power.is_Integer
        return bool(even or rooted) or _nonnegative(expression.base)
    return bool(expression.is_nonnegative)


def opaque(expression: Any) -> set[Any]:
    """The largest subexpressions that are not rational functions of symbols."""
    found: set[Any] = set()
    pending = [expression]
    while pending:
        node = pending.pop()
        if (isinstance(node, sympy.Pow) and not node.exp.is_Integer) or isinstance(node, sympy.Function | sympy.Sum):
            found.add(node)
        else:
            pending.extend(node.args)
    return found
