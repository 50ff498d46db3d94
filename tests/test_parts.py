"""A patch in parts: what is selected is applied, one ΔW as a matrix, the table, and what layers do alone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import error, exactly, runs, snapshot as taken, tiny_gemma, unchanged
from small_models import llama
from transformers import MixtralConfig, MixtralForCausalLM

import controllability as ct
from controllability.errors import BadInput, PatchError
from controllability.models.patches.parts import Parts


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made():
    model, (target, source) = tiny_gemma(layers=3, dtype=torch.float64), runs(9, 4)
    with exactly(torch.float64):
        return model, target, source, ct.patch_model(model, target, source)


@torch.no_grad()
def logits(model, source):
    return model(**source).logits


def test_selecting_everything_is_the_patch_and_nothing_of_a_layer_is_the_plain_model(made):
    model, _, source, mp = made
    with exactly(torch.float64), mp.select(layers=range(3), parameters="*", tokens=range(4)).applied(model):
        assert error(logits(model, source), mp.logits) < 1e-12
    only = mp.select(layers=-1, tokens=-1)
    assert {entry.layer for entry in only.entries} == {2} and only.rows.position.tolist() == [3]
    with exactly(torch.float64):
        plain = logits(model, source)
        with only.applied(model):
            found = logits(model, source)
    assert torch.equal(found[:, :-1], plain[:, :-1]) and error(found[:, -1], plain[:, -1]) > 1e-3


def test_a_selection_is_what_the_weights_say(made):
    """Written by hand into the weights of a copy: an oracle that shares no code with the hooks."""
    model, target, source, _ = made
    before, ids = (
        taken(model),
        {"input_ids": source["input_ids"][:, -1:], "position_ids": source["position_ids"][:, -1:]},
    )
    with exactly(torch.float64):
        part = ct.patch_model(model, target, ids, scope="last").select(parameters=DOWN)
        with part.applied(model):
            found = logits(model, ids)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(DOWN).add_(part.delta(DOWN).matrix)
        assert error(found, logits(other, ids)) < 1e-12 < 1e-6 < error(found, logits(model, ids))
    assert unchanged(model, before)


def test_one_change_is_a_matrix_with_its_norm_and_singular_values(made):
    model, _, _, mp = made
    for name in dict.fromkeys(str(entry.param) for entry in mp.entries):
        one = mp.delta(name, token=1)
        assert one.matrix.shape == model.get_parameter(name).shape
        assert one.norm == pytest.approx(float(one.matrix.norm()), rel=1e-12)
        if one.factors is not None:
            left, right = one.factors
            assert error(left.mT @ right, one.matrix) < 1e-14
            wanted = torch.linalg.svdvals(one.matrix)
            assert torch.allclose(one.singular_values, wanted[: len(one.singular_values)], atol=1e-12)
            assert bool((wanted[len(one.singular_values) :] < 1e-12).all())


def test_changes_of_experts_too():
    model, (target, source) = mixtral(), runs(6, 3)
    mp = ct.patch_model(model, target, source)
    name = next(e.param.name for e in mp.entries if hasattr(e.delta, "experts"))
    one = mp.delta(name, token=-1)
    assert one.matrix.shape == model.get_parameter(name).shape
    wanted = torch.linalg.svdvals(one.matrix).flatten().sort(descending=True).values
    assert torch.allclose(one.singular_values, wanted[: len(one.singular_values)], atol=1e-5)
    assert one.norm == pytest.approx(float(one.matrix.norm()), rel=1e-5)


def test_inner_products_are_those_of_the_matrices():
    for model in (tiny_gemma(), llama(), mixtral()):
        mp = ct.patch_model(model, *runs(6, 3))
        for entry in mp.entries:
            dense = entry.delta.dense().flatten(1)
            assert error(entry.delta.products(entry.delta), dense @ dense.mT) < 1e-5, str(entry.param)


def test_the_table_says_what_the_matrices_are(made):
    model, _, _, mp = made
    rows = mp.frame() if isinstance(mp.frame(), list) else mp.frame().to_dict("records")
    assert len(rows) == len(mp.entries) * 4
    for row in rows:
        matrices = torch.stack([mp.delta(row["parameter"], token=t).matrix for t in range(4)]).flatten(1)
        mine = matrices[row["token"]]
        assert row["norm"] == pytest.approx(float(mine.norm()), rel=1e-12)
        mean = matrices.mean(0)
        assert row["cosine_to_mean"] == pytest.approx(float(mine @ mean / mine.norm() / mean.norm()), rel=1e-9)
        if mine.numel() > 100:
            assert row["relative_norm"] == pytest.approx(
                float(mine.norm() / model.get_parameter(row["parameter"]).detach().norm()), rel=1e-6
            )
    table = {(layer.index): layer for layer in mp.report.layers}
    margins = [m["margin"] for m in table[0].margins if m["margin"] is not None]
    assert min(row["margin"] for row in rows if row["layer"] == 0) == pytest.approx(min(margins))


def test_ablation_ends_in_both_models(made):
    model, _, source, mp = made
    with exactly(torch.float64):
        found = mp.ablation(model)
    rows = {(row["kind"], row["layer"]): row for row in found.rows}
    assert len(rows) == 12
    for whole in (rows["from below", 2], rows["from above", 0]):
        assert whole["error"] < 1e-12 and whole["error_plain"] > 1e-3 and whole["top1"] == 1
    assert rows["alone", 0]["error"] == rows["from below", 0]["error"]
    assert rows["left out", 0]["error"] == rows["from above", 1]["error"]
    assert found.without["error_plain"] == 0 and found.without["error"] > 1e-3
    with exactly(torch.float64), mp.select(layers=[0, 2]).applied(model):
        by_hand = logits(model, source)
    assert rows["left out", 1]["error"] == pytest.approx(error(by_hand, mp.target_logits), rel=1e-9)


def test_a_part_is_saved_read_and_never_corrected_towards_the_whole_target(made, tmp_path):
    model, _, source, mp = made
    part = mp.select(layers=[1], tokens=[0, 2])
    part.save(tmp_path / "part", model)
    again = ct.load_patch(tmp_path / "part")
    assert again.frame() is not None and again.rows.position.tolist() == [0, 2]
    with exactly(torch.float64):
        with part.applied(model):
            wanted = logits(model, source)
        with again.applied(model):
            assert torch.equal(logits(model, source), wanted)
    last = ct.patch_model(tiny := tiny_gemma(), *runs(9, 4), scope="last").select(layers=[0])
    with pytest.raises(PatchError, match="no target to be corrected for"):
        last.merge(tiny, corrected=True)
    with pytest.raises(BadInput, match="no target to be held against"):
        last.ablation(tiny)


@pytest.mark.parametrize(("asked", "words"), [
    ({"layers": 7}, "layers: this patch has no 7; it has 0, 1, 2"),
    ({"layers": [True]}, "whole numbers"),
    ({"layers": 1.0}, "whole numbers"),
    ({"layers": []}, "has no none"),
    ({"layers": "1"}, "whole numbers"),
    ({"tokens": 4}, "tokens: this patch has no 4"),
    ({"tokens": -5}, "has no -1"),
    ({"parameters": "lm_head.weight"}, "changes no parameter 'lm_head.weight'"),
    ({"parameters": [3]}, "give names"),
])  # fmt: skip
def test_what_is_not_there_cannot_be_selected(made, asked, words):
    with pytest.raises(BadInput, match=words):
        made[3].select(**asked)


def test_a_patch_for_all_tokens_has_none_for_one(tmp_path):
    model, (target, source) = tiny_gemma(), runs(6, 3)
    mp = ct.patch_model(model, target, source, scope="all")
    mp.save(tmp_path / "all", model)
    saved = ct.load_patch(tmp_path / "all")
    for asked in (lambda: saved.delta(DOWN, token=-1), lambda: saved.select(tokens=-1)):
        with pytest.raises(BadInput, match="scope 'all' is one set of weights"):
            asked()
    assert saved.delta(DOWN).norm == pytest.approx(float(mp.delta(DOWN).matrix.norm()), rel=1e-5)


def test_the_table_of_a_batch_is_that_of_its_samples():
    """The mean that a row is held against is that of its own sample, whatever else was solved with it."""
    model, (target, source) = tiny_gemma(layers=2, dtype=torch.float64), runs(9, 4, batch=3)
    with exactly(torch.float64):
        rows = Parts(ct.patch_model(model, target, source, route="secular")).records()
        for sample in range(3):
            one = [{name: held[sample : sample + 1] for name, held in given.items()} for given in (target, source)]
            alone = Parts(ct.patch_model(model, *one, route="secular")).records()
            for row, wanted in zip([row for row in rows if row["sample"] == sample], alone, strict=True):
                for name in ("norm", "relative_norm", "cosine_to_mean", "margin"):
                    assert row[name] == pytest.approx(wanted[name], rel=1e-8, abs=1e-12), name
                assert (row["rank"], row["route"], row["token"]) == (wanted["rank"], wanted["route"], wanted["token"])
