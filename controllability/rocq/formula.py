"""A block as a formula: what each component computes, as a term over the theory's plain functions, and the sizes that it needs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from controllability.components.activation import AboveMean, Activation, Clamp, SoftCap
from controllability.components.bias import Bias
from controllability.components.fixed import Blend, Fixed, Gate
from controllability.components.glu import XIELU, Glu, Swish
from controllability.components.linear import Linear
from controllability.components.mixture import ExpertLinear, Mixture, Share
from controllability.components.normalisation import Normalize
from controllability.components.residual import Identity
from controllability.components.scale import Scale
from controllability.components.select import Mixed, Select
from controllability.components.streams import InverseRms
from controllability.components.times import Times
from controllability.errors import BadInput
from controllability.interfaces import Component, Param, Product, Sequence, Sum
from controllability.rocq.names import identifier, number, theory
from controllability.rocq.sizes import UNIT, Rows, Size, Sizes

NOW = "⟪now⟫"  # the position of a window at which a term is; the last one in the end


class Value(NamedTuple):
    """A term and the size of its last axis; sizes of all inputs where it is a tuple of them."""

    text: str
    size: Any


@dataclass(frozen=True)
class Point:
    """Where a term is: the names of the parameters, and inside a mixture the choice of experts and the expert's row."""

    names: Mapping[Param, str]
    choice: str = ""
    row: str = ""
    rows: Size = UNIT
    experts: Size = UNIT


@dataclass
class Writer:
    """What all terms of one certificate share: sizes, the types of parameters, free functions, names that are taken."""

    sizes: Sizes = field(default_factory=Sizes)
    types: dict[Param, tuple[str, tuple[Size, ...]]] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)  # a free function or number → its type
    routings: dict[int, tuple[str, Size, Size]] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)  # keeps ids alive
    taken: set[str] = field(default_factory=lambda: {"block", "tree", "patch", "perfect", "v", "v'"})
    count: int = 0
    window: Size | None = None

    def fresh(self, stem: str) -> str:
        """A bound name that nothing else has."""
        self.count += 1
        return identifier(f"{stem}{self.count}", self.taken)

    def param(self, param: Param, kind: str, *sizes: Size) -> None:
        """Say what a parameter is: the same wherever it is read.  Raises ``BadInput`` otherwise."""
        known = self.types.setdefault(param, (kind, sizes))
        if known[0] != kind or len(known[1]) != len(sizes):
            raise BadInput(f"{param} is read as a {known[0]} and as a {kind}: a certificate has no such parameter")
        for a, b in zip(known[1], sizes, strict=True):
            self.sizes.join(a, b)

    def free(self, name: str, kind: str) -> str:
        """A function or number that the certificate leaves open: it holds for every one."""
        if name not in self.functions:
            self.taken.add(name)
            self.functions[name] = kind
        return name

    def positions(self, count: int) -> Size:
        """The positions of the windows of a block: those before, and now.  Raises ``BadInput`` where windows differ."""
        if self.window is None:
            self.window = self.sizes.new("P")
            self.sizes.cut(self.window, "+", self.sizes.new("K"), UNIT)
        self.sizes.join(self.window, self.sizes.counted("P", count))
        return self.window

    def axis(self, param: Param, index: int, wanted: str = "n") -> Size:
        """A size of its own for an axis of a parameter, named as the parameter's shape says; UNIT for one entry."""
        size = param.shape[index] if len(param.shape) > abs(index) - (index < 0) else wanted
        return UNIT if size in (1, "one") else self.sizes.new(str(size))


Formula = Callable[[Writer, Any, Value, Point], Value]


def value(w: Writer, component: Component, x: Value, at: Point) -> Value:
    """The component at ``x``.  Raises ``BadInput`` for a class that has no formula here."""
    for kind, write in FORMULAS.items():
        if type(component) is kind:
            return write(w, component, x, at)
    raise BadInput(
        f"{component.describe()} ({type(component).__name__}) has no formula in Coq: no certificate is written"
    )


def shared(w: Writer, x: Value, write: Callable[[Value], Value]) -> Value:
    """What ``write`` makes of ``x``, which is written once."""
    if " " not in x.text or isinstance(x.size, tuple) or NOW in x.text:
        return write(x)
    name = w.fresh("x")
    found = write(Value(name, x.size))
    return Value(f"(let {name} := {x.text} in {found.text})", found.size)


def _sequence(w: Writer, c: Sequence, x: Value, at: Point) -> Value:
    for part in c.parts:
        x = value(w, part, x, at)
    return x


def joined(w: Writer, c: Sum | Product, parts: list[Value]) -> Value:
    """The sum or product of terms, from the left; one number is spread over all features."""
    total, *rest = parts
    for one in rest:
        if isinstance(c, Product) and isinstance(one.size, Rows):
            raise BadInput(
                f"{c.describe():.60} multiplies streams: it has no formula in Coq, no certificate is written"
            )
        narrow = [w.sizes.find(p.size) == UNIT for p in (total, one)]
        if isinstance(c, Product) and narrow == [True, False]:
            total = Value(f"(spread {total.text})", one.size)
        if isinstance(c, Product) and narrow == [False, True]:
            one = Value(f"(spread {one.text})", total.size)
        word = "add" if isinstance(c, Sum) else "times"
        total = Value(f"({word} {total.text} {one.text})", w.sizes.join(total.size, one.size))
    return total


