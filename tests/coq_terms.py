"""The formula of a certificate, read and evaluated in NumPy by code that knows nothing of the one that wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

import controllability as ct
from controllability.components import Mixture, NormalizeEach, Streams
from controllability.interfaces import leaves

TOKEN = re.compile(r"[A-Za-z_]\w*'?|\d+|:=|=>|->|[()+/*:-]")
BLOCK = re.compile(r"^Definition block (.*) \(x : [^=]*?\) : [^=]*? := (.*)\.$", re.MULTILINE)


def parsed(tokens: list[str]) -> Any:
    """One term: a name, a number, ("fun", name, body), ("let", name, term, body), ("/", a, b), ("-", a) or (f, a, …)."""
    token = tokens.pop(0)
    if token != "(":
        return token
    if tokens[0] == "fun":
        name = tokens[1]
        del tokens[: tokens.index("=>") + 1]
        found: Any = ("fun", name, parsed_to(tokens))
    elif tokens[0] == "let":
        name = tokens[1]
        del tokens[:3]
        value = parsed(tokens)
        assert tokens.pop(0) == "in"
        found = ("let", name, value, parsed_to(tokens))
    else:
        found = parsed_to(tokens)
    assert tokens.pop(0) == ")"
    return found


def parsed_to(tokens: list[str]) -> Any:
    """An application, a fraction or a negative number, up to its bracket."""
    parts = []
    while tokens[0] != ")":
        parts.append(tokens.pop(0) if tokens[0] in "-/" else parsed(tokens))
    if "/" in parts:
        a, _, b = parts
        return ("/", a, b)
    if parts[0] == "-":
        return ("-", parts[1])
    if isinstance(parts[0], tuple) and str(parts[0][0]).startswith("route"):
        parts = [*parts[0], *parts[1:]]  # (f a) b is f a b
    return tuple(parts) if len(parts) > 1 else parts[0]


erf = np.vectorize(math.erf)
sigmoid: Callable[[Any], Any] = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "times": lambda a, b: a * b, "scale": lambda c, x: c * x,
    "apply": lambda W, x: W @ x, "transpose": lambda W: W.T, "map": lambda f, x: f(x), "spread": lambda x: x,
    "rms": lambda e, x: x / np.sqrt(np.mean(x * x) + e), "shifted": lambda c, w: w + c, "one_less": lambda x: 1 - x,
    "layer": lambda e, x: (x - x.mean()) / np.sqrt(np.mean((x - x.mean()) ** 2) + e),
    "inverse_rms": lambda e, x: np.array([1 / np.sqrt(np.mean(x * x) + e)]),
    "first": lambda x: x[: len(x) // 2], "second": lambda x: x[len(x) // 2 :],
    "evens": lambda x: x[0::2], "odds": lambda x: x[1::2],
    "identity": lambda x: x, "relu": lambda x: np.maximum(x, 0), "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * sigmoid(x), "sigmoid": sigmoid, "tanh": np.tanh, "swish": lambda a: lambda x: x * sigmoid(a * x),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x), "gelu": lambda f: lambda x: x / 2 * (1 + f(x / math.sqrt(2))), "erf": erf,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu6": lambda x: np.clip(x, 0, 6), "leaky_relu": lambda x: np.where(x > 0, x, x / 100),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6, "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "gelu_10": lambda f: lambda x: np.minimum(x / 2 * (1 + f(x / math.sqrt(2))), 10), "sqrtsoftplus": lambda f: lambda x: np.sqrt(f(x)),
    "laplace": lambda f: lambda x: (1 + f((x - 0.707107) / 0.282095 / math.sqrt(2))) / 2,
    "at_most": lambda c: lambda x: np.minimum(x, c), "clamp": lambda c: lambda x: np.maximum(np.minimum(x, c), -c),
    "soft_cap": lambda c, x: c * np.tanh(x / c), "softplus": lambda x: np.log(1 + np.exp(x)),
    "cons": lambda a, l: [a, *l], "polynomial": lambda l: lambda x: sum(c * x**n for n, c in enumerate(l)),
    "xielu": lambda s, p, n, b, e: lambda x: np.where(
        x > 0, s(p) * x * x + b * x, (np.exp(np.minimum(x, e)) - 1 - x) * (b + s(n)) + b * x),
    "expert": lambda c, j: c[0][j], "share": lambda c, *j: c[1][j[0]] if j else c[1], "evenly": lambda c: (c[0], c[1] * 0 + 1),
    "at_least": lambda c: lambda x: np.maximum(x, c), "inr": lambda last: -1,
    "above_mean": lambda c, x: np.maximum(x - x.mean() - c * x.std(), 0), "joined": lambda S: S.reshape(-1),
    "remixed": lambda M, S: M.reshape(len(S), len(S)).T @ S, "written": lambda S, b, u: S + np.outer(b, u),
    "per_stream": lambda w: w[:, None], "collapse": lambda l, w, V: ((w + l) * V).sum(0),
    "corrected": lambda p, a, g: p + (1 + g[0]) * (a - p),
    "convolved": lambda s, f, c, z: f * (sum(c[:, 0, -k] * z(-k) for k in range(1, 1 + c.shape[-1])) + s * z(-1)),
    "mix": lambda s, f: sum(s[j] * f(j) for j in range(len(s))), "fst": lambda x: x[0], "snd": lambda x: x[1],
}  # fmt: skip


def evaluated(term: Any, names: dict[str, Any]) -> Any:
    """The value of a term."""
    if isinstance(term, str):
        return float(term) if term.isdigit() else [] if term == "nil" else names[term]
    head, *rest = term
    if head == "fun":
        return lambda value: evaluated(rest[1], {**names, rest[0]: value})
    if head == "let":
        return evaluated(rest[2], {**names, rest[0]: evaluated(rest[1], names)})
    if head == "-":
        return -evaluated(rest[0], names)
    values = [evaluated(one, names) for one in rest]
    if head == "/":
        return values[0] / values[1]
    f = evaluated(head, names)
    if isinstance(f, np.ndarray):  # a matrix at an expert, one number
        return f.reshape(-1)[0] if rest == ["tt"] else f[values[0]]
    return f(*values)


def formula_at(proof: ct.Proof, text: str, params: dict[str, Any], x: Any) -> np.ndarray:
    """The formula of ``proof``'s certificate at one token; at the last of several where it reads a window."""
    found = BLOCK.search(text)
    assert found is not None
    written = re.findall(r"\(([A-Za-z_]\w*) : ((?:[^()]|\([^()]*\))*)\)", found[1])
    names: dict[str, Any] = {"tt": "tt", **PLAIN}
    for param, (name, kind) in zip(proof.layout.parameters, written, strict=True):
        value = np.asarray(param.value(params))
        names[name] = value.reshape(-1) if kind.startswith("vec") else value
    mixtures = [node for node in proof.layout.nodes.values() if isinstance(node, Mixture)]
    routes = list(dict.fromkeys(re.findall(r"\broute\d*\b", found[2])))
    for name, mixture in zip(routes, mixtures, strict=True):
        names[name] = _route(mixture, params)
        names["rows_of"] = _rows_of(mixture)
    for streams in (node for node in proof.layout.nodes.values() if isinstance(node, Streams | NormalizeEach)):
        names["rows"] = rows = lambda x, count=streams.count: x.reshape(count, -1)
        names["rms_each"] = lambda e, x, rows=rows: np.concatenate([PLAIN["rms"](e, row) for row in rows(x)])
    at = (
        (lambda k: _nested([part[k] for part in x]) if isinstance(x, tuple) else x[k])
        if "inr" in found[2]
        else _nested(x)
    )
    term = parsed(["(", *TOKEN.findall(found[2]), ")"])
    return np.asarray(evaluated(term, {**names, "x": at}))


def _nested(x: Any) -> Any:
    if not isinstance(x, tuple | list):
        return x
    first, *rest = x
    for one in rest:
        first = (first, one)
    return first


def _route(mixture: Mixture, params: dict[str, Any]) -> Callable[..., Any]:
    return lambda *given: mixture.routing(params, given[-1])


def _rows_of(mixture: Mixture) -> Callable[..., Any]:
    stacked = [getattr(leaf, "stacked", None) for _, leaf in leaves(mixture)]
    count = next((n for n in stacked if n), 1)
    return lambda W, e: W.reshape(count, -1, W.shape[-1])[e]
