"""One patch for a batch on every causal-LM family of transformers.  One on demand: ``pytest -m "" -k "scope_all and gemma2"``."""

from __future__ import annotations

import pytest
import torch
from family_models import build, default_dtype, inputs, logits_of
from helpers import hook_count, snapshot, unchanged
from test_families import FAST, PATCHED, SEVERAL, quiet, relative

import controllability as ct

# one vector for all tokens, or a map of four numbers: they serve a token or a few, not a batch
REFUSED = {
    **dict.fromkeys(("inkling_text", "inkling2_text"), "no one change of it many"),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "all tokens ask for the same change"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "altup.correction_coefs"),
}


def distinct(name, model):
    """(target, source) in which no token stands twice: layer 0 of a parallel block sees the token alone."""
    target, source = inputs(name, model)
    if "input_ids" not in target:
        return target, source
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    ids, query = target["input_ids"], source["input_ids"].shape[1]
    new = torch.randperm(config.vocab_size - 7, generator=torch.Generator().manual_seed(0))[: ids.numel()] + 5
    new = new.reshape(ids.shape)
    return target | {"input_ids": new}, source | {"input_ids": new[:, -query:]}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in PATCHED])
def test_one_patch_for_a_batch(name):
    """Two samples of four tokens, by both theorems, exact float64: applied, merged and taken out to the last bit."""
    with quiet(), default_dtype(name), ct.exact_mode():
        model = build(name)
        target, source = distinct(name, model)
        unpatched, before = logits_of(model, source), snapshot(model)
        for via in ("input-output", "output"):
            if name in REFUSED:
                with pytest.raises(ct.ControllabilityError, match=REFUSED[name]):
                    ct.patch_model(model, target=target, source=source, scope="all", via=via)
                continue
            mp = ct.patch_model(model, target=target, source=source, scope="all", via=via)
            wanted = mp.target_logits
            with mp.applied(model):
                assert relative(logits_of(model, source), wanted) <= 1e-9
            assert relative(unpatched, wanted) > 1e-3
            if name in SEVERAL:
                with pytest.raises(ct.PatchError, match=SEVERAL[name]):
                    mp.merge(model)
                continue
            mp.merge(model)
            assert relative(logits_of(model, source), wanted) <= 1e-9
            mp.unmerge(model)
        assert unchanged(model, before)
        assert hook_count(model) == 0
