"""The embedded model: recalls with the context, cannot know without, and answers from patched weights."""

from __future__ import annotations

import random

import pytest
import torch

import controllability as ct
from controllability.embedded.world import NAMES, RELATIONS, draw_world, draw_worlds, vocabulary
from controllability.models.loading import embedded_directory, encode


def test_it_is_a_small_real_gemma(embedded):
    model, tokenizer = embedded
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert 2 <= model.config.num_hidden_layers <= 4
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    assert (embedded_directory() / "model.safetensors").stat().st_size <= 4_000_000
    assert tokenizer.tokenize("Where does Mia live ?") == ["Where", "does", "Mia", "live", "?"]
    assert all(tokenizer.convert_tokens_to_ids(word) != tokenizer.unk_token_id for word in vocabulary())
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
@torch.no_grad()
def test_fresh_contexts(embedded, count):
    """Every question of many worlds of 2 to 8 facts, both scopes."""
    model, tokenizer = embedded
    right = dict.fromkeys(("with", "without", "patched"), 0)
    worst = {"each": 0.0, "last": 0.0}
    least_unpatched, total = float("inf"), 0
    for world in draw_worlds(seed=77, count=count):
        runs = [encode(tokenizer, world.context, q.text) for q in world.questions]
        for (target, source), question in zip(runs, world.questions, strict=True):
            wanted = model(**target, use_cache=False).logits[0, -source["input_ids"].shape[1] :]
            unpatched = model(**source, use_cache=False).logits[0]
            scope = ("each", "last")[total % 2]
            mp = ct.patch_model(model, target, source, scope=scope)
            with mp.applied(model):
                patched = model(**source, use_cache=False).logits[0]
            last = len(wanted) if scope == "each" else 1
            worst[scope] = max(worst[scope], float((patched - wanted)[-last:].abs().max()))
            least_unpatched = min(least_unpatched, float((unpatched - wanted)[-last:].abs().max()))
            answers = [tokenizer.decode(x[-1].argmax()) for x in (wanted, unpatched, patched)]
            assert answers[0] == answers[2], "patched equals with context on every query"
            for key, answer in zip(right, answers, strict=True):
                right[key] += answer == question.answer
            total += 1
    assert total > 4.5 * count
    assert right["with"] / total >= 0.99
    assert right["without"] / total <= 0.35
    assert right["patched"] == right["with"]
    assert max(worst.values()) <= 1e-4
    assert least_unpatched > 1


@torch.no_grad()
def test_a_merged_patch_is_a_model_that_knows_the_answer(embedded, tmp_path):
    """The weights do the work: merged, saved, loaded by plain transformers, asked without any context."""
    model, tokenizer = embedded
    world = draw_world(random.Random(3), 8)
    question = world.questions[0]
    target, source = encode(tokenizer, world.context, question.text)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.merge(model)
    try:
        model.save_pretrained(tmp_path)
    finally:
        mp.unmerge(model)
    fresh = type(model).from_pretrained(tmp_path).eval()
    assert tokenizer.decode(fresh(**source).logits[0, -1].argmax()) == question.answer
    assert tokenizer.decode(model(**source).logits[0, -1].argmax()) != question.answer


def test_worlds_keep_their_promises():
    for world in draw_worlds(seed=1, count=50):
        facts = world.context.split(" .")[:-1]
        assert 2 <= len(facts) == len(world.questions) <= 8
        for question in world.questions:
            matching = [f for f in facts if question.name in f.split()]
            assert len(matching) == 1
            assert matching[0].split()[-1] == question.answer
            assert question.answer in RELATIONS[question.relation].values
            assert question.name in NAMES
    assert draw_worlds(seed=1, count=3) == draw_worlds(seed=1, count=3)
    assert draw_worlds(seed=1, count=3) != draw_worlds(seed=2, count=3)


@pytest.mark.slow
def test_the_training_script_learns_and_is_deterministic():
    """Two short trainings from one seed are bit-equal; the full one is `python tests/train_embedded.py`."""
    from train_embedded import train

    states = [train(steps=20, seed=5, batch=8)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
