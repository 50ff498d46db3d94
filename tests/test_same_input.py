"""One notion of the same input, for patches that are valid for theirs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import error, runs, tiny_gemma
from small_models import gpt2, llama, logits

import controllability as ct


def ones(source: dict[str, Any]) -> dict[str, Any]:
    return source | {"attention_mask": torch.ones_like(source["input_ids"])}


OTHER = {
    "positions forgotten": (lambda m, s: {"input_ids": s["input_ids"]}, "position_ids 9, the model got 0"),
    "positions shifted": (lambda m, s: s | {"position_ids": s["position_ids"] + 1}, "position_ids 9, the model got 10"),
    "a mask": (lambda m, s: s | {"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask None, the model got "),
    "tokens": (lambda m, s: s | {"input_ids": (s["input_ids"] + 1) % 60}, "made for: at sample 0, position 0 it is token"),
    "embeddings": (
        lambda m, s: {"inputs_embeds": torch.randn(1, 3, 32), "position_ids": s["position_ids"]},
        r"input_ids \(1, 3\), the model got None",
    ),
    "a past": (
        lambda m, s: s | {"past_key_values": m(**s | {"attention_mask": None}).past_key_values}, "past_key_values None, the model got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("make", [tiny_gemma, llama, gpt2])
def test_each_refuses_any_other_input(make, change, tmp_path):
    model, (target, source) = make(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    mp.save(tmp_path / "patch")
    alter, words = OTHER[change]
    with torch.no_grad():
        other = alter(model, source)
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        with patch.applied(model), pytest.raises(ct.PatchError, match=words):
            logits(model, other)


def test_each_accepts_what_means_the_same():
    model, (target, source) = gpt2(), runs(context=9, query=3, batch=2)
    mp = ct.patch_model(model, target, source)
    one = source | {"position_ids": source["position_ids"][:1]}
    for same in (
        source,
        ones(source),
        one,
        source | {"output_hidden_states": True, "return_dict": True, "labels": source["input_ids"]},
    ):
        with mp.applied(model):
            assert error(logits(model, same), mp.target_logits) < 2e-5
    counted = ct.patch_model(model, target, {"input_ids": source["input_ids"]})
    with counted.applied(model):
        assert error(logits(model, one | {"position_ids": torch.arange(3)[None]}), counted.target_logits) < 2e-5
        assert error(model(source["input_ids"]).logits, counted.target_logits) < 2e-5, "by position"


def test_each_of_embeddings_and_of_padded_rows():
    model, (target, source) = llama(), runs(context=9, query=3)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(source["input_ids"]),
        "position_ids": source["position_ids"],
    }
    mp = ct.patch_model(model, target, embedded)
    with mp.applied(model):
        assert error(logits(model, embedded), mp.target_logits) < 2e-5
        other = embedded["inputs_embeds"].detach().clone()
        other[0, 1, 3] += 1
        with pytest.raises(ct.PatchError, match="at sample 0, position 1 it is inputs_embeds"):
            logits(model, embedded | {"inputs_embeds": other})
    mask = torch.tensor([[0, 1, 1]])
    mp = ct.patch_model(model, target, source | {"attention_mask": mask})
    with mp.applied(model):
        logits(model, source | {"attention_mask": mask.bool()})
        with pytest.raises(ct.PatchError, match=r"attention_mask .* the model got None"):
            logits(model, source)
