"""A context is run once, and what follows it in every query goes on from its cache."""

import functools

import numpy as np
import pytest
import torch
from family_models import build
from plain_tokenizer import Plain, words

import controllability as ct
from controllability.compiling import Query, answers
from controllability.compiling.answers import continuations
from controllability.compiling.compile_context import compile_context
from controllability.compiling.token_sets import Context
from controllability.compiling.yardstick import logits_of
from controllability.models.sweep import shared_past
from controllability.models.sweep.shared_past import SharedPast

CONTEXT = [int(x) for x in np.random.default_rng(0).integers(5, 40, 23)]
ASKED = [[int(x) for x in np.random.default_rng(k).integers(5, 40, n)] for k, n in ((1, 4), (2, 6), (3, 4), (4, 5))]


@functools.cache
def model(family, dtype=torch.float64):
    return build(family, dtype)


def samples():
    before = Context.of(Plain(), words(CONTEXT), None, [words(row) for row in ASKED])
    return [before.sample(words(row)) for row in ASKED]


def past_of(family):
    return SharedPast.of(model(family), CONTEXT, ASKED[1])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "gptj", "qwen2"])
def test_it_gives_what_runs_over_everything_give(family):
    past = past_of(family)
    assert past is not None and past.length == len(CONTEXT)
    whole, shared = (logits_of(model(family), samples(), "target", past=which) for which in (None, past))
    for x, y in zip(whole, shared, strict=True):
        assert x.shape == y.shape and float((x - y).abs().max()) < 1e-6 * float(x.abs().max())
    for side in ("source", "target"):
        counts, ends = [3, 2, 0, 3], frozenset({7})
        apart, together = (
            continuations(model(family), samples(), counts, side, ends, past=which) for which in (None, past)
        )
        assert apart == together and any(apart)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "bloom"])
def test_models_without_a_plain_cache_are_run_over_everything(family):
    assert past_of(family) is None


def test_rows_of_other_lengths_wait_for_each_other_where_a_window_counts_the_padding():
    """The window of a local layer is shorter than the context: what is padded would push tokens out of it."""
    past = past_of("gemma3_text")
    assert past is not None
    wanted = continuations(model("gemma3_text"), samples(), [3] * 4, "target", frozenset())
    for ragged in {False, past.ragged}:
        past.ragged = ragged
        assert continuations(model("gemma3_text"), samples(), [3] * 4, "target", frozenset(), past=past) == wanted


