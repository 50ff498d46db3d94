"""Joint proofs: the levels of proof, what they say in words, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from helpers import error
from jsonschema import Draft202012Validator
from proof_schema import SCHEMA
from tamperings import at, through_text

import architectures
import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.checks import exact as exact_level
from controllability.checks import together
from controllability.checks.numeric import residuals_of
from controllability.checks.rules import rule_check
from controllability.cli.main import main
from controllability.components import (
    Activation,
    Bias,
    ExpertLinear,
    Linear,
    Mixture,
    Normalize,
    Routing,
    Scale,
    SoftCap,
    residual,
    rms_norm,
)
from controllability.components.mixture import CHOSEN
from controllability.deltas import LowRank
from controllability.interfaces import Param, Solved, Together
from controllability.jointly import span, ways
from controllability.rendering.html import proof_html
from controllability.rules import RULES
from controllability.rules import jointly as joint_rules

up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
square, silu, tanh = Linear(Param("W", ("d", "d"))), Activation("silu"), Activation("tanh")
EXPERTS = Mixture(
    Linear(Param("R", ("E", "d"))), Routing(2), ExpertLinear(Param("U", ("E", "h", "d"))) >> silu, ExpertLinear(Param("V", ("E", "d", "h")))
)  # fmt: skip
BLOCKS = {  # every joint rule on every side
    "theorem 1": (residual(up >> silu >> down), {}),
    "vectors": (residual(rms_norm("pre") >> silu >> Bias(Param("b", ("d",)))), {}),
    "input bias": (residual(Linear(Param("up", ("h", "d")), Param("c", ("h",))) >> silu >> down), {"frozen": ["up"]}),
    "scale": (residual(square >> rms_norm("post")), {"via": "output", "frozen": ["W"]}),
    "experts": (residual(EXPERTS), {}),
    "experts, 1b": (residual(EXPERTS), {"via": "output"}),
    "normalised": (residual(square >> rms_norm("post")), {"via": "output"}),
    "normalised, through": (residual(EXPERTS >> rms_norm("post")), {}),
}
FAMILIES = ["llama", "gemma3", "gptj", "bert", "olmo2", "mixtral"]


def joint(name: str, via: str = "input-output") -> ct.Proof:
    return ct.prove(architectures.block(name), via=via, jointly=True)


# ------------------------------------------------------------------------------------------- level symbolic


def joint_steps(name):
    block, options = BLOCKS[name]
    return [step for step in ct.prove(block, jointly=True, **options).root.walk() if step.rule.jointly]


SLOW = ("experts", "experts, 1b", "normalised, through")  # sums over experts reduce slowly


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BLOCKS])
def test_a_joint_rule_passes_its_own_check(name):
    for step in joint_steps(name):
        status, method = rule_check(step)
        assert status == "passed", f"{step.rule.name}: {method}"
        assert "2 tokens, symbolic entries at size" in method


def test_every_joint_rule_is_among_them():
    used = {(step.rule.name, step.rule.side) for name in BLOCKS for step in joint_steps(name)}
    assert used == {(rule.name, rule.side) for rule in RULES if rule.jointly}


def test_a_check_says_what_was_reduced_and_what_is_refused():
    rows = {row["rule"]: row["method"] for row in ct.prove(BLOCKS["vectors"][0], jointly=True).check("symbolic")}
    assert rows["O-bias jointly"] == (
        "patched output − output − δ reduced to 0 for one token with any targets, and dependent ones with targets that "
        "depend in the same way; other targets of dependent tokens are refused; 2 tokens, symbolic entries at size 2"
    )
    assert "undefined functions" in rows["theorem-1"]  # what composes others acts token by token


@pytest.fixture
def mutated(monkeypatch):
    def change(target, attribute, wrong):
        monkeypatch.setattr(target, attribute, wrong)

    return change


def status(name, rule):
    return rule_check(next(step for step in joint_steps(name) if step.rule.name == rule))


def wrong_sign(self):
    return -self.basis / (self.basis * self.basis).sum(-1, keepdims=True)


def unchecked(condition, xp, rest, *_):
    return np.ones((len(rest), 1))


def without_root(self, G):
    xp = ARITHMETICS["sympy"]
    m = self.scale.effective(self.run.params)
    return 2 * m, xp.name(G / (2 * m))


@pytest.mark.parametrize(
    ("block", "rule", "target", "attribute", "wrong", "said"),
    [
        ("theorem 1", "O-linear jointly", span.Span, "right", property(wrong_sign), "leaves"),
        ("theorem 1", "I-linear jointly", ways, "reached", unchecked, "are not refused"),
        ("vectors", "O-bias jointly", ways, "reached", unchecked, "are not refused"),
        ("experts", "I-experts jointly", ways, "reached", unchecked, "are not refused"),
        ("normalised", "O-normalised jointly", joint_rules._OneScale, "_enlarged", without_root, "leaves"),
    ],
)
def test_a_wrong_joint_rule_fails_its_own_check(mutated, block, rule, target, attribute, wrong, said):
    assert status(block, rule)[0] == "passed"
    mutated(target, attribute, wrong)
    found, method = status(block, rule)
    assert found == "failed"
    assert said in method


def test_the_whole_block_for_two_tokens_of_symbols():
    for name, via in (("olmo2", "input-output"), ("llama", "output")):
        row = joint(name, via).check("symbolic")[-1]
        assert (row["rule"], row["status"]) == ("whole block", "passed"), row
        assert "residual reduced to 0 for 2 tokens with one patch, at d = 2, h = 3" in row["method"]


def test_what_is_not_run_is_skipped():
    status, method = together.whole_block(ct.prove(residual(EXPERTS), via="output", jointly=True))
    assert status == "skipped"
    assert method.startswith("not run: experts and two tokens of symbols")


# ---------------------------------------------------------------------------------- levels exact and numeric


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_block_on_fractions(name, via):
    (row,) = joint(name, via).check("exact")
    assert row["status"] == "passed", row
    assert "residual exactly 0" in row["method"]
    assert "one patch for 2 tokens" in row["method"]


def test_a_patch_for_one_token_fails_the_exact_level(monkeypatch):
    """A negative control: what serves the first token only leaves a residual at the second."""

    def first(self, gap, ridge=0.0):
        return solve(self, np.concatenate([gap[:1]] + [gap[:1] * 0] * (len(gap) - 1)), ridge)

    solve = span.Span.solve
    monkeypatch.setattr(span.Span, "solve", first)
    for name in ("bert", "mixtral"):
        assert joint(name, "output").check("exact")[0]["status"] == "failed"


def test_residuals_fall_to_fifty_digits():
    for name in FAMILIES:
        residuals, _, unpatched = residuals_of(joint(name), 0)
        assert residuals["50 digits"] < 1e-40, name
        assert residuals["float64"] < 1e-12
        assert unpatched > 0.1
        assert joint(name).check("numeric")[0]["status"] == "passed"


def test_many_digits_do_not_go_through_the_linear_program(monkeypatch):
    def program(*_):
        raise AssertionError("many digits in a float64 program")

    proof = joint("gemma3")
    numbers = ct.sample(proof.block, "mpmath", tokens=(2,))
    monkeypatch.setattr(joint_rules._OneScale, "_programmed", program)
    patch = proof.construct(*numbers)
    assert [r.route for r in patch.journal.routes] == ["enlarged"]
    with pytest.raises(ct.NotExact, match="keep_rms is decided by linear programming"):
        proof.construct(*numbers, together=Together(keep_rms=True))


def test_the_exact_level_in_fractions_has_a_residual_without_a_patch():
    proof = joint("mixtral", "output")
    assert exact_level._fractions_do(proof)
    assert not exact_level._fractions_do(joint("llama"))
    params, v, v_target = ct.sample(BLOCKS["theorem 1"][0], "rational", tokens=(2,), d=2, h=3)
    block = residual(up >> Activation("cubic", coefficients=(0, 1, 0, 1)) >> down)
    patch = ct.prove(block, jointly=True).construct(params, v, v_target)
    assert (block(patch.applied_to(params), v) == block(params, v_target)).all()
    assert (block(params, v) != block(params, v_target)).any()


# --------------------------------------------------------------------- printed formulas are what is executed


def test_the_printed_formulas_are_what_the_components_do():
    rng = np.random.default_rng(0)
    W, m, V = rng.normal(size=(4, 3)), rng.normal(size=3), rng.normal(size=(5, 4, 3))
    z, z2, gaps = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=(2, 4))
    printed = {rule.name: rule.patch for rule in RULES if rule.jointly}

    def solved(component, params, x, gap, side="output") -> Solved:
        way = getattr(component, f"{side}_steerings")()[0].jointly
        return way.solve(Together(), params, x, gap, gap * 0).delta.dense()

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


# ---------------------------------------------------------------------------------------- as a file


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_joint_proof_comes_back_and_constructs_the_same_patch(name, via):
    proof = joint(name, via)
    data = through_text(proof)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(data)
    again = ct.Proof.from_dict(data)
    assert again == proof
    assert again.to_dict() == data
    assert (again.jointly, again.most) == (True, proof.most)
    numbers = ct.sample(proof.block, tokens=(3,))
    here, there = (p.construct(*numbers) for p in (proof, again))
    for name in here:
        assert (here[name].dense() == there[name].dense()).all()


TAMPERED = {
    "for each token": (lambda d: (d.pop("jointly"), d.pop("most")), r"I-linear jointly.*it serves one patch for many tokens, and the proof is"),
    "jointly: false": (lambda d: d.update(jointly=False), "jointly: expected true, or to be left out"),
    "jointly: 1": (lambda d: d.update(jointly=1), "jointly: expected true or false"),
    "more tokens": (lambda d: d["most"].update({"mlp.gate_proj.weight": "h"}), "most: the tree has"),
    "no bound": (lambda d: d.pop("most"), "most: the tree has"),
    "a rule for each token": (lambda d: at(d, 1, 0).update(rule="O-linear"), r"O-linear at .*it serves each token with its own patch"),
    "no rank condition": (lambda d: at(d, 1, 0).update(conditions=[]), "conditions is"),
    "another condition": (lambda d: at(d, 1)["conditions"][0].update(statement="always"), "conditions is"),
    "another note": (lambda d: at(d, 1).update(note="route ball"), "note is"),
}  # fmt: skip


@pytest.mark.parametrize("change", TAMPERED)
def test_a_tampered_joint_proof_is_refused(change):
    data = copy.deepcopy(through_text(joint("gemma3")))
    tamper, said = TAMPERED[change]
    tamper(data)
    with pytest.raises((ct.NotVerified, ct.BadInput), match=said):
        ct.Proof.from_dict(data)


def test_a_proof_for_each_token_is_not_sold_as_a_joint_one():
    data = through_text(ct.prove(architectures.block("llama"))) | {"jointly": True, "most": {}}
    with pytest.raises(
        ct.NotVerified, match="it serves each token with its own patch, and the proof is of one for many"
    ):
        ct.Proof.from_dict(data)
    assert "jointly" not in through_text(ct.prove(architectures.block("llama")))


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


# ------------------------------------------------------------------------------------------- refusals


def test_a_bias_alone_serves_tokens_with_equal_changes():
    block = residual(tanh >> Bias(Param("b", ("d",))))
    proof = ct.prove(block, via="output", jointly=True)
    assert proof.most == {"b": 1}
    assert [c.statement for c in proof.conditions] == ["all tokens ask for the same change of b (equal δ_t)"]
    params, v, _ = ct.sample(block, tokens=(2,))
    with pytest.raises(ct.SideConditionFailed, match="all tokens ask for the same change of b") as failed:
        proof.construct(params, v, ct.sample(block, tokens=(2,))[2])
    assert failed.value.certificate is not None
    states = np.stack([v[0], v[0]]), np.stack([v[1], v[1]])
    patch = proof.construct(params, *states)
    assert patch["b"].value.shape == (4,)
    assert error(block(patch.applied_to(params), states[0]), block(params, states[1])) < 1e-14
    assert error(block(params, states[0]), block(params, states[1])) > 0.1


def test_a_scale_alone_serves_tokens_with_equal_ratios():
    block = rms_norm("pre") >> silu >> Scale(Param("m", ("d",)))
    proof = ct.prove(residual(block), via="output", jointly=True, frozen=["pre.weight"])
    assert proof.most == {"m": 1}
    assert "δ_t/x_t" in proof.conditions[0].statement


def test_a_block_without_a_joint_proof_names_the_culprit_and_what_helps():
    block = residual(square >> SoftCap(30.0) >> rms_norm("post"))
    with pytest.raises(ct.NotControllable) as refused:
        ct.prove(block, via="output", jointly=True, frozen=["W", "post.weight"])
    assert "route auto, jointly, frozen W, post.weight" in str(refused.value)
    assert refused.value.culprit in ("linear W", "scale post.weight")
    remedy = refused.value.remedy
    assert remedy is not None
    assert remedy.jointly
    assert ct.prove(remedy.block, **remedy.options).jointly


def test_a_norm_without_a_scale_is_no_joint_normalised_output():
    bare = residual(square >> Normalize("rms", 1e-2))
    assert ct.prove(bare, via="output").rules  # the ball: each token alone
    with pytest.raises(
        ct.NotControllable, match="one patch for many tokens moves the scale after the normalisation, and none may move"
    ):
        ct.prove(bare, via="output", jointly=True)


# ---------------------------------------------------------------- faults that the checks above have shown


def fractions(*rows):
    return ARITHMETICS["rational"].array([[Fraction(x) for x in row] for row in rows])


def test_a_certificate_is_not_about_tokens_that_agree():
    """Tokens 0 and 1 are the same and agree; token 2 contradicts both."""
    x, gap = fractions((1, 2), (1, 2), (2, 4)), fractions((1, 0), (1, 0), (1, 0))
    leaf = Linear(Param("W"))
    for numbers in ((x, gap), (x.astype(float), gap.astype(float))):
        with pytest.raises(ct.SideConditionFailed) as failed:
            leaf.output_steerings()[0].jointly.solve(Together(), {}, *numbers, numbers[1] * 0)
        certificate = failed.value.certificate
        assert 2 in certificate.tokens
        assert certificate.targets > 0.1
        assert certificate.inputs < 1e-15
    assert certificate.exact is False
    with pytest.raises(ct.SideConditionFailed) as failed:
        leaf.output_steerings()[0].jointly.solve(Together(), {}, x, gap, gap * 0)
    assert failed.value.certificate.holds()


def test_nothing_to_change_is_a_patch_of_zeros():
    x = ARITHMETICS["mpmath"].array(np.zeros((2, 3)))
    solved = Linear(Param("W")).output_steerings()[0].jointly.solve(Together(), {}, x, x, x)
    assert isinstance(solved.delta, LowRank)
    assert (solved.delta.dense() == 0).all()
    assert (solved.delta.effect(x) == 0).all()


def test_one_row_for_each_token_inside_a_mixture():
    """What stands before the experts' own maps reads (T, 1, d): a token is a row there."""
    inner = square >> rms_norm("in") >> ExpertLinear(Param("U", ("E", "h", "d"))) >> silu
    block = residual(replace(EXPERTS, inner=inner))
    for kind, limit in (("numpy", 1e-12), ("mpmath", 1e-12)):
        params, v, v_target = ct.sample(block, kind, seed=3, tokens=(3,))
        patch = ct.prove(block, jointly=True).construct(params, v, v_target)
        wanted = block(params, v_target)
        assert error(*(x.astype(float) for x in (block(patch.applied_to(params), v), wanted))) < limit
        assert error(*(x.astype(float) for x in (block(params, v), wanted))) > 0.1
