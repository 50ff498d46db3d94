"""The curve of a growing context: norms and cosines of the increments, and the gradient beside them by finite differences."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from family_models import build
from helpers import exactly, snapshot, unchanged

import controllability as ct
from controllability.errors import BadInput

FACTS = ["Mia lives in Oslo .", "Leo lives in Rome .", "Ana has a cat ."]
CONTEXT, QUERY = " ".join(FACTS), "Where does Leo live ?"
TOKENIZER = ct.load_model("embedded")[1]


@pytest.fixture(scope="module")
def made():
    model = ct.load_model("embedded", dtype="float64")[0]
    before = snapshot(model)
    with exactly(torch.float64):
        found = {
            order: ct.dynamics(model, TOKENIZER, CONTEXT, QUERY, "sentence", order) for order in ("forward", "backward")
        }
    assert unchanged(model, before) and not any(p.grad is not None for p in model.parameters())
    return model, found


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_norms_and_cosines_are_those_of_the_matrices(made, order):
    found = made[1][order]
    seen = found.attribution
    for row, layer in enumerate(found.layers):
        names = [name for name in seen.parameters if f"layers.{layer}." in name and "norm" not in name]
        steps = [torch.cat([seen.increment(i, name).matrix.flatten() for name in names]) for i in range(3)]
        for i, step in enumerate(steps):
            assert float(found.norms[row, i]) == pytest.approx(float(step.norm()), rel=1e-6)
        for i, (a, b) in enumerate(itertools.pairwise(steps)):
            assert float(found.cosines[row, i]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)


def loss(model, fact):
    ids = torch.tensor([TOKENIZER(fact)["input_ids"]])
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:]))


@pytest.mark.parametrize("layer", [0, 2])
def test_the_gradient_is_that_of_fine_tuning_on_the_chunk(made, layer):
    """The loss along an increment falls as the cosine to −∇L says: central differences on a copy."""
    model, found = made[0], made[1]["forward"]
    seen = found.attribution
    for i, fact in enumerate(FACTS):
        moved, epsilon = [], 1e-4
        for sign in (1, -1):
            other = copy.deepcopy(model)
            with torch.no_grad():
                for name in seen.matrices(layer):
                    other.get_parameter(name).add_(seen.increment(i, name).matrix, alpha=sign * epsilon)
            with exactly(torch.float64):
                moved.append(loss(other, fact))
        slope = (moved[0] - moved[1]) / (2 * epsilon)
        row = found.layers.index(layer)
        cosine, step, norm = (float(held[row, i]) for held in (found.gradient_cosines, found.steps, found.norms))
        size = cosine * norm / step  # ‖∇L‖
        assert slope == pytest.approx(-step * size**2, rel=2e-3, abs=1e-6)


def test_the_loss_is_the_patched_models(made):
    model, found = made[0], made[1]["forward"]
    whole = TOKENIZER(f"{CONTEXT} {QUERY}", return_tensors="pt")["input_ids"]
    answer = TOKENIZER("Rome", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        assert float(found.loss[-1]) == pytest.approx(
            -float(model(whole).logits[0, -1].log_softmax(-1)[answer]), abs=1e-5
        )
    backward = made[1]["backward"].loss
    assert float(backward[0]) == pytest.approx(float(found.loss[-1]), abs=1e-5) and float(
        backward[-1]
    ) == pytest.approx(float(found.loss[0]), abs=1e-5)


def test_words_tables_and_no_gradients(made):
    model, found = made
    records = found["forward"].records()
    assert (
        len(records) == 9
        and records[0]["cosine_to_last"] is None
        and "loss 12.18 at the start" in str(found["forward"])
    )
    bare = ct.dynamics(model, TOKENIZER, CONTEXT, QUERY, "sentence", gradients=False)
    assert bare.gradient_cosines is None and "step" not in bare.records()[0] and len(bare.panels()) == 3
    assert len(found["forward"].panels()) == 4
    with pytest.raises(BadInput, match="choose forward or backward"):
        ct.dynamics(model, TOKENIZER, CONTEXT, QUERY, order="all")


def test_a_forward_without_a_gradient_is_named():
    """RWKV writes its states in place."""
    model = build("rwkv")
    with exactly(torch.float64):
        with pytest.raises(BadInput, match=r"has no gradient .* gradients=False"):
            ct.dynamics(model, TOKENIZER, CONTEXT, QUERY, "sentence")
        assert ct.dynamics(model, TOKENIZER, CONTEXT, QUERY, "sentence", gradients=False).norms.shape[1] == 3