def of_parts(write: Callable[[Writer, Any, list[Value]], Value]) -> Formula:
    """What a component makes of its parts, all at one state."""
    return lambda w, c, x, at: shared(w, x, lambda x: write(w, c, [value(w, part, x, at) for part in c.children()]))


def matrix(c: Linear, name: str) -> str:
    """The matrix of a linear map, (out, in)."""
    return f"(transpose {name})" if c.layout == "in_out" else name


def _linear(w: Writer, c: Linear, x: Value, at: Point) -> Value:
    turned = c.layout == "in_out"
    out = w.axis(c.weight, -1 if turned else -2, "o")
    w.sizes.join(w.axis(c.weight, -2 if turned else -1), x.size)
    w.param(c.weight, "mat", *((x.size, out) if turned else (out, x.size)))
    text = f"(apply {matrix(c, at.names[c.weight])} {x.text})"
    return Value(text, out) if c.bias is None else _plus(w, c.bias, Value(text, out), at.names[c.bias])


def _plus(w: Writer, bias: Param, x: Value, name: str) -> Value:
    w.param(bias, "vec", x.size)
    return Value(f"(add {x.text} {name})", x.size)


def expert_matrix(c: ExpertLinear, name: str, expert: str) -> str:
    """The matrix of one expert, (out, in)."""
    one = f"(rows_of {name} {expert})" if c.stacked is not None else f"({name} {expert})"
    return f"(transpose {one})" if c.layout == "in_out" else one


def _expert_linear(w: Writer, c: ExpertLinear, x: Value, at: Point) -> Value:
    turned = c.layout == "in_out"
    out = w.sizes.new("o") if c.stacked is not None else w.axis(c.weight, -1 if turned else -2, "o")
    rows, columns = (x.size, out) if turned else (out, x.size)
    w.param(c.weight, "stack" if c.stacked is not None else "experts", at.experts, rows, columns)
    expert = f"(expert {at.choice} {at.row})"
    found = Value(f"(apply {expert_matrix(c, at.names[c.weight], expert)} {x.text})", out)
    if c.bias is None:
        return found
    w.param(c.bias, "mat", at.experts, out)
    return Value(f"(add {found.text} ({at.names[c.bias]} {expert}))", out)


def scale_of(w: Writer, c: Scale, name: str, size: Size) -> str:
    """The effective scale."""
    w.param(c.weight, "vec", size)
    return f"(shifted {number(c.offset, c.describe())} {name})" if c.offset else name


def eps_of(c: Component) -> str:
    """ε of a normalisation, as a fraction."""
    return number(c.norm_epsilon, f"ε of {c.describe()}")


def _activation(w: Writer, c: Activation, x: Value, at: Point) -> Value:
    return Value(f"(map {activation(w, c)} {x.text})", x.size)


def activation(w: Writer, c: Activation) -> str:
    """The function of one number that an activation is."""
    if c.coefficients:
        listed = "nil"
        for coefficient in reversed(c.coefficients):
            listed = f"(cons {number(coefficient, c.describe())} {listed})"
        return f"(polynomial {listed})"
    if c.symbol:
        return w.free(identifier(c.name, set()), "R -> R")
    # one that the theory defines, perhaps by a function that a certificate leaves open
    found = re.search(rf"Definition {re.escape(c.name)} (?:\((\w+) : R -> R\) )?\(x : R\) : R", theory())
    if found and found[1]:
        return f"({c.name} {w.free(found[1], 'R -> R')})"
    if not found and c.name != "tanh":
        raise BadInput(f"{c.describe()} has no formula in Coq: no certificate is written")
    return c.name


def _gate(w: Writer, c: Gate, x: Value, at: Point) -> Value:
    return Value(f"(scale {gate(w, c, at.names[c.weight])} {x.text})", x.size)


def gate(w: Writer, c: Gate, name: str) -> str:
    """The one number that a gate multiplies by."""
    w.param(c.weight, "vec", UNIT)
    number_ = f"({name} tt)"
    return number_ if c.activation == "identity" else f"({activation(w, Activation(c.activation))} {number_})"


def _glu(w: Writer, c: Glu, x: Value, at: Point) -> Value:
    half = w.sizes.half(x.size)
    names = ("evens", "odds") if c.order == "interleaved" else ("first", "second")
    one, two = (f"({name} {x.text})" for name in (reversed(names) if c.order == "up_gate" else names))
    if c.limit is not None:
        limit = number(c.limit, c.describe())
        one, two = f"(map (at_most {limit}) {one})", f"(map (clamp {limit}) {two})"
    if c.shift:
        two = f"(shifted {number(c.shift, c.describe())} {two})"
    return Value(f"(times {value(w, c.activation, Value(one, half), at).text} {two})", half)


