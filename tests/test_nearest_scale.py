"""One scale that is near all targets, one whose tokens' sizes are free, and whether sizes count behind a model's last layer."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import build
from helpers import error, snapshot, tiny_gemma, unchanged
from scipy.optimize import minimize
from torch import nn

import controllability as ct
from controllability.models.patches.solve import parse_joint_options
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.inputs import sizes_are_free
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.source_run import with_reader_of_last_layer
from controllability.solvers import nearest_scale as nearest
from controllability.solvers.joint_scale_task import sized_scale
from controllability.solvers.nearest_scale import nearest_scale
from controllability.solvers.resorts import Resort

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from scope_all import CONTEXT, random_model, task


def problem(seed, tokens=12, d=8):
    numbers = np.random.default_rng(seed)
    m = numbers.uniform(0.3, 2, d) * np.where(numbers.random(d) < 0.3, -1, 1)
    return numbers.normal(size=(tokens, d)) * numbers.uniform(0.5, 3, (tokens, 1)), m, numbers.uniform(0.5, 1, tokens)


def objective(G, m, ridge, scale, unit):
    off = ((scale * unit - G) ** 2).sum(-1) / (G * G).sum(-1)
    return off.sum() + ridge * ((scale - m) ** 2).sum() / np.abs(m).mean() ** 2


# ------------------------------------------------------------------------------------- nearest


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_nothing_near_by_is_nearer(seed, ridge, monkeypatch):
    """Against a general solver that starts where this one ended, with the unit vectors as its unknowns too."""
    monkeypatch.setattr(nearest, "ROUNDS", 5000)
    monkeypatch.setattr(nearest, "SETTLED", 1e-12)
    G, m, q = problem(seed)
    found = nearest_scale(G, m, q, ridge)
    assert np.allclose((found.unit**2).mean(-1), q, rtol=1e-10)

    def value(x):
        u = x[len(m) :].reshape(G.shape)
        return objective(G, m, ridge, x[: len(m)], u * np.sqrt(q[:, None] / (u * u).mean(-1, keepdims=True)))

    here = objective(G, m, ridge, found.scale, found.unit)
    better = minimize(value, np.concatenate([found.scale, found.unit.ravel()]), options={"maxiter": 50})
    assert here <= better.fun * (1 + 1e-4)
    unmoved = nearest_scale(G, m, q, 1e12)
    assert here < objective(G, m, ridge, unmoved.scale, unmoved.unit)


def test_more_rounds_lower_the_objective(monkeypatch):
    G, m, q = problem(5)
    monkeypatch.setattr(nearest, "SETTLED", 0.0)
    values = []
    for rounds in (1, 2, 4, 8, 16):
        monkeypatch.setattr(nearest, "ROUNDS", rounds)
        found = nearest_scale(G, m, q, 0.01)
        values.append(objective(G, m, 0.01, found.scale, found.unit))
    assert all(later < earlier for earlier, later in pairwise(values))


def test_a_large_ridge_leaves_the_scale_and_none_reaches_what_can_be_reached():
    G, m, q = problem(6, tokens=1)
    assert np.allclose(nearest_scale(G, m, q, 1e9).scale, m, rtol=1e-6)
    near = nearest_scale(G, m, q, 1e-8)
    assert np.abs(near.scale * near.unit - G).max() < 1e-2 * np.abs(G).max()


def test_nothing_asked_for_and_channels_without_a_scale():
    G, m, q = problem(7)
    G[3] = 0
    m[2] = 0
    found = nearest_scale(G, m, q)
    assert not found.unit[3].any()
    assert found.scale[2] != 0, "a channel that is needed is not left dead"
    assert np.isfinite(found.scale).all() and np.isfinite(found.unit).all()
    still = nearest_scale(G * 0, m, q)
    assert np.array_equal(still.scale, m) and not still.unit.any()


def test_units_are_of_the_scale_as_the_parameter_holds_it():
    G, m, q = problem(8)
    coarse = lambda scale: np.round(scale, 1)  # noqa: E731
    found = nearest_scale(G, m, q, 0.0, coarse)
    assert np.array_equal(found.scale, coarse(found.scale))
    assert np.allclose((found.unit**2).mean(-1), q, rtol=1e-10)


# --------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("seed", range(6))
def test_every_token_keeps_its_rms_up_to_the_size_of_the_output(seed):
    G, m, q = problem(seed, tokens=30)
    skip = np.random.default_rng(seed + 50).normal(size=G.shape)
    found = sized_scale(G, G + skip, q, [m])
    unit = (found.sizes[:, None] * (G + skip) - skip) / found.scale
    assert np.allclose((unit**2).mean(-1), q, rtol=1e-9)
    assert (found.sizes > 0).all()
    assert np.abs(found.sizes - 1).max() > 1e-3


def test_where_every_rms_is_kept_already_no_size_changes():
    G, m, _ = problem(3)
    q = ((G / m) ** 2).mean(-1)
    found = sized_scale(G, G + 1, q, [m])
    assert np.array_equal(found.scale, m)
    assert np.allclose(found.sizes, 1, atol=1e-12)


def test_of_several_scales_the_one_with_the_smaller_changes():
    G, m, _ = problem(4)
    q = ((G / m) ** 2).mean(-1)
    assert np.array_equal(sized_scale(G, G + 1, q, [m * 3.3, m]).scale, m)
    assert sized_scale(G, G * 0, q, [m]) is None, "there is no output to change"


# -------------------------------------------------------------------------------- on live models


class ReadsSizes(nn.Module):
    """A last norm beside which the size is read as well."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, x):
        return self.norm(x) + 0.1 * x


