"""Proofs for readers: they fit the terminal, odd names are told apart, and what goes wrong is one clear message."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import sympy
from helpers import error

import architectures
import controllability as ct
from controllability.cli.main import main
from controllability.components import Activation, Bias, Identity, Linear, Sum, residual
from controllability.errors import BadInput
from controllability.interfaces import Component, Param
from controllability.rendering.closed_form import written_names
from controllability.rendering.html import proof_html
from controllability.rendering.text import printable, proof_text, terminal_width
from controllability.symbolic.sums import renamed_heads

LIGHT = Activation("relu")


def gates(depth: int) -> Component:
    """Products in products: two levels of the tree for each."""
    inside: Component = Linear(Param("w", ("d", "d")))
    for i in range(depth):
        inside = (inside >> Activation("tanh")) * Linear(Param(f"gate{i}", ("d", "d")))
    return residual(inside >> Linear(Param("out", ("d", "d"))))


def two_maps(first: str, second: str) -> Component:
    return residual(Linear(Param(first, ("h", "d"))) >> LIGHT >> Linear(Param(second, ("d", "h"))))


# ------------------------------------------------------------------------------------- the terminal


@pytest.mark.parametrize("width", [100, 80, 60, 20])
@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3", "mixtral", "llama4", "gpt_neox"])
def test_no_line_is_longer_than_the_terminal(name, width):
    for via in ("input-output", "output"):
        lines = proof_text(ct.prove(architectures.block(name), via), width).splitlines()
        assert max(map(len, lines)) <= width
        assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [100, 60, 20])
def test_deep_and_wide_blocks_are_shown(width):
    wide = Sum((Identity(), *(two_maps(f"up{i}", f"down{i}").terms[1] for i in range(30))))  # type: ignore[attr-defined]
    for block in (gates(60), wide):
        proof = ct.prove(block)
        text = proof_text(proof, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.count("I-linear") == sum(step.rule.name == "I-linear" for step in proof.root.walk())


def test_what_is_cut_away_says_its_depth():
    lines = proof_text(ct.prove(gates(60)), 60).splitlines()
    deep = [line for line in lines if "… " in line[:6]]
    assert any(line.startswith("60… ") for line in deep)
    assert not any("… " in line[:6] for line in lines[:10])


def test_width_of_the_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width() == 100  # no terminal here
    for columns, width in (("60", 60), ("500", 100), ("5", 20), ("0", 100), ("-5", 100), ("x", 100), ("", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_width() == width
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "stdout", None)
    assert terminal_width() == 100


def test_width_of_a_real_terminal(monkeypatch):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    monkeypatch.delenv("COLUMNS", raising=False)
    main_end, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, b"\x18\x00\x48\x00" + bytes(4))  # 24 rows, 72 columns
    with os.fdopen(end, "w") as stream:
        assert terminal_width(stream) == 72
    os.close(main_end)
    assert terminal_width(stream) == 100  # closed


@pytest.mark.parametrize("columns", ["60", "80"])
@pytest.mark.parametrize(
    "arguments", [("prove", "gemma3", "--level", "numeric"), ("prove", "zamba", "--place", "feed-forward")]
)
def test_the_command_keeps_to_the_width(capsys, monkeypatch, columns, arguments):
    monkeypatch.setenv("COLUMNS", columns)
    status = main([*arguments])
    shown, said = capsys.readouterr()
    assert status == (1 if "zamba" in arguments else 0)
    lines = (shown + said).splitlines()
    assert int(columns) // 2 < max(map(len, lines)) <= int(columns)
    if status:
        assert said.startswith("controllability: architecture zamba: not controllable\n  culprit: zamba")
        assert said.count("\n           ") >= (
            2 if columns == "60" else 1
        )  # what goes on stands under what it belongs to


def test_a_terminal_obeys_no_name():
    block = residual(Linear(Param("W\x1b[2J\n\u202e", ("d", "d"))))
    text = proof_text(ct.prove(block, via="output"))
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert r"W\x1b[2J\n\u202e" in text
    assert printable("ΔW = δ yᵀ/‖y‖², ü 漢") == "ΔW = δ yᵀ/‖y‖², ü 漢"


# ------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_page_is_what_it_says_in_every_encoding(capsys, monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(["prove", "gemma3", "--format", "html"]) == 0
    page = sys.stdout.buffer.getvalue().decode("utf-8")
    assert capsys.readouterr().err == ""
    assert "\\u" not in page
    assert ("ΔW" if encoding == "utf-8" else "&#916;W") in page


def test_a_closed_stdout_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    status = main(["prove", "gemma3"])
    monkeypatch.undo()
    assert status == 2
    assert capsys.readouterr().err == "controllability: stdout is closed: there is nowhere to write the result\n"


def test_an_error_is_one_line_whatever_was_typed(capsys):
    assert main(["recheck", "no\nfile\x1b[31m"]) == 2
    assert capsys.readouterr().err == "controllability: no file\\x1b[31m: there is no such file\n"


def test_brackets_in_a_table_are_no_style(capsys, monkeypatch):
    row = {"rule": "whole block", "status": "failed", "method": "residual left: [bold] [/x] :smile:"}
    monkeypatch.setattr(ct.Proof, "check", lambda self, level: [row])
    assert main(["prove", "gemma3", "--level", "exact"]) == 1
    shown, said = capsys.readouterr()
    assert said == ""
    assert "[bold] [/x] :smile:" in " ".join(shown.split())


# ------------------------------------------------------------------------------------- odd names


def names_of(expression) -> set[str]:
    applied = expression.atoms(sympy.core.function.AppliedUndef)
    return {str(e.func) for e in applied} | {str(s) for s in expression.free_symbols}


@pytest.mark.parametrize("name", ["v", "v'", "t1", "d", "n", "phi_relu", "share", "mu", "a\x00b", "\ud800"])
def test_a_closed_form_takes_no_parameter_for_something_else(name):
    block = residual(Linear(Param("W", ("d", "d"))) >> Bias(Param(name, ("d",))) >> Activation("silu"))
    block = residual(block >> Linear(Param("U", ("d", "d"))))
    proof, plain = (ct.prove(b, via="output") for b in (block, renamed(block, name, "plain")))
    form, known = proof.closed_form(), plain.closed_form()
    own = written_names(block)[name]
    assert own != name
    assert own.isprintable()
    assert set(form.deltas) == {"U"}
    for x, other in zip(form.where.values(), known.where.values(), strict=True):
        assert renamed_heads(x.entry, {own: "plain"}) == other.entry
    assert any(own in names_of(x.entry) for x in form.where.values())
    assert proof.to_latex().isascii()


def renamed(block: Component, old: str, new: str) -> Component:
    from controllability.checks.rebuilt_blocks import renamed as again

    return again(block, {p.name: new if p.name == old else p.name for p in block.parameters()})


def test_a_name_that_is_made_is_not_taken():
    block = two_maps("v", "θ.v")
    assert written_names(block) == {"v": "θ.θ.v", "θ.v": "θ.v"}
    assert written_names(architectures.block("gemma3"))["mlp.up_proj.weight"] == "mlp.up_proj.weight"


@pytest.mark.parametrize("names", [("enc.up", "dec.up"), ("enc.up.weight", "up"), ("v", "W")])
def test_formulas_tell_parameters_apart(names):
    """The formula with the numbers of an instance in it is the patch of this instance."""
    block = residual(
        Linear(Param(names[0], ("d",) * 2)) >> Bias(Param("v", ("d",))) >> Linear(Param(names[1], ("d",) * 2))
    )
    block = block if "v" not in names else two_maps(*names)
    proof = ct.prove(block, via="output")
    sizes = {"d": 2} | ({"h": 2} if "v" in names else {})
    params, v, target = ct.sample(block, d=2, h=2, seed=4)
    (name, matrix), *_ = proof.formula(True, **sizes).items()
    values = {f"v_{i + 1}": v[i] for i in range(2)} | {f"v'_{i + 1}": target[i] for i in range(2)}
    for whole, array in params.items():
        short = whole.removesuffix(".weight").rpartition(".")[2]
        for at in np.ndindex(array.shape):
            index = [str(i + 1) for i in at]
            values |= {f"{whole}[{','.join(index)}]": array[at]}
            if f"{short}_{''.join(index)}" not in values:
                values |= {f"{short}_{''.join(index)}": array[at]}
    found = matrix.subs({s: values[str(s)] for s in matrix.free_symbols}).evalf()
    assert error(np.array(found, dtype=float), proof.construct(params, v, target)[name].dense()) < 1e-12


def test_two_indices_of_two_digits_are_told_apart():
    block = residual(Linear(Param("W", ("d", "d"))))
    entries = ct.prove(block, via="output").formula(d=11)["W"]
    assert {str(s) for s in entries[0, 0].free_symbols if str(s).startswith("W")} == {f"W[1,{i}]" for i in range(1, 12)}


def test_two_parameters_are_not_written_alike():
    latex = ct.prove(two_maps("a.weight", "a")).to_latex()
    assert r"$W^{\text{a.weight}}$ is \texttt{a.weight}" in latex
    assert r"$W^{\text{a}}$ is \texttt{a}" in latex
    both = ct.prove(two_maps("enc.up", "dec.up")).to_latex()
    assert r"$W^{\text{enc.up}}$" in both
    assert r"$W^{\text{dec.up}}$" in both


ODD = ["a b", "ü", "W[0]", "100%", "x_{1}", "<b>&\"'", "\\input{x}", "$x^2$", "~#^", "漢", "a\nb", "v", "\ud800"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_odd_names_compile(tmp_path):
    block = Sum((Identity(), *(two_maps(name, f"{name}.down").terms[1] for name in ODD)))  # type: ignore[attr-defined]
    (tmp_path / "p.tex").write_text(ct.prove(block).to_latex("derived", "".join(ODD)))
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "p.tex"],
        cwd=tmp_path, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-800:]
    assert b"Missing character" not in (tmp_path / "p.log").read_bytes()


def test_odd_names_are_text_in_a_page():
    page = proof_html(ct.prove(two_maps("<b>&\"'", "</code><script>")), "<h1>")
    assert "<script" not in page
    assert "&lt;b&gt;&amp;&quot;" in page


# ------------------------------------------------------------------------------------- wrong use


@dataclass(frozen=True)
class Stubborn(Component):
    """A component of somebody's own that takes no symbols."""

    def __call__(self, params, x):
        raise KeyError("no symbols here")

    def describe(self) -> str:
        return "stubborn"