def test_memory_is_bounded_whatever_the_number_of_queries(monkeypatch):
    past = past_of("llama")
    assert [*past.batches([4] * 5)] == [range(5)]
    monkeypatch.setattr(shared_past, "ROOM", past.bytes * (past.length + 4) * 2)
    assert [*past.batches([4] * 5)] == [range(2), range(2, 4), range(4, 5)]
    assert [*past.batches([400, 4])] == [range(1), range(1, 2)]  # one at a time there is always room for
    small = logits_of(model("llama"), samples(), "target", past=past)
    monkeypatch.undo()
    whole = logits_of(model("llama"), samples(), "target", past=past)
    assert all(torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in zip(small, whole, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gptj"])
def test_the_patch_is_the_one_that_whole_runs_give(family, monkeypatch):
    texts, second = [words(row) for row in ASKED], ct.second_moments(model(family), torch.randint(5, 40, (40, 24)))
    monkeypatch.setattr(shared_past, "ROOM", 1)  # one query at a time
    arguments = model(family), Plain(), words(CONTEXT), texts
    found = compile_context(*arguments, moments=second, answer_tokens=2)
    calls = []
    monkeypatch.setattr(SharedPast, "of", staticmethod(lambda *_: calls.append(1)))
    whole = compile_context(*arguments, moments=second, answer_tokens=2)
    assert calls and whole.results["queries"].kl == pytest.approx(found.results["queries"].kl, rel=1e-4, abs=1e-12)
    for x, y in zip(found.logits["queries"], whole.logits["queries"], strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-6 * float(y.abs().max()))


# ------------------------------------------------------------------------------------ what stands before every query


def test_the_same_token_twice_at_the_beginning_has_one_state_so_the_anchor_is_another():
    with torch.no_grad():
        states = model("llama")(torch.tensor([[9, 9, 4]]), output_hidden_states=True).hidden_states[-2][0]
    assert torch.allclose(states[0], states[1], rtol=0, atol=1e-6) and not torch.allclose(states[1], states[2])
    own = Context.of(Plain(), words(CONTEXT), None, [words([4, CONTEXT[0]])])
    assert own.lead == (CONTEXT[0],) and own.anchored
    begun = Context.of(Plain(), words(CONTEXT), None, [words([CONTEXT[0], 7]), words([CONTEXT[1], 7])])
    assert begun.lead == (CONTEXT[2],)
    sample = begun.sample(words([CONTEXT[0], 7]))
    assert sample.source == (CONTEXT[2], CONTEXT[0], 7) and sample.target == (*CONTEXT, CONTEXT[0], 7)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gptj"])
@pytest.mark.parametrize("strength", ["balanced", "exact"])
def test_queries_that_begin_as_the_context_does_are_compiled_exactly(family, strength):
    """Where no norm stands behind the map, the last block reaches every token of the queries."""
    net = model(family)
    texts = [words([CONTEXT[0], 7, 11]), words([CONTEXT[0], 8]), words(ASKED[0])]
    second = ct.second_moments(net, torch.randint(5, 40, (40, 24))) if strength == "balanced" else None
    found = compile_context(net, Plain(), words(CONTEXT), texts, strength=strength, moments=second)
    assert found.exact and found.results["queries"].relative_error < 1e-7 < 1e-2 < found.sets["queries"].unpatched.kl
    assert found.to_dict()["first_tokens"] == [str(found.context.lead[0])] != [str(CONTEXT[0])]


def test_behind_a_norm_nothing_is_called_exact_that_is_not():
    net = model("gemma3_text")
    second = ct.second_moments(net, torch.randint(5, 40, (40, 24)))
    found = compile_context(net, Plain(), words(CONTEXT), [words(row) for row in ASKED], moments=second)
    assert not found.exact and found.results["queries"].relative_error > 1e-6


def test_a_query_that_is_not_hard_is_not_reached_exactly():
    net, hard = model("llama"), [Query(words(row), hard=i == 1) for i, row in enumerate(ASKED)]
    second = ct.second_moments(net, torch.randint(5, 40, (40, 24)))
    found = compile_context(net, Plain(), words(CONTEXT), hard, strength="gentle", moments=second)
    errors = [
        float((x - y).abs().max()) for x, y in zip(found.logits["queries"], found.sets["queries"].wanted, strict=True)
    ]
    assert errors[1] < 1e-6 < 1e-3 < min(errors[0], errors[2]) and not found.exact


def test_another_context_does_not_go_on_from_the_cache_of_the_first(monkeypatch):
    """The control arms compile other contexts: what those say is heard behind them."""
    net, heard = model("llama"), []
    plain = answers.with_answers

    def spied(model, samples, count, *rest):
        found = plain(model, samples, count, *rest)
        heard.append(([sample.bare for sample in samples], [sample.said for sample in found]))
        return found

    monkeypatch.setattr(answers, "with_answers", spied)
    second = ct.second_moments(net, torch.randint(5, 40, (40, 24)))
    compile_context(
        net, Plain(), words(CONTEXT), [words(row) for row in ASKED], moments=second, answer_tokens=2, controls=True
    )
    contexts = {tuple(samples[0].target[: len(CONTEXT)]) for samples, _ in heard if samples}
    assert len(contexts) > 1
    for samples, said in heard:
        assert said == continuations(net, samples, [2] * len(samples), "target", frozenset())
