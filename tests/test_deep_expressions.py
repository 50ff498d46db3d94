"""Expressions that are deep, wide or written out large: they are worked on in time, or refused with the limit."""

from __future__ import annotations

import json
import re
import sys
import time

import numpy as np
import pytest

import architectures
import controllability as ct
from controllability.components import Activation, Identity, Linear, Product, residual
from controllability.interfaces import Param
from controllability.rendering.html import proof_html


def linear(name):
    return Linear(Param(name, ("d", "d")))


def chain(n):
    """n linear maps one behind another, activations between them."""
    block = linear("w0")
    for i in range(1, n):
        block = block >> Activation("silu") >> linear(f"w{i}")
    return residual(block)


def sums(n):
    block = Identity()
    for i in range(n):
        block = block + (Activation("silu") >> linear(f"w{i}"))
    return block


def products(n):
    block = linear("w")
    for i in range(n):
        block = Product((block, linear(f"w{i}")))
    return residual(block >> linear("down"))


def skips(n):
    block = linear("w") >> Activation("silu") >> linear("u")
    for _ in range(n):
        block = residual(block)
    return block


NESTINGS = {"chain": chain, "sums": sums, "products": products, "skips": skips}
STATED = rf"nested too deeply: .*Python allows {sys.getrecursionlimit()} here \(1000 are enough for 100 steps\)"


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("n", [300])
def test_what_is_nested_too_deeply_is_refused_with_the_limit(nesting, n):
    block = NESTINGS[nesting](n)
    with pytest.raises(ct.BadInput, match=STATED):
        ct.prove(block)


@pytest.mark.parametrize("nesting", ["sums", "products", "skips"])
def test_no_other_walk_through_it_ends_in_a_recursion_error(nesting):
    block = NESTINGS[nesting](600)
    with pytest.raises(ct.BadInput, match=STATED):
        ct.sample(block)
    params = {f"w{i}": np.eye(2) for i in range(600)} | {name: np.eye(2) for name in ("w", "u", "down")}
    with pytest.raises(ct.BadInput, match=STATED):
        block(params, np.ones(2))
    with pytest.raises(ct.BadInput, match=STATED):
        ct.verify(block, params, {}, np.ones(2), np.ones(2))


def test_a_long_chain_computes_and_samples():
    """Its parts run one after the other; each inside the next would need four calls a part."""
    params = {f"w{i}": np.eye(2) for i in range(600)}
    assert chain(600)(params, np.ones(2)).shape == (2,)
    assert len(ct.sample(chain(600))[0]) == 600


def test_up_to_the_limit_everything_works():
    """A chain of 60: proved, printed, written, read, checked and executed."""
    block = chain(60)
    proof = ct.prove(block)
    assert "theorem-1" in str(proof)
    assert "theorem" in proof.to_latex()
    assert "<svg" in proof_html(proof, "chain")
    again = ct.Proof.from_dict(json.loads(json.dumps(proof.to_dict())))
    assert again.rules == proof.rules
    assert {row["status"] for row in proof.check("symbolic")} == {"passed"}
    params, source, target = ct.sample(block)
    assert ct.verify(block, params, proof.construct(params, source, target), source, target).ok


def depth():
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


def test_no_method_of_a_proof_ends_in_a_recursion_error(monkeypatch):
    """With less room than the search had, as deep inside somebody's program; with room enough each of them works."""
    block = skips(60)
    proof = ct.prove(block)
    params, source, target = ct.sample(block)
    data = proof.to_dict()
    walks = {
        "str": lambda: str(proof), "latex": proof.to_latex, "html": lambda: proof_html(proof, "skips"),
        "dict": proof.to_dict, "from_dict": lambda: ct.Proof.from_dict(data), "check": lambda: proof.check("symbolic"),
        "construct": lambda: proof.construct(params, source, target), "closed_form": proof.closed_form,
        "formula": lambda: proof.formula(d=1), "sample": lambda: ct.sample(block), "prove": lambda: ct.prove(block),
    }  # fmt: skip
    usual, refused = sys.getrecursionlimit(), []
    for name, walk in walks.items():
        for room in range(70, 190, 12):  # wherever in the walk it ends
            sys.setrecursionlimit(depth() + room)
            try:
                walk()
            except ct.BadInput as error:
                refused.append((name, str(error)))
            finally:
                sys.setrecursionlimit(usual)
    assert {"str", "dict", "from_dict", "prove", "construct", "check"} <= {name for name, _ in refused}
    assert [text for _, text in refused if "nested too deeply" not in text] == []
    for walk in walks.values():
        walk()


# ------------------------------------------------------------------------------ formulas that are written out


@pytest.mark.parametrize("sizes", [{"d": 8, "h": 8}, {"d": 200, "h": 200}, {"d": 10**9, "h": 1}, {"h": 500}])
def test_a_formula_of_a_real_size_is_refused_at_once_with_the_limit(sizes):
    proof = ct.prove(architectures.block("gemma3"))
    started = time.process_time()
    with pytest.raises(ct.BadInput, match=r"the parameters have [\d,]+ entries, .* at most 128: .*closed_form\(\)"):
        proof.formula(**sizes)
    assert time.process_time() - started < 5


def test_formulas_that_would_never_end_when_written_out_are_refused_and_named_ones_given():
    """Each activation holds the one before, several times over."""
    proof = ct.prove(chain(40))
    with pytest.raises(ct.BadInput, match=r"the formulas have \de\+\d+ parts, .*: ask for expand=False"):
        proof.formula(d=1)
    assert {m.shape for m in proof.formula(expand=False, d=1).values()} == {(1, 1)}


@pytest.mark.slow
def test_names_are_replaced_once_each():
    """Minutes where every replacement looks through what it wrote: nearly 70 million parts, most of them shared."""
    started = time.process_time()
    ct.prove(architectures.block("gemma3")).formula(d=4, h=4)
    assert time.process_time() - started < 60


def test_what_is_written_out_has_the_value_of_the_names():
    proof = ct.prove(architectures.block("llama"))
    params, source, target = ct.sample(proof.block, "sympy", d=2, h=1)
    patch = proof.construct(params, source, target)
    table = patch.definitions
    entry = patch["mlp.down_proj.weight"].dense()[0, 0]
    written = table.expand(entry)
    assert written.free_symbols.isdisjoint(table.meaning) and not entry.free_symbols.isdisjoint(table.meaning)
    numbers = {s: 0.5 + (sum(map(ord, str(s))) % 17) / 16 for s in written.free_symbols}
    for name, meaning in table.meaning.items():
        numbers[name] = meaning.evalf(30, subs=numbers)
    assert abs(written.evalf(20, subs=numbers) / entry.evalf(30, subs=numbers) - 1) < 1e-12


# ------------------------------------------------------------------------- exact arithmetic and nested activations


@pytest.mark.parametrize("n", [6, 9, 14])
def test_activations_of_activations_are_skipped_by_the_exact_level_with_the_reason(n):
    """Fractions of 3ⁿ times as many digits: no end, and before that a right proof was called wrong."""
    started = time.process_time()
    (row,) = ct.prove(chain(n)).check("exact")
    assert row["status"] == "skipped"
    assert re.match(rf"{n - 1} activations, each of the one before, .* \(at most 4 do not\)", row["method"])
    assert time.process_time() - started < 5
    assert ct.prove(chain(5)).check("exact")[0]["status"] == "passed"
