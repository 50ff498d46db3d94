"""Closed forms: in index notation, at explicit sizes, and as LaTeX that compiles."""

from __future__ import annotations

import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import sympy
from catalogued import patchable_families
from helpers import error

import architectures
import controllability as ct
from controllability.components import Activation, Linear, SoftCap, residual
from controllability.deltas import LowRank
from controllability.interfaces import Param
from controllability.rendering.latex_math import ESCAPES, SYMBOLS, WORDS, escape
from controllability.rules import RULES
from controllability.symbolic.indexed import IndexedArray
from controllability.symbolic.sums import axis_index

SIZES = {"d": 3, "h": 4}


class Evaluator:
    """Values of closed forms on numbers: a plain interpreter that shares no code with the package."""

    def __init__(self, form, params, states, functions):
        self.given = {**params, **states}
        self.where, self.functions = form.where, functions
        self.known = {}

    def array(self, x: IndexedArray) -> np.ndarray:
        sizes = [self.number(sympy.sympify(n), {}) for n in x.shape]
        places = [axis_index(p) for p in reversed(range(len(sizes)))]
        entries = [self.number(x.entry, dict(zip(places, at, strict=True))) for at in np.ndindex(*map(int, sizes))]
        return np.array(entries).reshape([int(n) for n in sizes])

    def name(self, name: str) -> np.ndarray:
        if name in self.given:
            return self.given[name]
        if name not in self.known:
            self.known[name] = self.array(self.where[name])
        return self.known[name]

    def number(self, e, at) -> float:
        if e.is_Number:
            return float(e)
        if e.is_Symbol:
            return at[e] if e in at else self.functions[str(e)]
        if isinstance(e, sympy.Sum):
            (k, low, high), *more = e.limits
            inner = sympy.Sum(e.function, *more) if more else e.function
            stop = int(self.number(high, at)) + 1
            return sum(self.number(inner, at | {k: i}) for i in range(int(self.number(low, at)), stop))
        if isinstance(e, sympy.core.function.AppliedUndef):
            head = str(e.func)
            if head in self.functions:
                whole = [self.name(str(a)) if a.is_Symbol and a not in at else self.number(a, at) for a in e.args]
                return self.functions[head](*whole)
            return self.name(head)[tuple(int(self.number(a, at)) for a in e.args)]
        values = [self.number(a, at) for a in e.args]
        if e.is_Pow:
            return values[0] ** values[1]
        return sum(values) if e.is_Add else math.prod(values)


def rms(x, i):
    return x[i] / math.sqrt(np.mean(x**2) + 1e-6)


