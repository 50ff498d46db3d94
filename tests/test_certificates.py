"""Proofs as JSON: the way there and back, the checker that does not search, and what it refuses."""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sympy
from catalogued import patchable_families
from helpers import error
from jsonschema import Draft202012Validator
from proof_schema import SCHEMA, written_schema
from tamperings import ILL_FORMED, WRONG, through_text, walk
from trees import D, Grower

import architectures
import controllability as ct
from controllability.components import Bias, Linear, Normalize, Routing, residual
from controllability.interfaces import Bijection, Component, Layout, Param
from controllability.proof_files.codec import decode, encode, own_classes
from controllability.proof_files.read import BESIDE, MANY, PROOF
from controllability.proof_files.recheck import NODE
from controllability.solvers.norm_scale import ROUTES


def bits(patch: ct.Patch) -> dict[str, Any]:
    """Every number of a patch, as bytes."""
    return {
        str(name): {k: np.asarray(v).tobytes() for k, v in vars(delta).items()} | {"class": type(delta).__name__}
        for name, delta in patch.items()
    }


def constructed(proof: ct.Proof, *numbers: Any) -> Any:
    try:
        return bits(proof.construct(*numbers))
    except ct.SideConditionFailed as failed:
        return str(failed)


# --- there and back ---------------------------------------------------------------------------------------------------

PATCHABLE = patchable_families()


@pytest.mark.parametrize("name", PATCHABLE)
@pytest.mark.parametrize("via", ["input-output", "output"])
def test_every_shape_comes_back_and_constructs_the_same_patch(name, via):
    block = architectures.block(name)
    proof = ct.prove(block, via=via)
    data = through_text(proof)
    again = ct.Proof.from_dict(data)
    assert again.to_dict() == proof.to_dict() == data
    assert again == proof
    assert [s.conditions for s in again.root.walk()] == [s.conditions for s in proof.root.walk()]
    numbers = ct.sample(block, tokens=(2,))
    assert constructed(again, *numbers) == constructed(proof, *numbers)


@pytest.mark.parametrize(("of_each", "least"), [(1, len(PATCHABLE)), pytest.param(None, 151, marks=pytest.mark.slow)])
def test_every_architecture_fits_the_schema_and_comes_back(of_each, least):
    """Families of one shape differ in the names of their parameters."""
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    count = 0
    for names in PATCHABLE.values():
        for name in names[:of_each]:
            data = through_text(ct.prove(architectures.block(name)))
            validator.validate(data)
            assert ct.Proof.from_dict(data).to_dict() == data
            count += 1
    assert count >= least


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(250), marks=pytest.mark.slow)], ids=len)
def test_random_trees_come_back(seeds):
    same = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        grower = Grower(rng)
        block = grower.block(rng.randint(1, 4))
        frozen = [name for name in grower.values if rng.random() < 0.1]
        options = {"via": rng.choice(("input-output", "output")), "route": rng.choice(ROUTES), "frozen": frozen}
        try:
            proof = ct.prove(block, **options)
        except ct.NotControllable:
            continue
        data = through_text(proof)
        again = ct.Proof.from_dict(data)
        assert again.to_dict() == proof.to_dict() == data
        states = np.random.default_rng(seed).normal(size=(2, len(Layout.of(block).inputs), 2, D))
        v, v_target = (tuple(run) if len(run) > 1 else run[0] for run in states)
        found = constructed(again, grower.values, v, v_target)
        assert found == constructed(proof, grower.values, v, v_target)
        same["condition" if isinstance(found, str) else "patch"] += 1
    assert same["patch"] >= len(seeds) * 0.4
    assert same["condition"] >= len(seeds) * 0.02


def test_nothing_is_searched(monkeypatch):
    data = through_text(ct.prove(architectures.block("qwen2_moe")))

    def search(*_: Any) -> None:
        raise AssertionError("a checker does not search")

    monkeypatch.setattr("controllability.prover.search.Prover.__init__", search)
    monkeypatch.setattr("controllability.prover.search.Prover.attempt", search)
    assert ct.Proof.from_dict(data).to_dict() == data


@pytest.mark.parametrize(("name", "level"), [("gemma3", "numeric"), ("gpt2", "symbolic")])
def test_a_rebuilt_proof_passes_its_checks(name, level):
    proof = ct.Proof.from_dict(through_text(ct.prove(architectures.block(name))))
    assert {c["status"] for c in proof.check(level)} == {"passed"}


@pytest.mark.parametrize(
    "value",
    [
        0, -3, 2.5, -0.0, 1e-300, 10**40, float("-inf"), Fraction(-1, 3), None, True, "text", (1, (2.0, "h")), (),
        slice(0, 4, None), slice(None, None, None), sympy.sqrt(2) / 2, sympy.pi, sympy.E, sympy.Rational(2, 7),
        sympy.Float(0.1), sympy.Float("0.1", 40), sympy.exp(-2) + sympy.log(3), np.float64(0.1), np.float32(0.1), np.int64(3),
        Param("w", ("2h", 4), (slice(0, 4), slice(2, 8))), Normalize("layer", Fraction(1, 8), "norm"),
        Routing(2, groups=(4, 2), correction=Param("c", ("E",)), scaling=sympy.sqrt(3)),
    ],
)  # fmt: skip
def test_values_come_back(value):
    again = decode(json.loads(json.dumps(encode(value), allow_nan=False)), "block", {})
    assert again == value
    assert encode(again) == encode(value)
    assert str(again) == str(value) or type(value).__module__ == "numpy"


