"""What the benchmarks measure is what they say: the obvious procedure is right, weights come back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import error, hook_count, runs, snapshot, unchanged

import controllability as ct

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from common import SHAPES, random_model
from obvious import ObviousProcedure


def test_the_obvious_procedure_reaches_the_target_and_restores_the_weights(gemma):
    target, source = runs(context=9, query=1)
    before = snapshot(gemma)
    with torch.no_grad():
        wanted, patched = ObviousProcedure(gemma).token(target["input_ids"])
        unpatched = gemma(**source).logits[0, -1]
        assert torch.equal(wanted, gemma(**target, use_cache=False, logits_to_keep=1).logits[0, -1])
    assert error(patched, wanted) < 5e-6 < 0.1 < error(unpatched, wanted)
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("1b", "small")])
def test_the_shapes_are_models_that_can_be_patched(shape):
    tiny = {
        "llama": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
        "mixtral": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
        "gptj": {"n_embd": 32, "n_head": 2, "rotary_dim": 4, "n_layer": 2, "n_inner": 64},
    }
    model = random_model(shape, vocab_size=60, **({"intermediate_size": 48} if shape != "gptj" else {}), **tiny[shape])
    target, source = runs(context=9, query=1)
    with torch.no_grad():
        wanted, unpatched = model(**target).logits[:, -1:], model(**source).logits
    assert error(ct.patch_model(model, target, source).logits, wanted) < 1e-5 < 1e-3 < error(unpatched, wanted)


def test_random_models_are_the_same_each_time():
    first, second = (random_model("small", num_hidden_layers=1, hidden_size=16, vocab_size=60) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
