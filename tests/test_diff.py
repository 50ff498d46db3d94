"""ct.diff of two patches against dense matrices; a patch and itself differ by exactly nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from family_models import build, inputs
from helpers import runs, tiny_gemma

import controllability as ct
from controllability.deltas import ExpertLowRank, LowRank, Shift
from controllability.interfaces import Param
from controllability.models.patches.applier import Entry
from controllability.models.patches.diff import _compare


@pytest.fixture(scope="module")
def model():
    return tiny_gemma(dtype=torch.float64)


def patch(model, seed, scope="each", context=9, query=4, **options):
    target, source = runs(context, query, seed=seed)
    return ct.patch_model(model, target, source, scope=scope, **options)


def dense(entry, row):
    return entry.delta.row(row).dense().double()


@pytest.mark.parametrize("scope", ["each", "last"])
def test_norms_difference_and_cosine_are_those_of_the_dense_matrices(model, scope):
    a, b = patch(model, 0, scope), patch(model, 1, scope)
    found = ct.diff(a, b)
    assert (found.compared, found.only_a, found.only_b, found.identical) == ("each", [], [], False)
    assert len(found.parameters) == len(a.entries)
    for p, x, y in zip(found.parameters, a.entries, b.entries, strict=True):
        assert (p.parameter, p.layer) == (str(x.param), x.layer)
        assert len(p.difference) == (4 if scope == "each" else 1)
        for row in range(len(p.difference)):
            u, v = dense(x, row), dense(y, row)
            assert p.norm_a[row] == pytest.approx(float(u.norm()), rel=1e-12)
            assert p.norm_b[row] == pytest.approx(float(v.norm()), rel=1e-12)
            assert p.difference[row] == pytest.approx(float((u - v).norm()), rel=1e-12)
            assert p.cosine[row] == pytest.approx(float((u * v).sum() / u.norm() / v.norm()), abs=1e-12)
    assert found.largest.relative == max(p.relative for p in found.parameters) > 0.1


def test_a_patch_and_itself_differ_by_exactly_nothing(model, tmp_path):
    a = patch(model, 0)
    a.save(tmp_path / "patch")
    for other in (a, patch(model, 0), ct.load_patch(tmp_path / "patch")):
        found = ct.diff(a, other)
        assert found.identical
        assert {d for p in found.parameters for d in p.difference} == {0.0}
        assert [c for p in found.parameters for c in p.cosine] == pytest.approx([1.0] * (4 * len(a.entries)))
        assert str(found).endswith("identical")


def test_mixtures_whose_tokens_chose_other_experts():
    model = build("mixtral", torch.float64)
    a, b = (
        ct.patch_model(model, *({k: v[:1] for k, v in side.items()} for side in inputs("mixtral", model, seed=seed)))
        for seed in (3, 4)
    )
    assert ct.diff(a, a).identical
    chosen = [
        {tuple(r.tolist()) for e in p.entries if isinstance(e.delta, ExpertLowRank) for r in e.delta.index}
        for p in (a, b)
    ]
    assert chosen[0] != chosen[1]
    for p, x, y in zip(ct.diff(a, b).parameters, a.entries, b.entries, strict=True):
        for row, distance in enumerate(p.difference):
            u, v = dense(x, row), dense(y, row)
            assert distance == pytest.approx(float((u - v).norm()), rel=1e-10)
            assert p.cosine[row] == pytest.approx(float((u * v).sum() / u.norm() / v.norm()), abs=1e-10)


def test_small_differences_keep_their_digits():
    """Squares of the factors would lose half of them: 1e-12 of 1 is lost in 1 − 1 of float64 squares."""
    torch.manual_seed(0)
    left, right, step = (torch.randn(3, 2, n, dtype=torch.float64) for n in (7, 5, 7))
    one, two = LowRank(left, right), LowRank(left + 1e-12 * step, right)
    a, b = Entry(Param("w"), one), Entry(Param("w"), two)
    found = _compare(a, b, "each").difference
    wanted = ((two.left - left).transpose(-1, -2) @ right).flatten(1).norm(dim=1).tolist()
    assert found == pytest.approx(wanted, rel=1e-9)
    gram = LowRank(torch.cat([left, -two.left], 1), torch.cat([right, right], 1)).norms()
    assert gram.tolist() != pytest.approx(wanted, rel=1e-2)


def test_other_ranks_of_the_same_matrix():
    left, right = torch.randn(1, 1, 7), torch.randn(1, 1, 5)
    split = LowRank(torch.cat([left / 2, left / 2], 1), torch.cat([right, right], 1))
    same = _compare(Entry(Param("w"), LowRank(left, right)), Entry(Param("w"), split), "each")
    assert same.difference[0] < 1e-14 * same.norm_a[0]
    assert same.cosine[0] == pytest.approx(1.0)


def test_nothing_has_no_direction():
    zero, one = Shift(torch.zeros(2, 3)), Shift(torch.ones(2, 3))
    found = _compare(Entry(Param("b"), zero), Entry(Param("b"), one), "each")
    assert found.cosine == [None, None]
    assert found.difference == pytest.approx([3**0.5] * 2)
    assert found.relative == 1.0


def test_one_set_of_weights_is_compared_with_each_token(model):
    each, last = patch(model, 0), patch(model, 0, "last")
    found = ct.diff(each, last)
    assert found.compared == "one"
    first, entry = found.parameters[0], last.entries[0]
    wanted = [float((dense(each.entries[0], row) - dense(entry, 0)).norm()) for row in range(4)]
    assert first.difference == pytest.approx(wanted, rel=1e-12)
    assert found.about.startswith("patches held: 4 (each) and 1 (last); the single one is compared with each")


def test_other_positions_are_described_only(model):
    found = ct.diff(patch(model, 0), patch(model, 0, query=3))
    assert found.compared == "norms"
    assert not found.identical
    assert found.largest is None
    assert all(p.norm_a and not p.difference and not p.cosine for p in found.parameters)
    assert "for other positions: only the largest norms" in str(found)


def test_parameters_that_only_one_patch_moves(model):
    both, outputs = patch(model, 0), patch(model, 0, via="output")
    found = ct.diff(both, outputs)
    assert found.only_b == []
    assert {name.split(".")[-2] for name in found.only_a} == {"gate_proj", "up_proj"}
    assert not found.identical
    assert "only in A: model.layers.0.mlp.gate_proj.weight" in str(found)


def test_table_and_json(model):
    found = ct.diff(patch(model, 0), patch(model, 1))
    lines = str(found).splitlines()
    assert lines[0] == "scope 'each' and 'each', 4 patches each; the worst of them"
    assert lines[1].split() == ["parameter", "‖ΔA‖", "‖ΔB‖", "‖ΔA", "−", "ΔB‖", "cosine"]
    assert len({len(line) for line in lines[1 : 2 + len(found.parameters)]}) == 1
    assert lines[-1].startswith("differs most: model.layers.")
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["largest"] == found.largest.parameter
    assert data["identical"] is False
    assert data["parameters"][0]["difference"] == found.parameters[0].difference


# -------------------------------------------------------------------------------------- refused


def test_patches_of_other_weights_are_refused(model, tmp_path):
    a = patch(model, 0)
    other = tiny_gemma(dtype=torch.float64, seed=5)
    with pytest.raises(ct.PatchError, match="made for different weights"):
        ct.diff(a, patch(other, 0))
    a.save(tmp_path / "patch")
    with pytest.raises(ct.PatchError, match="made for different weights"):
        ct.diff(ct.load_patch(tmp_path / "patch"), patch(other, 0))


def test_a_model_that_changed_in_between_is_refused():
    model = tiny_gemma()
    a = patch(model, 0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ct.PatchError, match="changed"):
        ct.diff(a, patch(model, 0))


def test_patches_on_top_of_others_are_refused(model):
    first = patch(model, 0, "last")
    with first.applied(model):
        second = patch(model, 1, "last")
    with pytest.raises(ct.PatchError, match="on top of different others"):
        ct.diff(first, second)


def test_what_is_no_patch_is_refused(model):
    with pytest.raises(ct.BadInput, match=r"diff compares two patches of a model .* got str"):
        ct.diff(patch(model, 0), "monday")


def test_one_factor_changed_by_one_bit_is_no_longer_identical(model):
    a = patch(model, 0)
    first = a.entries[0]
    left = first.delta.left.clone()
    left[0, 0, 0] = torch.nextafter(left[0, 0, 0], torch.tensor(torch.inf, dtype=left.dtype))
    changed = dataclasses.replace(first, delta=dataclasses.replace(first.delta, left=left))
    assert not ct.diff(a, dataclasses.replace(a, entries=(changed, *a.entries[1:]))).identical
