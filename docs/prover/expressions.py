"""Blocks as text: read by a grammar of components, literals and ``>> + *``, never run as Python; and written as such text."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any, Literal, get_args, get_origin, get_type_hints

import architectures
import controllability.components as components
from controllability.errors import BadInput, in_a_line, within_depth
from controllability.interfaces import Component, Param
from controllability.prover.edits import nodes

CHARACTERS, PARTS = 20_000, 400  # of one expression: a browser has one thread and little memory
SIGNS: dict[type, tuple[str, Callable[[Any, Any], Any]]] = {
    ast.RShift: (">>", lambda f, g: f >> g),
    ast.Add: ("+", lambda f, g: f + g),
    ast.Mult: ("*", lambda f, g: f * g),
}
TAKEN = "an expression takes components, names, numbers, strings, tuples, and the signs >> + *"


def known() -> dict[str, Callable[..., Any]]:
    """What an expression may call: the components, the four compositions of the package, ``Param`` and ``block`` (of a family)."""
    made = ("residual", "gated", "rms_norm", "layer_norm")
    found = {name: value for name, value in vars(components).items() if isinstance(value, type) or name in made}
    return found | {"Param": Param, "slice": slice, "block": architectures.block}


@within_depth
def read(text: str) -> Component:
    """The block that a text says: assignments (``up = …``), then an expression.  Raises ``BadInput`` for anything else.

    >>> read('f = Linear(Param("W", ("d", "d")))\\nresidual(f >> Activation("silu"))').describe()
    'identity + (linear W >> activation silu)'
    >>> read("open('/etc/passwd')")
    Traceback (most recent call last):
    controllability.errors.BadInput: line 1, column 1: there is no component open
    """
    if len(text) > CHARACTERS:
        raise BadInput(f"the expression has {len(text):,} characters: at most {CHARACTERS:,} are read here")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a string's escapes, to a console that nobody asked
            lines = ast.parse(text.strip()).body
    except SyntaxError as error:
        near = (error.text or "").strip()
        where = f"line {error.lineno}, column {error.offset}" if near else "its end"
        raise BadInput(f"the expression does not parse at {where}{f': {near:.80}' if near else ''}") from None
    except (ValueError, MemoryError) as error:
        raise BadInput(f"the expression does not parse: {in_a_line(error)}") from None
    if not lines or not isinstance(lines[-1], ast.Expr):
        raise BadInput("there is no expression: end with one, for example residual(up >> down)")
    reader = _Reader()
    for line in lines[:-1]:
        reader.assign(line)
    found = reader.value(lines[-1].value)
    if not isinstance(found, Component):
        raise BadInput(f"the last line must be a component, and is {type(found).__name__}: {found!r:.80}")
    return found


class _Reader:
    """Values of names that were assigned, and of nodes."""

    def __init__(self) -> None:
        self.known, self.names = known(), dict[str, Any]()

    def assign(self, line: ast.stmt) -> None:
        if not isinstance(line, ast.Assign) or len(line.targets) != 1:
            raise _refused(line, "before the last line only assignments are taken, such as up = Linear(…)")
        (target,) = line.targets
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        value = self.value(line.value)
        values = value if isinstance(target, ast.Tuple) else (value,)
        if not isinstance(values, tuple) or len(names) != len(values):
            raise _refused(line, f"{len(names)} names are assigned and not as many values")
        for name, each in zip(names, values, strict=True):
            if not isinstance(name, ast.Name):
                raise _refused(line, "only names are assigned")
            self.names[name.id] = each

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
            return node.value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(map(self.value, node.elts))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = node.operand.value
            if not isinstance(value, int | float):
                raise _refused(node, TAKEN)
            return -value
        if isinstance(node, ast.Name):
            if node.id not in self.names:
                raise _refused(node, self._unknown("nothing is called", node.id))
            return self.names[node.id]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._called(node, node.func.id)
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            sign, join = SIGNS[type(node.op)]
            sides = self.value(node.left), self.value(node.right)
            for side in sides:
                if not isinstance(side, Component):
                    raise _refused(node, f"{sign} stands between components, not beside {side!r:.60}")
            return _counted(join(*sides), node)
        raise _refused(node, TAKEN)

    def _called(self, node: ast.Call, name: str) -> Any:
        if name not in self.known:
            raise _refused(node, self._unknown("there is no component", name))
        given = [self.value(each) for each in node.args]
        if any(keyword.arg is None for keyword in node.keywords):
            raise _refused(node, TAKEN)
        named = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        try:
            return _counted(self.known[name](*given, **named), node)
        except BadInput as error:
            raise _refused(node, str(error)) from None
        except (TypeError, ValueError, AttributeError) as error:  # the wrong number or kind of arguments
            raise _refused(node, f"{name}: {in_a_line(error)}") from None

    def _unknown(self, what: str, name: str) -> str:
        near = get_close_matches(name, [*self.known, *self.names], n=1)
        return f"{what} {name}" + (f": did you mean {near[0]}?" if near else "")


def _refused(node: ast.expr | ast.stmt, why: str) -> BadInput:
    return BadInput(f"line {node.lineno}, column {node.col_offset + 1}: {why}")


def _counted(found: Any, node: ast.expr) -> Any:
    if isinstance(found, Component) and len([*islice(nodes(found), PARTS + 1)]) > PARTS:
        raise _refused(node, f"the block has more than {PARTS} parts: the page takes no more, the package does")
    return found


def written(part: Any) -> str:
    """The text that ``read`` makes this block of.

    >>> written(read('up = Linear(Param("up", ("h", "d")))\\nresidual(up >> Activation("silu"))'))
    'residual(Linear(Param("up", ("h", "d"))) >> Activation("silu"))'
    """
    if isinstance(part, components.Sequence):
        return " >> ".join(_bracketed(each) for each in part.parts)
    if isinstance(part, components.Sum) and len(part.terms) == 2:
        if part.terms[0] == components.Identity():
            return f"residual({written(part.terms[1])})"
        return " + ".join(map(_bracketed, part.terms))
    if isinstance(part, components.Product) and len(part.factors) == 2:
        return " * ".join(map(_bracketed, part.factors))
    if isinstance(part, tuple):
        return f"({', '.join(map(written, part))}{',' if len(part) == 1 else ''})"
    if isinstance(part, slice):
        return f"slice({part.start}, {part.stop}, {part.step})"
    if not is_dataclass(part):
        return '"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' if isinstance(part, str) else repr(part)
    given, skipped = [], False
    for field in fields(part):
        value = getattr(part, field.name)
        skipped = skipped or same(value, field.default)
        if not same(value, field.default):
            given.append(f"{field.name}={written(value)}" if skipped else written(value))
    return f"{type(part).__name__}({', '.join(given)})"


def same(value: Any, default: Any) -> bool:
    """Whether a field has its default: 1 is not 1.0, nor True."""
    return default is not MISSING and type(value) is type(default) and value == default


def _bracketed(part: Component) -> str:
    text = written(part)
    joined = isinstance(part, components.Sequence | components.Sum | components.Product)
    return f"({text})" if joined and not text.startswith("residual(") and not _called_as_one(part) else text


def _called_as_one(part: Component) -> bool:
    return isinstance(part, components.Sum | components.Product) and len(part.children()) != 2


def outline(part: Component) -> dict[str, Any]:
    """The block as a tree that the page shows and edits: joined parts, and leaves with their fields."""
    for kind, sign in ((components.Sequence, ">>"), (components.Sum, "+"), (components.Product, "*")):
        if isinstance(part, kind):
            parts = list(part.children())
            if sign == "+" and len(parts) == 2 and parts[0] == components.Identity():
                sign, parts = "residual", parts[1:]
            return {"sign": sign, "parts": [outline(each) for each in parts]}
    hints, told = get_type_hints(type(part)), []
    for position, field in enumerate(fields(part)):  # type: ignore[arg-type]
        value, hint = getattr(part, field.name), hints[field.name]
        item = {"field": field.name, "position": position}
        if isinstance(value, Param) and not value.index:
            told.append({**item, "kind": "param", "name": value.name, "shape": ", ".join(map(str, value.shape))})
        elif get_origin(hint) is Literal:
            default = None if field.default is MISSING else field.default
            told.append({**item, "kind": "choice", "value": value, "default": default, "choices": get_args(hint)})
        elif isinstance(value, str) and not same(value, field.default):
            told.append({**item, "kind": "text", "value": value})
        elif not same(value, field.default):
            told.append({**item, "kind": "expression", "value": written(value)})
    return {"call": type(part).__name__, "fields": told}