def test_latex_without_a_closed_form():
    block = residual(Linear(Param("up", ("h", "d"))) >> Stubborn() >> Linear(Param("down", ("d", "h"))))
    latex = ct.prove(block).to_latex()
    assert "No closed form: a component does not run on symbols (KeyError: 'no symbols here')" in latex.replace("$", "")
    assert "No closed form: the shape of a is not known" in ct.prove(
        replace(block, terms=(Identity(), Linear(Param("a"))))
    , via="output").to_latex()  # fmt: skip


@pytest.mark.parametrize("level", ["machine-checked", "", "Symbolic"])
def test_latex_says_no_level_that_there_is_not(level):
    with pytest.raises(BadInput, match="choose one of derived, symbolic, exact, numeric"):
        ct.prove(two_maps("a", "b")).to_latex(level)


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True, None])
def test_sizes_that_are_none(size):
    with pytest.raises(BadInput, match="a size is a whole number of at least 1, got d="):
        ct.prove(two_maps("a", "b")).formula(d=size)


def test_a_block_that_does_not_fit_together_has_no_formula():
    block = residual(Linear(Param("a", ("h", "d"))) >> Linear(Param("b", ("d", "d"))))
    with pytest.raises(BadInput, match="does not compute on symbols at d=2, h=3"):
        ct.prove(block).formula()


def test_verify_of_what_is_no_state():
    block = two_maps("a", "b")
    params, v, target = ct.sample(block, d=2, h=3)
    for wrong, said in (
        ((block, params, {}, None, target), "source state must be an array"),
        ((block, params, {}, v, "x"), "target state must be an array"),
        ((block, params, {}, (v,), (target, target)), "source has 1 inputs, target 2"),
        ((block, params, {}, (), ()), "source state must be an array"),
        (("block", params, {}, v, target), "verify takes a component, got str"),
    ):
        with pytest.raises(BadInput, match=said):
            ct.verify(*wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_a_patch_that_overflows_is_wrong_and_says_why():
    block = two_maps("a", "b")
    params, v, target = ct.sample(block, d=2, h=3)
    patch = {n: 1e300 * d.dense() for n, d in ct.prove(block).construct(params, v, target).items()}
    result = ct.verify(block, params, patch, v, target)
    assert not result.ok
    assert str(result).startswith("wrong patch: residual not finite; unpatched ")