def _xielu(w: Writer, c: XIELU, x: Value, at: Point) -> Value:
    for param in c.own_parameters():
        w.param(param, "vec", UNIT)
    given = " ".join(f"({at.names[param]} tt)" for param in c.own_parameters())
    return Value(f"(map (xielu {w.free('softplus', 'R -> R')} {given}) {x.text})", x.size)


def _select(w: Writer, c: Select, x: Value, at: Point) -> Value:
    if not isinstance(x.size, tuple):
        return x
    text, count = x.text, len(x.size)
    for _ in range(count - 1 - max(c.index, 1) if c.index else count - 2):
        text = f"(fst {text})"
    return Value(f"({'snd' if c.index else 'fst'} {text})", x.size[c.index])


def _blend(w: Writer, c: Blend, x: Value, at: Point) -> Value:
    one, two = (value(w, part, x, at) for part in (c.first, c.second))
    w.param(c.weight, "vec", w.sizes.join(one.size, two.size))
    mu = at.names[c.weight]
    return Value(f"(add (times {mu} {one.text}) (times (one_less {mu}) {two.text}))", one.size)


def routing(w: Writer, c: Mixture, logits: Size, names: Mapping[Param, str]) -> tuple[str, Size, Size]:
    """(any function of the logits and of what the routing reads, the chosen experts' index, the experts' index)."""
    key = id(c.routing)
    if key not in w.routings:
        w.held.append(c.routing)
        w.routings[key] = (w.fresh("route"), w.sizes.new("K"), logits)
    name, rows, experts = w.routings[key]
    w.sizes.join(experts, logits)
    read = c.routing.parameters()
    for param in read:
        w.param(param, "vec", experts)
    kinds = "".join(f"vec {w.sizes.mark(experts)} -> " for _ in (*read, None))
    w.functions[name] = f"{kinds}choice {w.sizes.mark(rows)} {w.sizes.mark(experts)}"
    called = " ".join((name, *(names[param] for param in read)))
    return (f"({called})" if read else called), rows, experts


def inside(w: Writer, c: Mixture, x: Value, at: Point) -> tuple[str, Point]:
    """(the choice of experts at ``x``, the point inside, at row j)."""
    logits = value(w, c.router, x, at)
    route, rows, experts = routing(w, c, logits.size, at.names)
    return f"({route} {logits.text})", replace(at, row=w.fresh("j") if at.row else "j", rows=rows, experts=experts)


def _mixture(w: Writer, c: Mixture, x: Value, at: Point) -> Value:
    def write(x: Value) -> Value:
        choice, here = inside(w, c, x, at)
        name = w.fresh("chosen")
        here = replace(here, choice=name)
        last = value(w, c.last, value(w, c.inner, x, here), here)
        shares = f"(share {name if c.weighted else f'(evenly {name})'})"
        row = f"(fun {here.row} : {w.sizes.mark(here.rows)} => {last.text})"
        return Value(f"(let {name} := {choice} in (mix {shares} {row}))", last.size)

    return shared(w, x, write)


def _clamp(w: Writer, c: Clamp, x: Value, at: Point) -> Value:
    text = x.text if c.high is None else f"(map (at_most {number(c.high, c.describe())}) {x.text})"
    return Value(text if c.low is None else f"(map (at_least {number(c.low, c.describe())}) {text})", x.size)


def _one_argument(word: Callable[[Any], str]) -> Formula:
    return lambda w, c, x, at: Value(f"({word(c)} {x.text})", x.size)


FORMULAS: dict[type, Formula] = {
    Sequence: _sequence, Sum: of_parts(joined), Product: of_parts(joined), Linear: _linear, ExpertLinear: _expert_linear,
    Identity: lambda w, c, x, at: x,
    Bias: lambda w, c, x, at: _plus(w, c.bias, x, at.names[c.bias]),
    Scale: lambda w, c, x, at: Value(f"(times {scale_of(w, c, at.names[c.weight], x.size)} {x.text})", x.size),
    Normalize: _one_argument(lambda c: f"{c.kind} {eps_of(c)}"),
    InverseRms: lambda w, c, x, at: Value(f"(inverse_rms {number(c.eps, c.describe())} {x.text})", UNIT),
    Activation: _activation,
    SoftCap: _one_argument(lambda c: f"soft_cap {number(c.cap, c.describe())}"),
    Times: _one_argument(lambda c: f"scale {number(c.factor, c.describe())}"),
    Swish: _one_argument(lambda c: f"map (swish {number(c.alpha, c.describe())})"),
    Gate: _gate, Glu: _glu, XIELU: _xielu, Select: _select, Mixed: _select, Blend: _blend, Mixture: _mixture,
    Share: lambda w, c, x, at: Value(f"(scale (share {at.choice} {at.row}) {x.text})", x.size),
    Fixed: lambda w, c, x, at: value(w, c.inner, x, at),
    Clamp: _clamp, AboveMean: _one_argument(lambda c: f"above_mean {number(c.deviations, c.describe())}"),
}  # fmt: skip
