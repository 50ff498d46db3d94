"""What a joint proof says: the printed formulas are those that are executed; as text, page, document, from the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import error
from joint_blocks import joint

import architectures
import controllability as ct
from controllability.cli.main import main
from controllability.components import Bias, ExpertLinear, Linear, Scale
from controllability.components.mixture import CHOSEN
from controllability.interfaces import JointOptions, JointSolution, Param
from controllability.rendering.html import proof_html
from controllability.rules import RULES

# --------------------------------------------------------------------- printed formulas are what is executed


def test_the_printed_formulas_are_what_the_components_do():
    rng = np.random.default_rng(0)
    W, m, V = rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=(5, 4, 3))
    z, z2, gaps = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=(2, 4))
    printed = {rule.name: rule.patch for rule in RULES if rule.jointly}

    def solved(component, params, x, gap, side="output") -> JointSolution:
        way = getattr(component, f"{side}_updates")()[0].jointly
        return way.solve(JointOptions(), params, x, gap, gap * 0).delta.dense()

    assert printed["O-linear jointly"] == "ΔW = D Y⁺"
    assert error(solved(Linear(Param("W")), {"W": W}, z, gaps), gaps.T @ np.linalg.pinv(z.T)) < 1e-13
    assert printed["I-linear jointly"] == "ΔW = W(Z'−Z)Z⁺"
    found = solved(Linear(Param("W")), {"W": W}, z, (z2 - z) @ W.T, "input")
    assert error(found, W @ (z2 - z).T @ np.linalg.pinv(z.T)) < 1e-13
    assert printed["I-experts jointly"] == "ΔW_e = W_e(Z'_e−Z_e)Z_e⁺"
    given = {"V": V, CHOSEN: np.array([[1], [1]])}
    rows, gap = z[:, None], ((z2 - z) @ V[1].T)[:, None]
    assert (
        error(solved(ExpertLinear(Param("V")), given, rows, gap, "input")[1], V[1] @ (z2 - z).T @ np.linalg.pinv(z.T))
        < 1e-13
    )
    same = np.stack([z[0], z[0]])
    assert printed["O-bias jointly"] == "Δb = δ_t"
    assert error(solved(Bias(Param("b")), {"b": m}, z, same), z[0]) < 1e-15
    assert printed["O-scale jointly"] == "Δm = δ_t/y_t"
    assert error(solved(Scale(Param("m")), {"m": m}, z, z * z2[0]), z2[0]) < 1e-14
    assert (printed["I-bias jointly"], printed["I-scale jointly"]) == ("Δb = f(z'_t) − f(z_t)", "Δm = m∘(z'_t−z_t)/z_t")


# ----------------------------------------------------------------------------------------- what it says


def test_the_text_says_that_one_patch_serves_many():
    text = str(joint("gemma3"))
    assert text.startswith("patchable (derived), via input-output (Theorem 1), route auto, one patch for T tokens\n")
    flat = " ".join(text.split())
    for served in (
        "mlp.gate_proj.weight serves T ≤ d",
        "mlp.up_proj.weight serves T ≤ d",
        "mlp.down_proj.weight serves T ≤ h",
    ):
        assert f"- {served} -" in flat or f"- {served} side" in flat
    assert "post_feedforward_layernorm.weight serves T ≤ about d/2 with every RMS kept, and any T when ε > 0" in flat
    assert (
        "tokens whose inputs of mlp.down_proj.weight depend on each other have targets that depend in the same way"
        in flat
    )
    assert "one patch" not in str(ct.prove(architectures.block("gemma3")))
    mixture = " ".join(str(joint("mixtral")).split())
    assert "mlp.experts.down_proj serves T ≤ (experts used)·h" in mixture
    assert "mlp.experts.gate_up_proj serves T ≤ d an expert" in mixture


def test_the_page_says_so_too():
    page = proof_html(joint("gemma3"), "gemma3")
    for said in ("the same for all of them", "One patch for T tokens", "serves T ≤ about d/2", "O-normalised jointly"):
        assert said in page
    assert "the same for all of them" not in proof_html(ct.prove(architectures.block("gemma3")), "gemma3")


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_the_document_says_so_and_compiles(name, tmp_path):
    text = joint(name).to_latex(name=name)
    assert "the same for all $t$" in text
    assert "pseudo-inverse" in text
    assert "(U+" not in text  # every sign is known
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here")
    (tmp_path / "proof.tex").write_text(text)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "proof.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("asked", ["formula", "closed_form"])
def test_formulas_in_entries_are_refused_with_those_in_matrices(asked):
    with pytest.raises(ct.BadInput, match=re.escape("mlp.down_proj.weight: ΔW = D Y⁺")):
        getattr(joint("llama"), asked)()


# ------------------------------------------------------------------------------------- the command line


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, *capsys.readouterr()


def test_the_command(capsys, tmp_path):
    status, out, err = run(capsys, "prove", "llama", "--jointly", "--via", "output", "--level", "numeric")
    assert (status, err) == (0, "")
    assert "one patch for T tokens" in out
    assert "mlp.down_proj.weight serves T ≤ h" in out
    status, out, _ = run(capsys, "prove", "llama", "--jointly", "--json")
    data = json.loads(out)
    assert data["jointly"] is True
    assert data["most"] == {"mlp.gate_proj.weight": "d", "mlp.up_proj.weight": "d", "mlp.down_proj.weight": "h"}
    (tmp_path / "proof.json").write_text(out)
    status, out, _ = run(capsys, "recheck", tmp_path / "proof.json", "--json")
    again = json.loads(out)
    assert (status, again["jointly"], again["most"]) == (0, True, data["most"])
    (tmp_path / "proof.json").write_text(json.dumps(data | {"most": {}}))
    status, _, err = run(capsys, "recheck", tmp_path / "proof.json")
    assert status == 1
    assert "most: the tree has" in err
