"""The run that is solved is the run that is used: the same positions, the same cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import error, runs, tiny_gemma
from small_models import gpt2, llama, logits, logits_without
from torch import Tensor, nn

import controllability as ct


def first_kept(target: dict[str, Any], query: int = 3) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """(source, positions): the first token of the target at 0, and its last ones where they were."""
    ids = target["input_ids"]
    at = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(ids.shape[1])[-query:]])
    return {"input_ids": ids[:, at], "position_ids": at[None]}, (torch.arange(len(at)), at)


@pytest.mark.parametrize("make", [tiny_gemma, llama, gpt2])
@pytest.mark.parametrize("scope", ["each", "last", "all"])
def test_a_gap_in_the_positions_is_solved_as_the_model_runs_it(make, scope):
    model, (target, _) = make(), runs(context=9, query=3)
    source, positions = first_kept(target)
    mp = ct.patch_model(model, target, source, scope=scope, positions=positions)
    row = slice(-1, None) if scope == "last" else slice(None)
    wanted = logits(model, target)[:, positions[1]][:, row]
    with mp.applied(model):
        assert error(logits(model, source)[:, row], wanted) < 2e-5
    assert error(logits(model, source)[:, row], wanted) > 0.1


def test_without_a_cache_such_a_row_is_packed_and_that_is_what_is_solved_when_asked_for():
    model, (target, _) = llama(), runs(context=9, query=3)
    source, positions = first_kept(target)
    packed = source | {"use_cache": False}
    assert error(logits(model, packed), logits(model, source)) > 0.1
    mp = ct.patch_model(model, target, packed, positions=positions)
    wanted = logits(model, target)[:, positions[1]]
    with mp.applied(model):
        assert error(logits(model, packed), wanted) < 2e-5
        with pytest.raises(ct.PatchError, match="it is use_cache False, the model got True"):
            logits(model, source)


@pytest.mark.parametrize("scope", ["last", "all"])
@pytest.mark.parametrize("order", ["gap", "backwards"])
def test_one_set_of_weights_is_not_used_on_its_own_input_run_otherwise(scope, order):
    model, (target, source) = llama(), runs(context=9, query=3)
    positions = None
    if order == "gap":
        source, positions = first_kept(target)
    else:
        source = source | {"position_ids": source["position_ids"].flip(-1)}
    mp = ct.patch_model(model, target, source, scope=scope, positions=positions)
    with mp.applied(model):
        assert error(logits(model, source)[:, -1], mp.target_logits[:, -1]) < 2e-5
        with pytest.raises(ct.PatchError, match="it is use_cache True, the model got False"):
            logits(model, source | {"use_cache": False})
        masked = source | {"attention_mask": torch.ones_like(source["input_ids"]), "use_cache": False}
        assert error(logits(model, masked)[:, -1], mp.target_logits[:, -1]) < 2e-5, (
            "a mask says that it is one sequence"
        )
        logits(model, {"input_ids": source["input_ids"] + 1, "use_cache": False})  # another input is nobody's business


@pytest.mark.parametrize("asked", [None, True, False])
def test_elsewhere_a_cache_is_no_matter(asked):
    model, (target, source) = llama(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source | {"use_cache": asked})
    with mp.applied(model):
        for used in (None, True, False):
            assert error(logits(model, source | {"use_cache": used}), mp.target_logits) < 2e-5


@pytest.mark.parametrize("same_object", [True, False])
def test_a_layer_that_stands_twice_finds_its_own_entries_in_the_cache(same_object):
    model, (target, source) = llama(), runs(context=9, query=3)
    layers = model.model.layers
    twin = layers[1] if same_object else copy.deepcopy(layers[1])
    model.model.layers = nn.ModuleList([layers[0], layers[1], twin]).eval()
    model.config.num_hidden_layers = 3
    assert error(logits(model, source | {"use_cache": False}), logits(model, source)) > 0.01, "both have layer_idx 1"
    mp, wanted = ct.patch_model(model, target, source), logits(model, target)[:, -3:]
    with mp.applied(model):
        assert error(logits(model, source), wanted) < 2e-5
        with pytest.raises(ct.PatchError, match="it is use_cache True, the model got False"):
            logits(model, source | {"use_cache": False})


def test_a_corrected_merge_runs_each_layer_twice_on_one_cache():
    model, (target, _) = llama(), runs(context=9, query=3)
    source, positions = first_kept(target)
    mp = ct.patch_model(model, target, source, "last", positions=positions)
    mp.merge(model, corrected=True)
    assert error(logits(model, source)[:, -1], logits_without(mp, model, target)) < 2e-5
