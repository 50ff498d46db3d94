"""Both runs in one pass: the same numbers as two passes, and nobody sees the context who should not."""

from __future__ import annotations

import pytest
import torch
from helpers import error, tiny_gemma
from test_generation import NEVER, ragged

import controllability as ct
from controllability.models.generation import generate as generation
from controllability.models.sweep import one_pass as in_one_pass


@pytest.fixture(scope="module")
def model():
    return tiny_gemma(layers=3, vocab=200)


@pytest.fixture
def passes(monkeypatch):
    """Which way each step was done."""
    done = []
    for name in ("_together", "_apart"):
        original = getattr(generation._Loop, name)
        monkeypatch.setattr(
            generation._Loop, name, lambda self, *a, n=name, f=original: (done.append(n.strip("_")), f(self, *a))[1]
        )
    return done


def test_the_prompt_is_read_apart_and_what_follows_together(model, passes):
    ct.generate(model, torch.arange(5, 12)[None], max_new_tokens=4, **NEVER)
    assert passes == ["apart", "together", "together", "together"]


@pytest.mark.parametrize("control", [False, True])
def test_one_pass_gives_what_two_give(model, passes, monkeypatch, control):
    ids, mask, _ = ragged()
    at_once = ct.generate(model, ids, mask, max_new_tokens=6, control=control, **NEVER)
    assert "together" in passes
    monkeypatch.setattr(generation, "possible", lambda *_: False)
    passes.clear()
    in_turn = ct.generate(model, ids, mask, max_new_tokens=6, control=control, **NEVER)
    assert set(passes) == {"apart"}
    assert torch.equal(at_once.sequences, in_turn.sequences)
    for a, b in zip(at_once.steps, in_turn.steps, strict=True):
        assert torch.equal(a.patched, b.patched)
        assert error(a.top1_gap, b.top1_gap) < 1e-4
        assert float(a.relative_error.max()) < 1e-5
        if control:
            assert torch.equal(a.unpatched, b.unpatched)
            assert error(a.max_logit_error_unpatched, b.max_logit_error_unpatched) < 1e-4


def test_the_source_rows_meet_the_states_of_a_source_run(model, monkeypatch):
    """The states of every layer, against a run of the token alone; and against the context's, which they must not be."""
    seen = []
    original = in_one_pass.same

    def watching(found, apart):
        seen.append([
            (error(a.states[0], b.states[0]), error(a.states[0], a.target.states[0])) for a, b in zip(found, apart, strict=True)
        ])  # fmt: skip
        return original(found, apart)

    monkeypatch.setattr(generation, "same", watching)
    ct.generate(model, torch.arange(5, 12)[None], max_new_tokens=3, **NEVER)
    assert len(seen) == 1, "compared once, on the first step that is done in one pass"
    assert all(alone < 1e-5 for alone, _ in seen[0])
    assert all(context > 1e-2 for _, context in seen[0])


@pytest.mark.parametrize("end", [False, True])
def test_a_model_that_lets_the_rows_see_the_cache_is_done_in_two_passes(model, passes, monkeypatch, end):
    """A mask that is not kept: the patches would be of a token that knows the context."""
    original = generation.widened

    def leaking(inputs, input_ids, groups):
        wide = original(inputs, input_ids, groups)
        return {**wide, "attention_mask": torch.ones_like(wide["attention_mask"])}

    monkeypatch.setattr(generation, "widened", leaking)
    ids, mask, _ = ragged()
    free = ct.generate(model, ids[:1], mask[:1], max_new_tokens=5, **NEVER)
    assert passes == ["apart", "together", "apart", "apart", "apart"]
    plain = model.generate(ids[:1], max_new_tokens=5, do_sample=False, **NEVER)
    assert torch.equal(free.sequences, plain)
    assert free.max_logit_error < 1e-5
    stop = {"eos_token_id": int(plain[0, 13])} if end else NEVER
    again = ct.generate(model, ids, mask, max_new_tokens=5, **stop)
    assert again.agreement == 1.0, "the cache has its own rows again"


def test_a_condition_that_fails_is_solved_by_itself(model, passes, monkeypatch):
    """The pass goes on for the contextual model, and the sweep tries the other derivations."""
    original, failed = in_one_pass.LayerSweep.computed, []

    def failing(self, tap, x, y):
        if len(failed) < 1 and passes and passes[-1] == "together":
            failed.append(tap)
            raise ct.SideConditionFailed("made up", "here", None, None)
        return original(self, tap, x, y)

    monkeypatch.setattr(in_one_pass.LayerSweep, "computed", failing)
    ids = torch.arange(5, 12)[None]
    done = ct.generate(model, ids, max_new_tokens=4, **NEVER)
    assert failed
    assert torch.equal(done.sequences, model.generate(ids, max_new_tokens=4, do_sample=False, **NEVER))
    assert done.agreement == 1.0
    assert done.max_logit_error < 1e-5


def test_half_precision_is_done_in_two_passes(passes):
    model = tiny_gemma(layers=2, dtype=torch.bfloat16)
    ct.generate(model, torch.arange(5, 12)[None], max_new_tokens=3, **NEVER)
    assert set(passes) == {"apart"}


def test_a_state_that_is_handed_on_is_done_in_two_passes(passes):
    from family_models import build

    done = ct.generate(build("jamba", torch.float32), torch.arange(5, 12)[None], max_new_tokens=3, **NEVER)
    assert set(passes) == {"apart"}
    assert done.agreement == 1.0