# --- classes of one's own ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaky(Component, Bijection):
    slope: Any

    def __call__(self, params, x):
        return np.where(x > 0, x, x * self.slope)

    def invert(self, params, y):
        return np.where(y > 0, y, y / self.slope)

    def describe(self):
        return f"leaky {self.slope}"


def test_a_class_of_the_callers():
    block = residual(Linear(Param("up", ("h", "d"))) >> Linear(Param("down", ("d", "h"))) >> Leaky(0.5))
    data = through_text(ct.prove(block))
    with pytest.raises(ct.BadInput, match=r"parts\[2\]\.foreign: expected a class that was passed in components="):
        ct.Proof.from_dict(data)
    again = ct.Proof.from_dict(data, components=[Leaky])
    params, v, v_target = ct.sample(block)
    patch = again.construct(params, v, v_target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-12


def test_a_class_of_the_same_name_is_not_taken_for_ours():
    class Linear(Leaky):
        pass

    block = residual(own_classes()["Linear"](Param("w", ("d", "d"))) >> Bias(Param("b", ("d",))) >> Linear(0.5))
    data = through_text(ct.prove(block))
    assert [next(iter(part)) for part in data["block"]["fields"]["terms"][1]["fields"]["parts"]] == ["class"] * 2 + [
        "foreign"
    ]
    with pytest.raises(ct.BadInput, match="foreign"):
        ct.Proof.from_dict(data)
    assert isinstance(ct.Proof.from_dict(data, [Linear]).block.children()[1].children()[2], Linear)
    with pytest.raises(ct.BadInput, match="classes of different names"):
        ct.Proof.from_dict(data, [Linear, own_classes()["Linear"]])


@pytest.mark.parametrize("slope", [lambda x: x, sympy.Symbol("c"), {"a": 1}, float("nan"), np.ones(2)])
def test_what_json_cannot_hold_is_written_as_opaque_and_not_read(slope):
    block = residual(Linear(Param("w", ("d", "d"))) >> Bias(Param("b", ("d",))) >> Leaky(slope))
    data = through_text(ct.prove(block))
    with pytest.raises(ct.BadInput, match=r"fields\.slope: .* could not be written as JSON"):
        ct.Proof.from_dict(data, [Leaky])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma_data():
    return through_text(ct.prove(architectures.block("gemma3")))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_proof_is_refused_at_its_node(gemma_data, case):
    change, node, what = WRONG[case]
    data = copy.deepcopy(gemma_data)
    change(data)
    with pytest.raises(ct.NotVerified, match=node) as refused:
        ct.Proof.from_dict(data)
    assert re.search(what, str(refused.value))
    assert ct.Proof.from_dict(gemma_data).to_dict() == gemma_data


@pytest.mark.parametrize("case", ILL_FORMED)
def test_ill_formed_data_is_refused_with_its_path(gemma_data, case):
    change, path, what = ILL_FORMED[case]
    data = copy.deepcopy(gemma_data)
    change(data)
    with pytest.raises(ct.BadInput, match=f"^[a-z0-9_.\\[\\]]*{path}") as refused:
        ct.Proof.from_dict(data)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("data", [None, [], "proof", 3, (), {"tree": {}}])
def test_what_is_no_proof_at_all(data):
    with pytest.raises(ct.BadInput):
        ct.Proof.from_dict(data)


def test_data_that_is_nested_too_deeply(gemma_data):
    data = copy.deepcopy(gemma_data)
    for _ in range(2000):
        data["block"] = {"class": "Fixed", "fields": {"inner": data["block"]}}
    with pytest.raises(ct.BadInput, match="nested too deeply"):
        ct.Proof.from_dict(data)


CHANGES = {  # of any node
    "conditions": lambda n: n["conditions"].pop(),
    "moved less": lambda n: n["moved"].pop(),
    "moved more": lambda n: n["moved"].append("~"),
    "premise dropped": lambda n: n["premises"].pop(),
    "premises swapped": lambda n: n["premises"].reverse() if len(n["premises"]) > 1 else n["premises"].pop(),
    "cost": lambda n: n.update(cost=n["cost"] + 1),
    "note": lambda n: n.update(note=n["note"] + " "),
}


OTHERS = ("gpt2", "mixtral", "llama4_text", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize(
    "name", ["gemma3", "gpt_neox", "qwen2_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_a_change_of_any_node_is_refused_there(name):
    whole = through_text(ct.prove(architectures.block(name))) | {"alternatives": []}
    assert ct.Proof.from_dict(whole).to_dict() == whole
    refused = 0
    for i in range(sum(1 for _ in walk(whole["tree"]))):
        for change in CHANGES.values():
            data = copy.deepcopy(whole)
            node = [*walk(data["tree"])][i]
            try:
                change(node)
            except IndexError:  # nothing there to change
                continue
            with pytest.raises(ct.NotVerified) as wrong:
                ct.Proof.from_dict(data)
            where = str(wrong.value).partition(" (")[0]
            assert located(data, where) is node
            refused += 1
    assert refused >= 20


def located(data: Any, where: str) -> Any:
    """What stands at a JSON path."""
    for key, index in re.findall(r"([a-z]+)|\[(\d+)\]", where):
        data = data[key or int(index)]
    return data


# --- changes at random ------------------------------------------------------------------------------------------------

JUNK = (
    None,
    True,
    0,
    1,
    -1,
    7,
    0.5,
    "",
    "x",
    [],
    {},
    [0],
    "gate",
    "input",
    "output",
    "O-bias",
    "O-sum",
    {"class": "Identity", "fields": {}},
)


def spots(data: Any) -> Any:
    """Every (container, key) of JSON data."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield data, key
        if isinstance(value, dict | list):
            yield from spots(value)


def mutated(data: Any, rng: random.Random) -> Any:
    data = copy.deepcopy(data)
    part = rng.choice(("tree", "tree", "block", "alternatives", None))
    found = [*spots(data if part is None else {part: data[part]})][1 if part else 0 :] or [(data, "via")]
    (into, key), (other, source) = rng.choice(found), rng.choice(found)
    kind = rng.choice(("junk", "delete", "copy", "swap"))
    if kind == "junk":
        into[key] = rng.choice(JUNK)
    elif kind == "delete":
        del into[key]
    elif kind == "copy":
        into[key] = copy.deepcopy(other[source])
    else:
        into[key], other[source] = copy.deepcopy(other[source]), copy.deepcopy(into[key])
    return data


NO_NUMBERS = "shape of .* is not known|number for size|negative dimensions|out of bounds for array"


CHANGED = ("gemma3",), pytest.param(("gemma3", "mixtral", "gpt_neox"), marks=pytest.mark.slow)


@pytest.mark.parametrize("names", CHANGED, ids=len)
def test_random_changes_are_refused_or_make_another_true_proof(names):
    """Whatever is accepted is in the written form, and the patch of the changed block is right."""
    outcomes = Counter()
    for name in names:
        whole = through_text(ct.prove(architectures.block(name)))
        whole["alternatives"] = whole["alternatives"][:1]
        for seed in range(400):
            data = mutated(whole, random.Random(f"{name} {seed}"))
            try:
                again = ct.Proof.from_dict(data)
            except (ct.BadInput, ct.NotVerified) as refused:
                outcomes[type(refused).__name__] += 1
                assert "\n" not in str(refused)
                continue
            assert again.to_dict() == data | {"level": "derived"}
            outcomes["the same" if data == whole else "another"] += 1
            try:
                params, v, v_target = ct.sample(again.block)
                wanted = again.block(params, v_target)
            except ValueError as wrong:  # BadInput is one: sizes without a number, or a vector for a matrix
                assert re.search(NO_NUMBERS, str(wrong))
                outcomes["no numbers"] += 1
                continue
            try:
                patch = again.construct(params, v, v_target)
            except ct.SideConditionFailed:
                outcomes["condition"] += 1
                continue
            assert error(again.block(patch.applied_to(params), v), wanted) < 1e-9
            outcomes["patched"] += data != whole
    print(dict(outcomes))
    assert outcomes["BadInput"] > 200 / 3 * len(names)
    assert outcomes["NotVerified"] > 100 / 3 * len(names)
    assert outcomes["another"] >= 5 / 3 * len(names)
    assert outcomes["patched"] >= 5 / 3 * len(names), "other proofs than the one that was changed"


# --- the schema -------------------------------------------------------------------------------------------------------


def test_the_schema_is_the_one_of_these_classes_and_rules():
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    assert schema == written_schema(), "a class or a rule changed: run python tests/proof_schema.py"
    assert set(schema["properties"]) == {*PROOF, *MANY, *BESIDE}
    assert set(schema["$defs"]["node"]["properties"]) == {*NODE}


SEEN_BY_CODE_ONLY = {  # what is no matter of structure
    "no such frozen parameter", "no such side of a rule", "a path to nowhere", "a slice that is too long", "a slice of no sequence",
    "a foreign class", "no such activation", "a number that is none", "code for a constant", "a power without end",
    "a fraction that can be reduced", "a fraction over nothing", "a sequence in a sequence",
}  # fmt: skip


@pytest.mark.parametrize("case", ILL_FORMED)
def test_the_schema_refuses_a_changed_structure(gemma_data, case):
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    data = copy.deepcopy(gemma_data)
    assert validator.is_valid(data)
    ILL_FORMED[case][0](data)
    assert validator.is_valid(data) is (case in SEEN_BY_CODE_ONLY)
