"""A proof as LaTeX: a theorem, the patch in closed form, and the derivation rule by rule."""

from collections import Counter
from dataclasses import replace

from controllability.checks import LEVELS
from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.errors import BadInput, ControllabilityError, within_depth
from controllability.prover.derivation import Derivation
from controllability.rendering.closed_form import ClosedForm, closed_form, written_names
from controllability.rendering.latex_math import IndexPrinter, escape
from controllability.rendering.text import cited, printable
from controllability.rendering.tokens_served import matrix_formulas, reach
from controllability.rules import Step
from controllability.symbolic.indexed import IndexedArray

PREAMBLE = r"""\documentclass[10pt]{article}
\usepackage[T1]{fontenc}
\usepackage[margin=2.2cm]{geometry}
\usepackage{amsmath,amssymb,amsthm,graphicx}
\newtheorem{theorem}{Theorem}
\allowdisplaybreaks
\begin{document}
\sloppy\raggedright
"""
WIDE = 150  # characters of a formula that fit a line; longer ones are made smaller
THEOREMS = {"input-output": "Theorem 1 of Goldwaser, Munn, Gonzalvo and Dherin", "output": "Theorem 1b"}


@within_depth
def proof_latex(proof: Derivation, level: str = "derived", name: str = "") -> str:
    """A document that compiles stand-alone; ``level`` is the highest that was run, ``name`` the family's."""
    if level not in LEVELS:
        raise BadInput(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    moved = ", ".join(rf"\texttt{{{escape(str(p))}}}" for p in sorted(proof.root.moved, key=str))
    title = rf"\section*{{A perfect patch for {escape(name)}}}" if name else r"\section*{A perfect patch}"
    lines = [
        PREAMBLE + title,
        r"\begin{theorem}",
        rf"Let $B$ be the block \[ \text{{\parbox{{0.9\textwidth}}{{\small {escape(proof.block.describe())}}}}} \]",
        *_promise(proof, moved),
        r"\end{theorem}",
        f"Level of proof that was run: {level}.",
        *_conditions(proof),
        *(_matrices(proof) if proof.jointly else _patch(proof)),
        rf"\begin{{proof}}[Derivation, via {escape(THEOREMS[proof.via])}, route {proof.route}]\leavevmode",
        *_items(proof.root),
        r"\end{proof}",
        r"\paragraph{References.}",
        *_listed([escape(f"{key} {text}") for key, text in cited(proof).items()]),
        r"\end{document}",
        "",
    ]
    return "\n".join(lines)


def _promise(proof: Derivation, moved: str) -> list[str]:
    if proof.jointly:
        return [
            "with parameters $\\theta$. For all states $v_1, \\dots, v_T$ (without the context) and $v'_1, \\dots, v'_T$ (with it) that",
            f"fulfil the side conditions below there is one change $\\Delta$ of {moved}, the same for all $t$, with",
            "\\[ B(v_t;\\,\\theta+\\Delta) = B(v'_t;\\,\\theta) \\qquad (t = 1, \\dots, T). \\]",
        ]
    return [
        "with parameters $\\theta$. For all states $v$ (without the context) and $v'$ (with it) that fulfil the side",
        f"conditions below there is a change $\\Delta$ of {moved} with \\[ B(v;\\,\\theta+\\Delta) = B(v';\\,\\theta). \\]",
    ]


def _matrices(proof: Derivation) -> list[str]:
    """How many tokens one patch serves, and its change of each parameter in matrices whose columns are the tokens."""
    served, changes = (list(map(escape, said(proof))) for said in (reach, matrix_formulas))
    columns = "The tokens' vectors are the columns of $Z$, $Z'$ and $Y$, the wanted changes those of $D$; $A^{+}$ is the pseudo-inverse."
    head = r"\paragraph{Tokens in general position that one patch serves.}"
    return [head, *_listed(served), rf"\paragraph{{The patch.}} {columns}", *_listed(changes)]


def _listed(items: list[str]) -> list[str]:
    return [r"\begin{itemize}\small", *(rf"\item {item}" for item in items), r"\end{itemize}"]


def _conditions(proof: Derivation) -> list[str]:
    found = [rf"{escape(c.statement)} --- \texttt{{{escape(c.where)}}}" for c in dict.fromkeys(proof.conditions)]
    title = r"\paragraph{Side conditions.}"
    return [title, *_listed(found)] if found else [f"{title} None."]


def _symbols(proof: Derivation) -> dict[str, str]:
    """Parameter -> how it is written: matrices W, scales m, biases b, with as much of the name as tells them apart."""
    names = sorted({str(p) for p in proof.block.parameters()})
    parts = {name: [p for p in name.split(".") if p not in ("weight", "bias")] or [name] for name in names}
    found: dict[str, str] = {}
    last, joined = {n: p[-1] for n, p in parts.items()}, {n: ".".join(p) for n, p in parts.items()}
    for shown in (last, joined, {n: n for n in names}):
        met = Counter((_letter(name), shown[name]) for name in names)
        for name in names:
            if name not in found and (met[_letter(name), shown[name]] == 1 or shown[name] == name):
                found[name] = rf"{_letter(name)}^{{\text{{{escape(shown[name])}}}}}"
    return found


def _letter(name: str) -> str:
    return "b" if name.endswith("bias") else "m" if "norm" in name else "W"


def formulas(proof: Derivation) -> tuple[list[str], list[str], dict[str, str]]:
    """(each change, what the names in them stand for, parameter -> how it is written), in LaTeX.  Raises as ``closed_form`` does."""
    form, own, written = closed_form(proof), _symbols(proof), written_names(proof.block)
    symbols = {str(replace(p, name=written[p.name])): own[str(p)] for p in proof.block.parameters()}
    changes = [_delta(own[name], symbols, delta) for name, delta in form.deltas.items()]
    return changes, _definitions(form, symbols), own


def _patch(proof: Derivation) -> list[str]:
    try:
        changes, meanings, own = formulas(proof)
    except Exception as reason:  # a component that is not ours may fail in any way
        foreign = f"a component does not run on symbols ({type(reason).__name__}: {reason})"
        why = str(reason) if isinstance(reason, ControllabilityError) else foreign
        return [rf"\paragraph{{The patch.}} No closed form: {escape(printable(why.splitlines()[0]))}."]
    names = [rf"${symbol}$ is \texttt{{{escape(name)}}}" for name, symbol in own.items()]
    return [
        r"\paragraph{The patch.}", *map(_equation, changes), "where", *map(_equation, meanings),
        r"Sums run over the whole range of their index. $n$ is a normalisation (a second one that differs is numbered); activations stand for themselves, or for any"
        r" other function; $e_r$ is the $r$-th chosen expert and $s_r$ its share. \par\noindent "
        + "; ".join(names) + ".",
    ]  # fmt: skip


def _equation(formula: str) -> str:
    smaller = rf"\resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{$\displaystyle {formula}$}}"
    return rf"\begin{{equation*}}{formula if len(formula) <= WIDE else smaller}\end{{equation*}}"


def _entry(x: IndexedArray, symbols: dict[str, str], letters: dict[str, str]) -> str:
    return IndexPrinter(symbols, letters).doprint(x.entry)


def _delta(symbol: str, symbols: dict[str, str], delta: Delta) -> str:
    left = rf"\Delta {symbol}"
    if isinstance(delta, Shift):
        return rf"{left}_{{i}} = {_entry(delta.value, symbols, {'i_0': 'i'})}"
    assert isinstance(delta, LowRank)
    rows, columns = {"i_0": "i", "i_2": "r"}, {"i_0": "j", "i_2": "r"}
    index = "e_r,ij" if isinstance(delta, ExpertLowRank) else "ij"
    if delta.transposed:
        index = index.replace("ij", "ji")
    one, two = _entry(delta.left, symbols, rows), _entry(delta.right, symbols, columns)
    return rf"{left}_{{{index}}} = \left({one}\right) \cdot {two}"


def _definitions(form: ClosedForm, symbols: dict[str, str]) -> list[str]:
    lines = []
    for name, array in form.where.items():
        letters = {"i_0": "i"} if array.ndim == 1 else {"i_1": "r", "i_0": "i"}
        index = "".join(letters[f"i_{p}"] for p in reversed(range(array.ndim)) if array.shape[-1 - p] != 1)
        head = IndexPrinter(symbols, letters).head(name)
        lines.append(rf"{head}_{{{index}}} = {_entry(array, symbols, letters)}")
    return lines


def _items(step: Step, depth: int = 0) -> list[str]:
    rule, where = step.rule, rf"\texttt{{{escape(step.place.describe())}}}"
    indent = rf"\par\noindent\hangindent={depth + 1.2:.1f}em\hspace*{{{depth}em}}"
    line = rf"{indent}\textbf{{{escape(rule.name)}}} for {where}: {escape(rule.statement)}, since {escape(rule.when)}."
    patch = "" if rule.patch in ("none", "that of f", "that of g", "that of c") else f" Patch: {escape(rule.patch)}."
    below = [item for premise in step.premises for item in _items(premise, depth + 1)]
    return [line + patch + rf" \emph{{({escape(rule.source)})}}", *below]
