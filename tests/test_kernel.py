"""Certificates: what the kernel of Coq accepts and refuses, and that the formula in them is the block."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from catalogued import patchable_families
from coq_terms import formula_at
from kernel_mutations import accepted, mutations, spread
from mutations import CONVOLVED, EXPERTS, POST
from test_levels import blocks, square
from trees import grown

import architectures
import controllability as ct
from controllability.checks import reached
from controllability.cli.main import main
from controllability.components import (
    Activation,
    ExpertLinear,
    Joined,
    Linear,
    Mixture,
    Routing,
    Scale,
    Select,
    Streams,
    Sum,
    Window,
    residual,
    rms_norm,
)
from controllability.components.activation import FORMULAS
from controllability.interfaces import Param
from controllability.rocq import check as kernel, reduction
from controllability.rocq.names import stated, theory
from controllability.rocq.nodes import LEMMAS
from controllability.rocq.terms import definition, parse
from controllability.rocq.vocabulary import check_vocabulary
from controllability.rules import RULES

needs_coq = pytest.mark.skipif(shutil.which("coqc") is None, reason="coqc is not installed (Debian: apt install coq)")
SMALL = residual(Linear(Param("up", ("h", "d"))) >> Activation("silu") >> Linear(Param("down", ("d", "h"))))
TREES = ("input-output", "output")
OUTER = EXPERTS.terms[1]
WITHIN = Mixture(
    Linear(Param("S", ("E2", "d"))), Routing(1), ExpertLinear(Param("A", ("E2", "d", "d"))), ExpertLinear(Param("B", ("E2", "d", "d")))
)  # fmt: skip
NESTED = residual(replace(OUTER, inner=WITHIN >> OUTER.inner))


@pytest.fixture(scope="session")
def compiled() -> Path:
    """The folder with the compiled theory."""
    return kernel._theory()[1]


def families() -> list[str]:
    """One family of each shape."""
    return [*patchable_families()]


def certificates(names, **options) -> dict[str, str]:
    found = {}
    for name in names:
        for via in TREES:
            found[f"{name} {via}"] = ct.prove(architectures.block(name), via, **options).to_rocq()
    return found


def has_joint_proof(name: str) -> bool:
    try:
        return bool(ct.prove(architectures.block(name), "output", jointly=True))
    except ct.NotControllable:
        return False


def level_certificates() -> dict[str, str]:
    """Every rule of the table, on every side, jointly too where there is such a proof."""
    found = {}
    for name, (block, options) in blocks().items():
        for jointly in (False, True):
            try:
                proof = ct.prove(block, jointly=jointly, **options)
            except ct.NotControllable:
                continue
            found[f"{name} {jointly}"] = proof.to_rocq()
    found["nested"] = ct.prove(NESTED, "output").to_rocq()
    for route in ("balanced", "uniform", "secular", "ball"):
        found[f"route {route}"] = ct.prove(POST, "output", route).to_rocq()
    return found


# ------------------------------------------------------------------------------------------ every rule, every shape


def test_every_rule_has_a_lemma():
    table = {(rule.name, rule.side) for rule in RULES}
    print(f"{len(table & set(LEMMAS))} of {len(table)} rules have a lemma")
    assert table == set(LEMMAS)


REFUSED = {
    "moves inside a mixture, before its experts": (residual(replace(OUTER, inner=square >> OUTER.inner)), {"frozen": ["U"]}),
    "in a joint proof have no formula": (Sum((CONVOLVED, Select(0) >> square)), {"jointly": True}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_lemma_is_refused_by_name(reason):
    block, options = REFUSED[reason]
    (row,) = ct.prove(block, **options).check("machine")
    assert row["status"] == "skipped"
    assert reason in row["method"]


def test_a_rule_without_a_lemma_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(LEMMAS, ("O-linear", "output"))
    with pytest.raises(ct.BadInput, match="the rule O-linear \\(output side\\) has no lemma"):
        ct.prove(SMALL).to_rocq()


def test_a_side_condition_that_never_holds_is_refused():
    """It would make a theorem about nothing: a normalisation without ε reaches a sphere, no ball."""
    block = residual(Linear(Param("down", ("d", "d"))) >> rms_norm("post", eps=0))
    with pytest.raises(ct.BadInput, match="never holds"):
        ct.prove(block, "output", "ball").to_rocq()


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
def test_one_axis_is_not_cut_in_two_ways(sizes):
    one, two = (Streams(n) >> Joined() for n in sizes)
    with pytest.raises(ct.BadInput, match="sizes do not fit"):
        ct.prove(residual(one >> two >> Linear(Param("W", ("d", "d")))), "output").to_rocq()


@pytest.mark.parametrize("name", FORMULAS)
def test_every_activation_has_its_formula(name):
    proof = ct.prove(residual(SMALL.terms[1].parts[0] >> Activation(name) >> SMALL.terms[1].parts[2]))
    params, v, _ = ct.sample(proof.block, seed=3)
    wanted = proof.block(params, 4 * v)
    found = formula_at(proof, proof.to_rocq(), params, 4 * v)
    assert np.max(np.abs(found - wanted)) <= 1e-12 * np.max(np.abs(wanted))


def test_what_certificates_use_is_stated_by_the_theory():
    used = {"input", "output", "through", "theorem_1", "theorem_1b", "theorem_2", "linear_by", "least_norm", "farkas"}
    used |= {
        "dependent_columns",
        "scale_alone",
        "secular",
        "enlarged",
        "perfect_patch",
        "perfect_patch_1b",
        "bounded_refusal",
    }
    assert used <= stated()
    assert not {"Axiom", "Admitted", "Parameter", "admit", "Conjecture"} & set(theory().replace(".", " ").split())


@needs_coq
def test_every_rule_of_the_table_is_accepted(compiled, tmp_path):
    found = level_certificates()
    for text in found.values():
        check_vocabulary(text)
    verdicts = accepted([*found.values()], compiled, tmp_path)
    assert all(verdicts), [name for name, yes in zip(found, verdicts, strict=True) if not yes]


@needs_coq
def test_one_family_of_each_shape_is_accepted_by_both_theorems(compiled, tmp_path):
    found = certificates(families())
    verdicts = accepted([*found.values()], compiled, tmp_path)
    assert all(verdicts), [name for name, yes in zip(found, verdicts, strict=True) if not yes]


@needs_coq
@pytest.mark.slow
@pytest.mark.parametrize("jointly", [False, True])
def test_every_family_is_accepted_by_both_theorems(compiled, tmp_path, jointly):
    names = [name for family in patchable_families().values() for name in family]
    alone = [name for name in names if jointly and not has_joint_proof(name)]
    assert set(alone) == ({"inkling_text", "inkling2_text"} if jointly else set())  # their taps serve one token
    texts = sorted(set(certificates([name for name in names if name not in alone], jointly=jointly).values()))
    assert all(accepted(texts, compiled, tmp_path, seconds=3000))


def test_the_formula_is_the_block():
    """Written by one code, read by another, and held against the block itself."""
    for name in families():
        proof = ct.prove(architectures.block(name), "output")
        window = any(isinstance(node, Window) for node in proof.layout.nodes.values())
        params, v, _ = ct.sample(proof.block, tokens=(6,) if window else ())
        wanted = proof.block(params, v)[-1] if window else proof.block(params, v)
        found = formula_at(proof, proof.to_rocq(), params, v)
        assert np.max(np.abs(found - wanted)) <= 1e-12 * np.max(np.abs(wanted)), name


# ------------------------------------------------------------------------------------------ wrong certificates


def wrong(names, most: int) -> list[tuple[str, str]]:
    found = certificates(names)
    return [(f"{name}: {what}", text) for name, right in found.items() for what, text in spread(mutations(right), most)]


@needs_coq
def test_wrong_certificates_are_refused(compiled, tmp_path):
    found = wrong(["llama", "gemma3", "mixtral"], 12)
    right = certificates(["llama"])
    texts = [*right.values(), *(text for _, text in found), *right.values()]  # errors leave the session as it was
    verdicts = accepted(texts, compiled, tmp_path)
    assert verdicts[:2] == verdicts[-2:] == [True, True]
    assert not [what for (what, _), yes in zip(found, verdicts[2:-2], strict=True) if yes]
    assert len(found) >= 60


@needs_coq
@pytest.mark.slow
def test_hundreds_of_wrong_certificates_are_refused(compiled, tmp_path):
    found = wrong(families(), 8)
    assert len(found) >= 300
    verdicts = accepted([text for _, text in found], compiled, tmp_path, seconds=3000)
    assert not [what for (what, _), yes in zip(found, verdicts, strict=True) if yes]


@needs_coq
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("sum_after", "Undo (fun s y => add s y) (fun s w => sub s w) (fun _ _ => True) _"),
        ("sum_after", "Undo (fun s y => add s y) (fun s w => w) (fun _ _ => True) _"),
        ("linear", "fun B => Leaf (fun W x => after B (apply W x)) (fun _ x _ => True) (fun W x delta => rank_one W delta (direction x)) _"),
        ("linear", "fun B => Leaf (fun W x => after B (apply W x)) (fun _ x _ => x <> zero) (fun W x delta => rank_one W delta x) _"),
    ],
    ids=["difference the wrong way", "skip forgotten", "side condition forgotten", "norm forgotten"],
)  # fmt: skip
def test_a_wrong_reading_of_a_lemma_is_refused(monkeypatch, compiled, tmp_path, name, instead):
    """What the emitter takes for the rule is not what the theory states."""
    right = ct.prove(SMALL).to_rocq()
    monkeypatch.setattr(reduction, "definition", lambda given: parse(instead) if given == name else definition(given))
    altered = ct.prove(SMALL).to_rocq()
    assert altered != right
    assert accepted([right, altered, right], compiled, tmp_path) == [True, False, True]


# ------------------------------------------------------------------------------------------ the level


@needs_coq
def test_level_machine_is_reached_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = ct.prove(SMALL).check("machine")
    assert [row["status"] for row in rows] == ["passed"]
    assert reached("machine", rows) == "machine"
    assert "functional_extensionality_dep" in rows[0]["method"]
    (remembered,) = tmp_path.glob("controllability/*/*.json")
    assert set(json.loads(remembered.read_text())["axioms"]) <= kernel.AXIOMS
    monkeypatch.setattr(kernel, "SECONDS", 0)  # whoever asked Coq again would be out of time
    assert ct.prove(SMALL).check("machine") == rows


@needs_coq
def test_names_that_coq_has_itself_are_no_trouble(compiled, tmp_path):
    names = ("forall", "x", "block", "fun.weight", "3d", "apply", "v", "été", "H1", "d")
    wide = [Linear(Param(name, ("d", "d"))) for name in names]
    block = residual(wide[0])
    for one in wide[1:]:
        block = residual(block.terms[1] >> Activation("tanh") >> one)
    text = ct.prove(block, "output").to_rocq()
    check_vocabulary(text)
    assert accepted([text], compiled, tmp_path) == [True]


def test_without_coq_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    rows = ct.prove(SMALL).check("machine")
    assert [row["status"] for row in rows] == ["skipped"]
    assert "apt install coq" in rows[0]["method"]
    assert main(["prove", "llama", "--level", "machine"]) == 0
    assert "patchable (derived)" in capsys.readouterr().out


def test_a_component_without_a_formula_is_refused_by_name():
    unknown = Linear(Param("up", ("h", "d"))) >> Activation("own", symbol=True) >> Linear(Param("down", ("d", "h")))
    assert "Variable own : R -> R." in ct.prove(residual(unknown)).to_rocq()  # any function at all

    class Leaky(Activation):
        pass

    leaky = residual(Linear(Param("up", ("h", "d"))) >> Leaky("relu") >> Linear(Param("down", ("d", "h"))))
    with pytest.raises(ct.BadInput, match="Leaky"):
        ct.prove(leaky).to_rocq()
    assert ct.prove(leaky).check("machine")[0]["status"] == "skipped"


@pytest.mark.parametrize("eps", [2**0.5, float("1e-300")])
def test_numbers_that_are_no_short_fraction_are_refused(eps):
    post = residual(Linear(Param("down", ("d", "d"))) >> rms_norm("post", eps=eps) >> Scale(Param("g", ("d",))))
    if eps > 1:
        assert (
            "rms (14142135623730951 / 10000000000000000)" in ct.prove(post, "output").to_rocq()
        )  # its digits, exactly
    else:
        with pytest.raises(ct.BadInput, match="40 digits"):
            ct.prove(post, "output").to_rocq()


@needs_coq
@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(400), marks=pytest.mark.slow)], ids=["20", "400"])
def test_certificates_of_random_trees_are_accepted(seeds, compiled, tmp_path):
    """Whatever the prover proves has a certificate that the kernel accepts, or none at all."""
    found, without = {}, 0
    for seed in seeds:
        case = grown(seed)
        for via, jointly in product(TREES, (False, True)):
            try:
                proof = ct.prove(case.block, via, case.options["route"], case.frozen, jointly=jointly)
            except ct.NotControllable:
                continue
            try:
                found[seed, via, jointly] = proof.to_rocq()
            except ct.BadInput:  # it says which component, rule or number
                without += 1
    for text in found.values():
        check_vocabulary(text)
    verdicts = accepted([*found.values()], compiled, tmp_path, seconds=3000)
    assert not [key for key, yes in zip(found, verdicts, strict=True) if not yes]
    assert len(found) > 2 * without
