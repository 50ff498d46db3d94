"""SymPy arrays: normal forms, names for intermediate values, index notation with every size a symbol."""

import sys
from typing import Any

from controllability.arrays import register
from controllability.symbolic.arithmetic import IndexedArithmetic, SympyArithmetic
from controllability.symbolic.indexed import IndexedArray


def _is_symbol(value: Any) -> bool:
    sympy = sys.modules.get("sympy")
    return sympy is not None and isinstance(value, sympy.Basic)


register(SympyArithmetic(), element=_is_symbol)
register(IndexedArithmetic(), array=lambda x: isinstance(x, IndexedArray))
