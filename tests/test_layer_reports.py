"""The report of every layer: one number a token, computed when it is read, ready for tables and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_models import build, inputs
from helpers import runs, tiny_gemma

import controllability as ct
from controllability.deltas import LowRank, Shift
from controllability.models.sweep.report import COLUMNS, EXPLAINED


def test_every_token_has_its_own_numbers_in_the_order_of_the_pairs():
    model = tiny_gemma(layers=2)
    target, source = runs(context=9, query=3, batch=2)
    mp = ct.patch_model(model, target, source)
    assert mp.report.pairs == [[b, t] for b in range(2) for t in range(3)]
    for layer in mp.report.layers:
        seen = layer.tokens
        columns = [seen.residual, seen.route, seen.amplification, *seen.margins]
        columns += [*seen.condition.values(), *seen.changes.values()]
        assert {len(column) for column in columns} == {6}
        assert layer.amplification == max(seen.amplification)
        assert layer.relative_changes == {name: max(values) for name, values in seen.changes.items()}
        assert [m["margin"] for m in layer.margins] == [
            min((v for v in values if v is not None), default=None) for values in seen.margins
        ]
        assert len(set(seen.amplification)) == 6
    for sample in range(2):  # alone, a sample has the numbers that it has in the batch
        alone = ct.patch_model(
            model, *({k: v[sample : sample + 1] for k, v in side.items()} for side in (target, source))
        )
        for one, both in zip(alone.report.layers, mp.report.layers, strict=True):
            mine = slice(3 * sample, 3 * sample + 3)
            assert one.tokens.amplification == pytest.approx(both.tokens.amplification[mine], rel=1e-3)
            for name, values in one.tokens.changes.items():
                assert values == pytest.approx(both.tokens.changes[name][mine], rel=1e-3)


@pytest.mark.parametrize(("asked", "taken"), [("auto", "balanced"), ("uniform", "uniform"), ("secular", "secular")])
def test_each_token_names_the_route_it_took(asked, taken):
    """uniform multiplies every scale by one number; the others do not."""
    model = tiny_gemma(layers=2, seed=2)
    mp = ct.patch_model(model, *runs(context=9, query=6, seed=2), route=asked)
    for layer in mp.report.layers:
        delta = next(e.delta for e in mp.entries if e.layer == layer.index and isinstance(e.delta, Shift))
        factor = 1 + delta.value / (1 + model.model.layers[layer.index].post_feedforward_layernorm.weight)
        same = factor.std(-1) < 1e-5 * factor.mean(-1).abs()
        assert bool(same.all()) if taken == "uniform" else not bool(same.any())
        assert layer.route == taken
        assert layer.tokens.route == [taken] * 6


@pytest.mark.parametrize("via", ["input-output", "output"])
def test_condition_numbers_against_the_weights(via):
    """(max |W x| + max |ΔW x|) / max |(W + ΔW) x| of every map, from its weight, its input and its dense ΔW."""
    model = tiny_gemma(layers=2)
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, via=via)
    given, handles = {}, []
    for entry in mp.entries:
        tell = lambda module, args, name=entry.module: given.__setitem__(name, args[0][0].numpy())  # noqa: E731
        handles.append(model.get_submodule(entry.module).register_forward_pre_hook(tell))
    with torch.no_grad(), mp.applied(model):
        model(**source)
    for handle in handles:
        handle.remove()
    checked = 0
    for entry in mp.entries:
        if isinstance(entry.delta, LowRank):
            dense, weight = entry.delta.dense().numpy(), model.get_parameter(entry.param.name).detach().numpy()
            x = given[entry.module]
            own, added = x @ weight.T, np.einsum("noi,ni->no", dense, x)
            wanted = (np.abs(own).max(-1) + np.abs(added).max(-1)) / np.abs(own + added).max(-1)
            found = mp.report.layers[entry.layer].tokens.condition[str(entry.param)]
            assert found == pytest.approx(wanted, rel=1e-4)
            assert min(found) >= 1
            checked += 1
    assert checked == (6 if via == "input-output" else 2)


def test_scale_is_the_route_that_amplifies():
    model = tiny_gemma(layers=3, d=64)
    pair = runs(context=9, query=4)
    worst = {
        r: max(x.amplification for x in ct.patch_model(model, *pair, route=r).report.layers) for r in ("auto", "scale")
    }
    assert worst["scale"] > 10 * worst["auto"] >= 10


def test_reports_are_written_when_read_and_do_not_look_at_the_model_again():
    model = tiny_gemma(layers=2)
    target, source = runs(context=9, query=3)
    one, two = (ct.patch_model(model, target, source, scope="last") for _ in range(2))
    assert not two.report.layers._written
    early = one.report.to_dict()["layers"]
    two.merge(model)
    assert two.report.to_dict()["layers"] == early
    two.unmerge(model)
    assert not one.report.rounding


def test_the_report_is_json_and_survives_saving(tmp_path):
    model = tiny_gemma(layers=2)
    mp = ct.patch_model(model, *runs(context=9, query=3))
    told = json.loads(json.dumps(mp.report.to_dict(), allow_nan=False))
    mp.save(tmp_path / "patch")
    loaded = ct.load_patch(tmp_path / "patch").report
    assert loaded.to_dict() == told
    assert loaded.table() == mp.report.table()
    keys = {"residual", "route", "amplification", "condition", "margins", "changes"}
    assert all(set(layer["tokens"]) == keys for layer in told["layers"])


def test_tables_have_a_row_a_layer_and_a_row_a_token():
    model = tiny_gemma(layers=2)
    mp = ct.patch_model(model, *runs(context=9, query=3, batch=2))
    below = len(EXPLAINED.splitlines()) + 1
    assert len(str(mp.report).splitlines()) == 1 + 2 + below
    rows = mp.report.table().splitlines()
    assert len(rows) == 1 + 2 * 6 + below
    assert rows[-1] == str(mp.sensitivity)
    assert rows[6].split()[:2] == ["0", "1:2"]
    assert all(len(row) == 1 + len(COLUMNS) for row in mp.report.rows())


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "llama", "bert"])
def test_other_families_report_every_token_too(name):
    model = build(name, torch.float32)
    target, source = inputs(name, model, batch=1)
    mp = ct.patch_model(model, target=target, source=source)
    for layer in mp.report.layers:
        assert len(layer.tokens.residual) == len(mp.rows.sample)
        assert all(len(margins) == len(mp.rows.sample) for margins in layer.tokens.margins)
        assert layer.condition is None or layer.condition >= 1 - 1e-5
    json.dumps(mp.report.to_dict(), allow_nan=False)
