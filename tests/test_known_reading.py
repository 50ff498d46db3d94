"""Applying a patch again does not read the model again, unless something was replaced or written to."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import error, runs, tiny_gemma
from torch import nn

import architectures
import controllability as ct
from controllability.models.reading.checked_reading import known_reading


@pytest.fixture
def patched(gemma):
    target, source = runs(context=9, query=4)
    return gemma, ct.patch_model(gemma, target, source, scope="last"), source


@pytest.fixture
def reads(monkeypatch):
    """One entry for every time that any model is read."""
    counted, read = [], architectures.read

    def counting(model, *place):
        counted.append(model)
        return read(model, *place)

    monkeypatch.setattr(architectures, "read", counting)
    return counted


def applied(mp, model, source):
    with torch.no_grad(), mp.applied(model):
        return model(**source).logits[:, -1]


def test_the_checked_reading_serves_as_often_as_the_patch_is_applied(patched, reads):
    model, mp, source = patched
    for _ in range(3):
        assert error(applied(mp, model, source), mp.target_logits[:, -1]) < 5e-6
    assert not reads


def test_a_model_that_was_never_checked_is_read_once(patched, reads, tmp_path):
    model, mp, source = patched
    mp.save(tmp_path / "patch")
    twin, loaded = copy.deepcopy(model), ct.load_patch(tmp_path / "patch")
    applied(loaded, twin, source)
    first = len(reads)  # the fingerprint reads it as well
    assert first >= 1
    for _ in range(3):
        assert error(applied(loaded, twin, source), mp.target_logits[:, -1]) < 5e-6
    assert len(reads) == first


def test_a_replaced_module_is_read_anew(patched, reads):
    """The same parameters in another module: every weight is what it was, but the old module is not in the model."""
    model, mp, source = patched
    old = model.model.layers[0].mlp.down_proj
    new = nn.Linear(old.in_features, old.out_features, bias=False).eval()
    new.weight = old.weight
    model.model.layers[0].mlp.down_proj = new
    assert error(applied(mp, model, source), mp.target_logits[:, -1]) < 5e-6
    assert len(reads) == 1
    name = "model.layers.0.mlp.down_proj.weight"
    assert known_reading(model).layers[0].params.holder(name)[0] is new
    assert len(reads) == 1


def test_an_exchanged_parameter_is_read_anew(patched, reads):
    model, mp, _ = patched
    norm = model.model.layers[1].post_feedforward_layernorm
    norm.weight = nn.Parameter(norm.weight.detach().clone())
    with pytest.raises(ct.PatchError, match="changed since this patch was made"), mp.applied(model):
        pass
    assert not reads
    known_reading(model)
    assert len(reads) == 1


def test_a_family_that_is_registered_anew_is_read_anew(patched, reads):
    model, _, _ = patched
    family = architectures.find("gemma3_text")
    architectures.unregister(family.name)
    try:
        architectures.add(copy.copy(family))
        assert known_reading(model).architecture is not family
        assert len(reads) == 1
    finally:
        architectures.unregister(family.name)
        architectures.add(family)
    assert known_reading(model).architecture is family
    assert len(reads) == 2


def test_on_top_of_another_patch_and_after_a_merge(patched, reads):
    """What is below has exchanged vectors, or written into the weights."""
    model, mp, source = patched
    target, _ = runs(context=9, query=4)
    with mp.applied(model):
        on_top = ct.patch_model(model, target, source, scope="last", via="output")
        for _ in range(2):
            assert error(applied(on_top, model, source), on_top.target_logits[:, -1]) < 5e-6
    assert error(applied(mp, model, source), mp.target_logits[:, -1]) < 5e-6
    mp.merge(model)
    mp.unmerge(model)
    del reads[:]
    for _ in range(3):
        assert error(applied(mp, model, source), mp.target_logits[:, -1]) < 5e-6
    assert len(reads) == 1, "the merge wrote to the weights"


def test_every_model_is_kept_apart():
    one, other = tiny_gemma(seed=0), tiny_gemma(seed=1)
    assert known_reading(one) is known_reading(one)
    assert known_reading(one) is not known_reading(other)
