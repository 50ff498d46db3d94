"""Formulas of several residual streams, rows of vectors, and of windows of positions."""

from typing import Any

from controllability.components.collapse import Collapse, Correction
from controllability.components.convolution import Taps, Window
from controllability.components.streams import Joined, NormalizeEach, Remixed, Spread, Streams
from controllability.errors import BadInput
from controllability.rocq.formula import FORMULAS, NOW, Point, Value, Writer, of_parts, shared, value
from controllability.rocq.names import number
from controllability.rocq.sizes import UNIT, Rows


def _streams(w: Writer, c: Streams, x: Value, at: Point) -> Value:
    size = Rows(w.sizes.counted("n", c.count), w.sizes.new("d"))
    w.sizes.cut(x.size, "*", size.count, size.size)
    return Value(f"(rows {x.text})", size)


def _joined(w: Writer, c: Joined, x: Value, at: Point) -> Value:
    whole = w.sizes.new("D")
    w.sizes.cut(whole, "*", x.size.count, x.size.size)
    return Value(f"(joined {x.text})", whole)


def _normalize_each(w: Writer, c: NormalizeEach, x: Value, at: Point) -> Value:
    w.sizes.cut(x.size, "*", w.sizes.counted("n", c.count), w.sizes.new("d"))
    return Value(f"(rms_each {number(c.eps, c.describe())} {x.text})", x.size)


def _remixed(w: Writer, c: Remixed, parts: list[Value]) -> Value:
    mix, streams = parts
    w.sizes.cut(mix.size, "*", streams.size.count, streams.size.count)
    return Value(f"(remixed {mix.text} {streams.text})", streams.size)


def _spread(w: Writer, c: Spread, parts: list[Value]) -> Value:
    streams, b, u = parts
    size = Rows(w.sizes.join(streams.size.count, b.size), w.sizes.join(streams.size.size, u.size))
    return Value(f"(written {streams.text} {b.text} {u.text})", size)


def full_weights(w: Writer, given: Any, values: Rows) -> str:
    """The theory's word for weights of a size that are spread over the features; '' where there is one for each already."""
    each = isinstance(given, Rows)
    w.sizes.join(given, values if each else values.count)
    return "" if each else "per_stream"


def _collapse(w: Writer, c: Collapse, x: Value, at: Point) -> Value:
    def write(streams: Value) -> Value:
        given = value(w, c.weights, streams, at)
        word = full_weights(w, given.size, streams.size)
        weights = f"({word} {given.text})" if word else given.text
        return Value(f"(collapse {number(c.least, c.describe())} {weights} {streams.text})", streams.size.size)

    return shared(w, value(w, c.values, x, at), write)


def _correction(w: Writer, c: Correction, x: Value, at: Point) -> Value:
    def write(x: Value) -> Value:
        prediction = value(w, c.prediction, x, at)

        def corrected(a: Value) -> Value:
            gains = value(w, c.gains, a, at)
            w.sizes.cut(gains.size, "+", UNIT, w.sizes.new("G"))
            return Value(f"(corrected {prediction.text} {a.text} {gains.text})", w.sizes.join(a.size, prediction.size))

        return shared(w, value(w, c.activated, x, at), corrected)

    return shared(w, x, write)


def _window(w: Writer, c: Window, x: Value, at: Point) -> Value:
    if NOW not in x.text:
        raise BadInput(f"{c.describe()} stand behind what is not taken at every position: it has no formula in Coq")
    whole = w.positions(c.count)
    return Value(f"(fun k : {w.sizes.mark(whole)} => {x.text.replace(NOW, 'k')})", Rows(whole, x.size))


def taps(c: Taps, word: str) -> str:
    """A convolution but for its taps and what it reads."""
    return f"{word} {number(c.skip, c.describe())} {number(c.factor, c.describe())}"


def _taps(w: Writer, c: Taps, x: Value, at: Point) -> Value:
    w.param(c.weight, "mat", x.size.size, x.size.count)
    return Value(f"({taps(c, 'convolved')} {at.names[c.weight]} {x.text})", x.size.size)


FORMULAS.update({
    Streams: _streams, Joined: _joined, NormalizeEach: _normalize_each, Remixed: of_parts(_remixed), Spread: of_parts(_spread),
    Collapse: _collapse, Correction: _correction, Window: _window, Taps: _taps,
})  # fmt: skip
