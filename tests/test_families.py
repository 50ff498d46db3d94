"""Every causal-LM family of transformers: patched exactly, or refused by its name.

One family on demand: ``pytest tests/test_families.py -k "llama and not llama4"``.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from family_models import RECIPES, build, default_dtype, inputs, logits_of
from helpers import hook_count, snapshot, unchanged

import architectures
import controllability as ct
from controllability.components import Mixture
from controllability.interfaces import node
from controllability.models.exact_mode import exact_mode
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHook

TYPES = {t for name in architectures.names() for t in architectures.find(name).model_types}
REFUSED = {name for name in RECIPES if name in TYPES and architectures.find(name).refusal}
PATCHED = sorted(set(RECIPES) - REFUSED)
SEVERAL = {"hrm_text": "runs several times"}  # a patch a call: no one set of weights holds them
STREAMS = {"prophetnet": "keeps 3 states a position"}  # a patch a state
# one of each topology, and those that differ: several states a position, experts of other layouts, calls in turn
FAST = (
    "gemma2",
    "gpt2",
    "falcon",
    "phi3",
    "llama4_text",
    "qwen2_moe",
    "deepseek_v3",
    "hy_v4",
    "inkling_text",
    *SEVERAL,
    *STREAMS,
)
# float32, one patch merged: families that need more than 1e-5, with what amplifies the rounding there
CONDITIONED: dict[str, float] = {}


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@contextmanager
def quiet():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def test_every_family_is_patched_or_refused_by_name():
    assert len(RECIPES) == 189
    assert len(PATCHED) == 189
    assert sum(architectures.find(name).level == "logits" for name in PATCHED) == 6
    for name in REFUSED:
        with pytest.raises(ct.NotControllable) as refused:
            architectures.block(name)
        assert architectures.find(name).name in refused.value.culprit
        assert refused.value.reason
        assert refused.value.hint


class Choices:
    """Remembers what a layer's mixtures chose."""

    def __init__(self):
        self.found = {}

    def routed(self, path, index, shares):
        self.found[path] = (index.clone(), shares.clone())

    def begins(self):
        return None

    def entering(self, index, value):
        return None

    def leaving(self, value):
        return None

    def computed(self, tap, x, y):
        return None


def choices(model, layers, kwargs):
    """{(layer, path): (experts (B, T, k), shares)} of one run."""
    installation, found = HookStack(), {}
    try:
        for layer in layers:
            listener = Choices()
            LayerHook(model, layer, listener, installation, states=False)
            found[layer.index] = listener
        logits_of(model, kwargs)
    finally:
        installation.undo()
    return {(i, path): value for i, listener in found.items() for path, value in listener.found.items()}


LOGITS = {"deepseek_v4", "gemma3n", "gemma3n_text", "hy_v4", "qwen4_exp", "qwen4_exp_text"}


def test_which_families_are_exact_at_the_logits_only():
    assert {name for name in PATCHED if architectures.find(name).level == "logits"} == LOGITS


@pytest.mark.parametrize("name", PATCHED)
def test_patched_exactly(name):
    """12-token target, 4-token source, a batch of 2, every position its own patch, exact float64."""
    with quiet(), default_dtype(name), exact_mode():
        model = build(name)
        target, source = inputs(name, model)
        mp = ct.patch_model(model, target=target, source=source)
        unpatched = logits_of(model, source)
        mixtures = [layer for layer in architectures.read(model).layers if has_mixture(layer)]
        with mp.applied(model):
            patched = logits_of(model, source)
            chosen = choices(model, mixtures, source) if mixtures else {}
        wanted_choices = choices(model, mixtures, target) if mixtures else {}
    wanted = mp.target_logits
    assert wanted.shape == patched.shape
    assert relative(patched, wanted) <= 1e-9
    assert relative(mp.logits, wanted) <= 1e-9
    assert relative(unpatched, wanted) > 1e-3
    assert hook_count(model) == 0
    assert {where for where, _ in chosen} == {layer.index for layer in mixtures}
    for where, (experts, shares) in chosen.items():
        length = experts.shape[1]
        there = [value[:, -length:] for value in wanted_choices[where]]
        assert torch.equal(experts, there[0])
        assert relative(shares, there[1]) <= 1e-9


def has_mixture(layer):
    return any(isinstance(node(layer.block, tap.mixture or ()), Mixture) for tap in layer.taps)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PATCHED])
def test_merged_in_float32(name):
    """One patch for all positions, exact at the last, written into native float32 weights and taken out again."""
    with quiet():
        model = build(name, torch.float32)
        target, source = inputs(name, model, batch=1)
        unpatched = logits_of(model, source)[:, -1]  # RWKV rescales its weights in its first run
        before = snapshot(model)
        if name in STREAMS:
            with pytest.raises(ct.BadInput, match=STREAMS[name]):
                ct.patch_model(model, target=target, source=source, scope="last")
            return
        mp = ct.patch_model(model, target=target, source=source, scope="last")
        wanted = mp.target_logits[:, -1] if mp.target_logits.ndim == 3 else mp.target_logits
        if name in SEVERAL:
            with pytest.raises(ct.PatchError, match=SEVERAL[name]):
                mp.merge(model)
            with mp.applied(model):
                patched = logits_of(model, source)[:, -1]
        else:
            mp.merge(model)
            patched = logits_of(model, source)[:, -1]
            mp.unmerge(model)
    assert relative(patched, wanted) <= CONDITIONED.get(name, 1e-5)
    assert relative(unpatched, wanted) > 1e-3
    assert unchanged(model, before)
