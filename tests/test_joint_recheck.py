"""A joint proof as a file: it comes back the same, and what was changed in it is refused."""

from __future__ import annotations

import copy
import json

import pytest
from joint_blocks import FAMILIES, joint
from jsonschema import Draft202012Validator
from proof_schema import SCHEMA
from tamperings import at, through_text

import architectures
import controllability as ct


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_joint_proof_comes_back_and_constructs_the_same_patch(name, via):
    proof = joint(name, via)
    data = through_text(proof)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(data)
    again = ct.Proof.from_dict(data)
    assert again == proof
    assert again.to_dict() == data
    assert (again.jointly, again.max_tokens) == (True, proof.max_tokens)
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
