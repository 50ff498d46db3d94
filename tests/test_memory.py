"""Logits only where they are needed: what reaches the head of a model with a large vocabulary, counted; and that nothing else changed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import error, exactly, runs, tiny_gemma
from transformers import Gemma3ForCausalLM

import controllability as ct
from controllability.cli.patch import measure
from controllability.errors import PatchError
from controllability.models.reading import heads
from controllability.models.reading.logits import compare_logits

VOCAB, CONTEXT, QUERY = 20_000, 110, 7


def large(dtype: torch.dtype = torch.float32, **more: Any) -> Gemma3ForCausalLM:
    """Its logits over context and query are too many to be kept."""
    return tiny_gemma(vocab=VOCAB, max_position_embeddings=256, dtype=dtype, **more)


@contextmanager
def rows_at_the_head(model: Gemma3ForCausalLM) -> Iterator[list[int]]:
    """How many positions each call of the head computes."""
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output[..., 0].numel()))
    yield seen
    handle.remove()


@pytest.mark.parametrize(("scope", "rows", "tried"), [("each", QUERY, 0), ("last", 1, 0), ("all", QUERY, 3 * 8)])
def test_the_head_computes_the_paired_positions_alone(scope, rows, tried):
    model, (target, source) = large(), runs(CONTEXT, QUERY, vocab=VOCAB)
    ct.patch_model(model, target, source, scope)  # tries once whether logits can be made later
    with rows_at_the_head(model) as seen:
        mp = ct.patch_model(model, target, source, scope)
    assert sum(seen) == 2 * rows + tried, (
        "those of the target and of the patched source, once each, and short random runs"
    )
    with rows_at_the_head(model) as seen:
        found = measure(model, mp)
    assert sum(seen) <= 3 * rows + 9, "the same, and those of the unpatched source, and the try"
    assert found.verified("float32")


def test_many_positions_are_compared_a_few_at_a_time(monkeypatch):
    model, (target, source) = large(), runs(CONTEXT, 40, vocab=VOCAB)
    ct.patch_model(model, target, source)
    monkeypatch.setattr(heads, "ENTRIES", 3 * VOCAB)
    with rows_at_the_head(model) as seen:
        again = ct.patch_model(model, target, source)
        found = measure(model, again)
    assert max(seen) <= 4 and sum(seen) >= 5 * 40
    with torch.no_grad():
        wanted = model(**target).logits[:, CONTEXT:]
        with again.applied(model):
            plain = compare_logits(model(**source).logits, wanted)
    assert found.patched.max_logit_error == pytest.approx(plain.max_logit_error, rel=0.5)
    assert found.patched.error.shape == found.patched.kl.shape == (40,)


@pytest.mark.parametrize("scope", ["each", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_the_runs(scope, dtype):
    model, (target, source) = large(dtype, final_logit_softcapping=3.0), runs(CONTEXT, QUERY, 2, vocab=VOCAB)
    with exactly(dtype), torch.no_grad():
        mp = ct.patch_model(model, target, source, scope)
        wanted = model(**target).logits[:, CONTEXT:]
        with mp.applied(model):
            patched = model(**source).logits
    assert mp.output is not None and mp.output.head is not None and mp.logits is not None
    assert mp.logits.dtype == dtype and torch.equal(mp.logits, patched) and not mp.logits.is_inference()
    assert error(mp.target_logits, wanted if scope == "each" else wanted[:, -1:]) < 1e-6
    assert float(wanted.abs().max()) < 3.0


def test_logits_stay_while_the_model_is_patched_and_merged():
    model, (target, source) = large(), runs(CONTEXT, QUERY, vocab=VOCAB)
    mp = ct.patch_model(model, target, source, "last")
    before, wanted = mp.logits, mp.target_logits
    with mp.applied(model):
        assert torch.equal(mp.target_logits, wanted)
    mp.merge(model)
    merged = mp.merged_error(model)
    assert torch.equal(mp.logits, before) and merged.relative_error < 1e-5
    mp.unmerge(model)
    assert torch.equal(mp.logits, before)


def test_logits_of_a_model_that_is_gone_or_has_another_head_are_refused():
    model, (target, source) = large(), runs(CONTEXT, QUERY, vocab=VOCAB)
    mp = ct.patch_model(model, target, source)
    with torch.no_grad():
        model.lm_head.weight[3] *= 2
    with pytest.raises(PatchError, match="the head of the model changed"):
        _ = mp.logits
    del model
    gc.collect()
    with pytest.raises(PatchError, match="is gone"):
        _ = mp.target_logits


class _Shifted(Gemma3ForCausalLM):
    """Adds what depends on the token to its logits: they do not follow from its last hidden states."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:  # type: ignore[override]
        output = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        if output.logits.shape[1] == input_ids.shape[1]:
            output.logits = output.logits + input_ids[..., None]
        return output


class _Whole(Gemma3ForCausalLM):
    """Computes all logits whatever it is asked for."""

    def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("kind", [_Shifted, _Whole])
def test_where_logits_cannot_be_made_later_they_are_kept(kind):
    model, (target, source) = large(), runs(CONTEXT, QUERY, vocab=VOCAB)
    model.__class__ = kind
    mp = ct.patch_model(model, target, source)
    assert mp.output is not None and mp.output.head is None
    with torch.no_grad():
        wanted = model(**target).logits[:, CONTEXT:]
    assert error(mp.target_logits, wanted) < 1e-6
    assert error(mp.logits, wanted) < 1e-5


def test_a_solved_patch_is_held_once():
    model, (target, source) = tiny_gemma(), runs(9, 3)
    mp = ct.patch_model(model, target, source)
    held = [leaf.delta for record in mp.report.layers.records for leaf in record.leaves.values()]  # type: ignore[attr-defined]
    assert {id(delta) for delta in held} == {id(entry.delta) for entry in mp.entries}
    assert not any(
        value.is_inference() for e in mp.entries for value in vars(e.delta).values() if torch.is_tensor(value)
    )
