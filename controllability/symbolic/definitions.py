"""Names for intermediate values of SymPy arithmetic: equal normal forms get the same name, once."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from controllability.arrays.lazy import sympy
from controllability.symbolic.normal_form import _settled, normal_form

_ACTIVE: "ContextVar[Definitions | None]" = ContextVar("definitions", default=None)


class Definitions:
    """Names for intermediate values: equal normal forms get the same name, once.

    An identity that reduces to 0 with the names as free symbols holds for whatever they stand for.
    """

    def __init__(self) -> None:
        self.meaning: dict[Any, Any] = {}
        self._names: dict[Any, Any] = {}
        self._expanded: dict[Any, Any] = {}
        self.arrays: dict[str, Any] = {}  # name -> array of symbolic size; array_names gives these names
        self.array_names: dict[Any, str] = {}
        self.shapes: dict[str, Any] = {}  # of the arrays that something was a function of
        self.relations: dict[Any, Any] = {}  # sums that are known to be something else

    def name(self, expression: Any) -> Any:
        """The name of a value; a new one if it was not seen before."""
        if expression.is_Atom:
            return expression
        if expression not in self._names:
            symbol = sympy.Symbol(f"t{len(self._names) + 1}", real=True)
            self._names[expression] = symbol
            self.meaning[symbol] = expression
        return self._names[expression]

    def known(self, expression: Any) -> Any:
        """The name of a value that has one, else the value."""
        return self._names.get(expression, expression)

    def value(self, expression: Any, seed: int = 0) -> Any:
        """The expression at a random point, to 30 digits, the same for all expressions; unknown functions become one fixed function."""
        numbers: dict[Any, Any] = {}

        def at(e: Any) -> Any:
            for symbol in sorted(e.free_symbols, key=str):
                if symbol in numbers:
                    continue  # drawn meanwhile, inside another name's meaning
                meaning = self.meaning.get(symbol)
                drawn = random.Random(f"{seed} {symbol}").uniform(0.5, 1.5)
                numbers[symbol] = sympy.Float(drawn, 30) if meaning is None else at(meaning)
            known = e.replace(lambda x: isinstance(x, sympy.core.function.AppliedUndef), lambda x: sympy.sin(x.args[0]))
            return known.evalf(30, subs=numbers)

        return at(expression)

    def expand_newest(self, expression: Any) -> Any:
        """The names of the deepest layer replaced by their definitions, in normal form."""
        depths: dict[Any, int] = {}
        for name, meaning in self.meaning.items():  # a definition uses older names only
            depths[name] = 1 + max((depths.get(s, 0) for s in meaning.free_symbols), default=0)
        deepest = max((depths.get(s, 0) for s in expression.free_symbols), default=0)
        layer = {s: self.meaning[s] for s in expression.free_symbols if depths.get(s, 0) == deepest > 0}
        return normal_form(_settled(expression.xreplace(layer))) if layer else expression

    def reduced(self, expression: Any) -> Any:
        """The normal form, names replaced layer by layer: an identity often shows before the oldest are reached."""
        while expression != (expression := self.expand_newest(expression)):
            pass
        return expression

    def expand(self, expression: Any) -> Any:
        """The expression with every name replaced by what it stands for."""
        for name, meaning in [*self.meaning.items()][len(self._expanded) :]:  # a definition uses older names only
            self._expanded[name] = self._unnamed(meaning)
        return self._unnamed(expression)

    def parts_of(self, expressions: Iterable[Any]) -> int:
        """How many parts the expressions would have with every name replaced; nothing is replaced for it."""
        parts: dict[Any, int] = {}
        for name, meaning in (*self.meaning.items(), *enumerate(expressions)):  # a definition uses older names only
            parts[name] = sum(parts.get(e, 1) if e.is_Symbol else 1 for e in sympy.preorder_traversal(meaning))
        return sum(count for name, count in parts.items() if isinstance(name, int))

    def _unnamed(self, expression: Any) -> Any:
        """Names replaced by values without names, which are not looked into: written out they have millions of parts."""
        return expression.xreplace({s: self._expanded[s] for s in expression.free_symbols if s in self._expanded})


def kept() -> Definitions | None:
    """The definitions that are being kept now."""
    return _ACTIVE.get()


@contextmanager
def definitions(table: Definitions | None = None) -> Iterator[Definitions]:
    """Within this context SymPy arithmetic names the outputs of linear maps and wanted values.

    ``table`` continues earlier definitions; without one a table that is being kept already goes on.
    """
    table = table or _ACTIVE.get() or Definitions()
    token = _ACTIVE.set(table)
    try:
        yield table
    finally:
        _ACTIVE.reset(token)


def named(expression: Any) -> Any:
    """The normal form, named if definitions are being kept."""
    reduced = normal_form(expression)
    table = _ACTIVE.get()
    return reduced if table is None else table.name(reduced)