FUNCTIONS = {
    "n": lambda x, i: rms(x, int(i)), "phi_silu": lambda x: x / (1 + math.exp(-x)), "epsilon": 1e-6,
    "phi_gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}  # fmt: skip


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt_neox"])
def test_the_closed_form_is_what_the_proof_constructs(name, via):
    """Symbols of any size, put to numbers by an interpreter of our own, against the patch that NumPy constructs."""
    functions = dict(FUNCTIONS)
    if name == "gpt_neox":
        functions["n_layer"] = lambda x, i: float(((x - x.mean()) / np.sqrt(np.var(x) + 1e-5))[int(i)])
        functions["phi_gelu"] = lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    proof = ct.prove(architectures.block(name), via, "uniform")
    params, v, v_target = ct.sample(proof.block, seed=3, **SIZES)
    assert all((1 + w != 0).all() for n, w in params.items() if "post" in n)  # a closed channel is a case of its own
    pairs = zip(*((s if isinstance(s, tuple) else (s,)) for s in (v, v_target)), strict=True)
    named = [(a, b, "" if not isinstance(v, tuple) else str(i + 1)) for i, (a, b) in enumerate(pairs)]
    states = {f"v{i}": a for a, _, i in named} | {f"v{i}'": b for _, b, i in named}
    form = proof.closed_form()
    evaluator = Evaluator(form, params, states, functions | SIZES)
    patch = proof.construct(params, v, v_target)
    assert set(form.deltas) == set(patch)
    for parameter, delta in form.deltas.items():
        if isinstance(delta, LowRank):
            left, right = evaluator.array(delta.left), evaluator.array(delta.right)
            found = (left.T @ right).T if delta.transposed else left.T @ right
        else:
            found = evaluator.array(delta.value)
        assert error(found, patch[parameter].dense()) < 1e-12
        assert error(found * 1.01, patch[parameter].dense()) > 1e-3


@pytest.mark.parametrize(
    ("name", "expand"), [("llama", True), pytest.param("gemma3", True, marks=pytest.mark.slow), ("gemma3", False)]
)
def test_the_formula_at_explicit_sizes_gives_the_numbers(name, expand):
    proof = ct.prove(architectures.block(name, activation=Activation("cubic", coefficients=(0, 1, 1, 1))))
    formula = proof.formula(expand=expand, d=2, h=2)
    assert {m.shape for m in formula.values()} == {(2, 2)} | ({(2, 1)} if name == "gemma3" else set())
    params, v, v_target = ct.sample(proof.block, d=2, h=2)
    symbols, _, _ = ct.sample(proof.block, "sympy", d=2, h=2)
    values = {str(s): float(x) for n in params for s, x in zip(symbols[n].flat, params[n].flat, strict=True)}
    values |= {f"v_{i + 1}": v[i] for i in range(2)} | {f"v'_{i + 1}": v_target[i] for i in range(2)}
    patch = proof.construct(params, v, v_target)
    for name, matrix in formula.items():
        if not expand:
            assert {str(s) for s in matrix.free_symbols} - set(values)  # t1, t2, …
            continue
        found = matrix.subs({s: values[str(s)] for s in matrix.free_symbols}).evalf()
        wanted = patch[name].dense()
        assert error(np.array(found.tolist(), dtype=float).reshape(wanted.shape), wanted) < 1e-9


def test_a_size_that_is_not_there_is_refused():
    proof = ct.prove(architectures.block("llama"))
    with pytest.raises(ct.BadInput, match="the block has no size width: it has d, h"):
        proof.formula(width=3)


def document(name: str, via: str = "input-output") -> str:
    return ct.prove(architectures.block(name), via).to_latex("symbolic", name)


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "gptj", "bert"])
def test_the_document_has_theorem_patch_and_derivation(name):
    proof = ct.prove(architectures.block(name))
    text = document(name)
    assert text.isascii()
    assert text.count(r"\begin{") == text.count(r"\end{")
    for environment in ("theorem", "proof", "equation*", "document"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") > 0
    assert text.count(r"\Delta W") + text.count(r"\Delta m") + text.count(r"\Delta b") >= len(proof.root.moved)
    for step in proof.root.walk():
        assert rf"\textbf{{{step.rule.name}}}" in text
    for condition in proof.conditions:
        assert escape(condition.statement) in text
    assert "Level of proof that was run: symbolic." in text


def test_every_sign_of_the_rules_has_a_command():
    texts = "".join(t for rule in RULES for t in (rule.name, rule.statement, rule.when, rule.patch, rule.source))
    assert not {c for c in texts if not c.isascii()} - set(SYMBOLS) - set(WORDS) - set(ESCAPES)
    assert escape("50% of W_1 & more; ΔW = δ yᵀ") == r"50\% of W\_1 \& more; $\Delta$W $=$ $\delta$ y${}^{\top}{}$"
    assert escape("☃") == "(U+2603)"


def test_what_has_no_closed_form_says_so():
    proof = ct.prove(residual(Linear(Param("W", ("d", "d"))) >> SoftCap(30.0)), "output", "secular")
    assert "atanh" in proof.to_latex()
    unknown = ct.prove(residual(Linear(Param("W"))), "output")
    assert "No closed form: the shape of W is not known" in unknown.to_latex()


COMPILER = shutil.which("pdflatex")


@pytest.mark.skipif(COMPILER is None, reason="no LaTeX is installed")
@pytest.mark.parametrize("name", ["gemma3", "mixtral", "gptj", "bert", "dbrx"])
def test_the_document_compiles(name, tmp_path):
    log = compiled(document(name), tmp_path)
    assert not re.search(r"Overfull .hbox \((\d{2,})", log), "a formula leaves the page"
    with pytest.raises(subprocess.CalledProcessError):  # a compiler that accepts everything would prove nothing
        compiled(document(name).replace(r"\end{theorem}", ""), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no LaTeX is installed")
@pytest.mark.parametrize("name", patchable_families())
@pytest.mark.parametrize("via", ["input-output", "output"])
def test_every_shape_compiles(name, via, tmp_path):
    compiled(document(name, via), tmp_path)


def compiled(text: str, folder) -> str:
    (folder / "proof.tex").write_text(text)
    command = [str(COMPILER), "-interaction=nonstopmode", "-halt-on-error", "proof.tex"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, errors="replace").stdout