def test_whether_sizes_count_is_tried_on_the_model():
    model = tiny_gemma()
    ids = {"input_ids": torch.arange(5, 13)[None]}
    before = snapshot(model)
    assert sizes_are_free(model, checked_reading(model, ids), ids)
    assert unchanged(model, before)
    model.model.norm = ReadsSizes(model.model.norm).eval()
    assert not sizes_are_free(model, checked_reading(model, ids), ids)


@pytest.mark.parametrize(("name", "free"), [("llama", True), ("gpt2", True), ("gptj", True), ("bert", False)])
def test_families_end_in_a_norm_or_not(name, free):
    """BERT's last layer is what its head reads."""
    model = build(name, torch.float32)
    ids = {"input_ids": torch.arange(5, 13)[None]}
    checked = checked_reading(model, ids)
    assert sizes_are_free(model, checked, ids) is free
    wish = parse_joint_options("all", 0.0, None, False)
    assert with_reader_of_last_layer(wish, model, checked, ids).read_by == ("norm" if free else "anyone")
    kept = parse_joint_options("all", 0.0, None, True)
    assert with_reader_of_last_layer(kept, model, checked, ids) == kept


def run_of(name, **changes):
    """(patch, found, wanted, unpatched) of 24 tokens in float32, so many that no scale keeps every RMS."""
    model = random_model(name, 32, 48, 2).float()
    for path, module in changes.items():
        setattr(model.model, path, module(getattr(model.model, path)).eval())
    target, source, positions = task(24)
    wanted, unpatched = model(**target).logits[:, CONTEXT:], model(**source).logits
    mp = ct.patch_model(model, target, source, scope="all", positions=positions)
    with mp.applied(model):
        return mp, model(**source).logits, wanted, unpatched


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_the_last_layer_keeps_every_rms_before_a_norm(name):
    mp, found, wanted, unpatched = run_of(name)
    first, last = mp.report.layers
    assert first.route == Resort.NEAREST
    assert last.route == Resort.SIZED and last.residual < 1e-5
    assert "outputs change their sizes by factors" in last.why
    assert error(found, wanted) < 1e-5 < 0.1 < error(unpatched, wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_half_precision_too(name, dtype):
    """Applied, and merged layer by layer."""
    model = random_model(name, 32, 48, 2).to(dtype)
    target, source, positions = task(29)
    wanted, unpatched = model(**target).logits[:, CONTEXT:], model(**source).logits
    mp = ct.patch_model(model, target, source, scope="all", positions=positions)
    with mp.applied(model):
        found = model(**source).logits
    mp.merge(model, corrected=True)
    merged = model(**source).logits
    assert mp.report.layers[-1].route == Resort.SIZED
    assert error(found, wanted) < VERIFIED[dtype] < 0.1 < error(unpatched, wanted)
    assert error(merged, wanted) < VERIFIED[dtype]


@torch.no_grad()
def test_where_sizes_count_they_are_not_touched():
    """The same model, but its head reads the size of the last layer's output as well."""
    mp, found, wanted, unpatched = run_of("gemma3", norm=ReadsSizes)
    assert mp.report.layers[-1].route in ("moved rms", "enlarged")
    assert error(found, wanted) < 1e-2 < 0.1 < error(unpatched, wanted)


@torch.no_grad()
def test_merged_with_correction_the_sizes_are_free_too():
    model = random_model("gemma3", 32, 48, 2).float()
    target, source, positions = task(24)
    wanted = model(**target).logits[:, CONTEXT:]
    mp = ct.patch_model(model, target, source, scope="all", positions=positions)
    mp.merge(model, corrected=True)
    merged = model(**source).logits
    mp.unmerge(model)
    assert error(merged, wanted) < 1e-4
