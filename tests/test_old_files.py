"""Files that an earlier version wrote still load: a saved patch (format 4) and proofs, followed node by node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import architectures
import controllability as ct
from controllability.models.loading import embedded_directory, encode, load_model

WRITTEN = Path(__file__).parent / "data" / "format-4"


def test_a_patch_that_was_saved_before_the_house_was_rebuilt_gives_the_context_back():
    model, tokenizer = load_model(str(embedded_directory()))
    target, source = encode(tokenizer, "Mia lives in Oslo . Leo lives in Rome .", "Where does Leo live ?")
    patch = ct.load_patch(WRITTEN / "patch")
    with torch.no_grad():
        wanted, plain = model(**target).logits[0, -1], model(**source).logits[0, -1]
        with patch.applied(model):
            found = model(**source).logits[0, -1]
    assert (found - wanted).abs().max() < 1e-4 < 1 < (plain - wanted).abs().max()
    assert tokenizer.decode(found.argmax()) == "Rome"


@pytest.mark.parametrize(("name", "jointly"), [("gemma3", False), ("gemma3-jointly", True)])
def test_a_proof_that_was_written_before_is_followed_and_is_the_one_of_today(name, jointly):
    data = json.loads((WRITTEN / f"{name}.json").read_text())
    proof = ct.Proof.from_dict(data)
    assert proof.to_dict() == data
    today = ct.prove(architectures.block("gemma3"), jointly=jointly)
    assert [step.rule.name for step in proof.root.walk()] == [step.rule.name for step in today.root.walk()]
    data["tree"]["rule"] = "O-linear"
    with pytest.raises((ct.BadInput, ct.NotVerified)):
        ct.Proof.from_dict(data)
