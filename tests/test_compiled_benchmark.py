"""The benchmark of compiled contexts measures what it says: its sets, its baselines, and that its numbers can be bad."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import hook_count, snapshot, unchanged

from controllability.embedded.world import NAMES
from controllability.errors import BadInput

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import compiled
import compiled_distillation
from compiled_distillation import Distilled, Reached, Training, distil
from compiled_methods import mean_of_token_patches, ridge_on_down_alone
from compiled_sets import HELD_OUT, SETS, draw_task


@pytest.fixture(scope="module")
def task(embedded):
    return draw_task(*embedded, seed=1, facts=3, unrelated=2)


@torch.no_grad()
def test_what_is_wanted_is_what_the_model_says_with_the_context(embedded, task):
    model, tokenizer = embedded
    assert list(task.sets) == list(SETS)
    for name, asked in task.sets.items():
        for sample, wanted, answer in zip(asked.yardstick.samples, asked.yardstick.wanted, asked.answers, strict=True):
            logits = model(torch.tensor([sample.target])).logits[0]
            assert torch.allclose(logits[-len(wanted) :], wanted, atol=1e-4)
            assert int(wanted[-1].argmax()) == answer, "the contextual model is right"
            words = tokenizer.decode(sample.source).split()
            assert words[0] == "<bos>"
            if name not in HELD_OUT:  # those: the next test
                assert len(wanted) == len(words) - (name != "unrelated")


def test_held_out_positions_are_no_beginnings_of_queries(task):
    left_out = 0
    known = {sample.source[: i + 1] for sample in task.queries for i in range(len(sample.source))}
    for name in HELD_OUT:
        yardstick = task.sets[name].yardstick
        for sample, wanted in zip(yardstick.samples, yardstick.wanted, strict=True):
            new = [i for i in range(1, len(sample.source)) if sample.source[: i + 1] not in known]
            assert len(new) == len(wanted) > 0
            left_out += len(sample.source) - 1 - len(wanted)
    assert left_out > 0
    assert task.tokens == len(known)


def test_unrelated_texts_are_about_other_people(embedded):
    _, tokenizer = embedded
    task = draw_task(*embedded, seed=2, facts=8, unrelated=3)
    texts = [set(tokenizer.decode(s.target).split()) for s in task.sets["queries"].yardstick.samples]
    asked = set.union(*texts) & set(NAMES)
    for sample in task.sets["unrelated"].yardstick.samples:
        assert asked.isdisjoint(tokenizer.decode(sample.source).split())


def test_the_measures_can_be_bad(embedded, task):
    model, _ = embedded
    found = task.measure(model)
    assert found["unrelated"] == found["unrelated"] | {"top1_agreement": 1.0, "kl": 0.0, "accuracy": 1.0}
    for name in ("queries", *HELD_OUT):
        assert found[name]["kl"] > 0.5
        assert found[name]["max_logit_error"] > 5
        assert found[name]["accuracy"] < 0.5
    unrelated = task.sets["unrelated"]
    wrong = replace(unrelated, answers=[answer + 1 for answer in unrelated.answers])
    assert wrong.measure(model)["accuracy"] == 0


def test_ridge_on_the_down_projections_fits_the_queries_and_moves_nothing_else(embedded, task):
    model, _ = embedded
    before = snapshot(model)
    changed = ridge_on_down_alone(model, task, 1e-3)
    assert unchanged(model, before)
    assert hook_count(model) == hook_count(changed) == 0
    moved = {name for name, value in changed.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    kl = task.measure(changed)["queries"]["kl"]
    assert kl < 0.1 * task.measure(model)["queries"]["kl"]
    assert kl < task.measure(ridge_on_down_alone(model, task, 10.0))["queries"]["kl"], "a penalty costs"


def test_the_mean_of_token_patches_is_a_mean(embedded, task):
    model, _ = embedded
    once = mean_of_token_patches(model, task)
    twice = mean_of_token_patches(model, replace(task, queries=task.queries * 2))
    names = [name for name, value in once.state_dict().items() if not torch.equal(value, model.state_dict()[name])]
    assert len(names) == 3 * 4, "gate, up, down and the scale of every layer"
    for name in names:
        assert torch.allclose(once.get_parameter(name), twice.get_parameter(name), atol=1e-5)
    assert task.measure(once)["queries"]["kl"] > 0.01, "it is no exact patch"


def test_distillation_says_when_a_kl_was_reached(embedded, task, monkeypatch):
    monkeypatch.setattr(compiled_distillation, "THRESHOLDS", (0.3, 1e-9))
    model, _ = embedded
    before = snapshot(model)
    found = distil(model, task, rank=4, training=Training(1e-2, decays=False), steps=25)
    assert unchanged(model, before)
    assert found.reached.keys() == found.at.keys() == {0.3}
    reached = found.reached[0.3]
    assert 0 < reached.steps < 25
    assert 0 < reached.seconds < found.seconds
    assert 1e-9 < found.final_kl < task.measure(found.at[0.3])["queries"]["kl"] <= 0.3 + 1e-4
    assert found.final.state_dict().keys() == before.keys(), "the adapter is merged"
    moved = {n.split(".", 3)[-1] for n, v in found.final.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {f"mlp.{m}.weight" for m in ("gate_proj", "up_proj", "down_proj")} | {
        "post_feedforward_layernorm.weight"
    }


def test_the_rank_bounds_the_adapter(embedded, task):
    model, _ = embedded
    trained = distil(model, task, rank=2, training=Training(1e-2, decays=True), steps=3).final
    name = "model.layers.1.mlp.up_proj.weight"
    change = (trained.get_parameter(name) - model.get_parameter(name)).double()
    assert int((torch.linalg.svdvals(change) > 1e-5).sum()) == 2


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(compiled, "RIDGES", (1e-3,))
    options = "--worlds 1 --tuning 0 --facts 2 --ranks 2 0 --steps 3 --rates 1e-2"
    monkeypatch.setattr(sys, "argv", ["compiled.py", *options.split()])
    compiled.main()
    found = json.loads(capsys.readouterr().out)
    (task,) = found["tasks"]
    rows = {r["method"]: r for r in task["rows"]}
    assert rows["exact"]["sets"]["queries"]["max_logit_error"] < 1e-3
    assert rows["unpatched"]["sets"]["queries"]["max_logit_error"] > 5
    assert rows["distilled, rank 2, KL 1e-06"]["refused"].startswith("not reached in 3 steps")
    ratio = task["ratios"]["distilled, rank as exact, KL 0.0001"]
    assert ratio["reached"] is False
    spent = rows["distilled, rank as exact, KL 0.0001"]["budget_seconds"]
    assert ratio["ratio"] == pytest.approx(rows["exact"]["seconds"] / spent)
    lines = compiled.reached_table(found["tasks"]).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "| distilled, rank 2, KL 1e-06 | 0/1 | - |" in "".join(lines)
    assert compiled.ratio_table(found["tasks"]).count("1/1 |") == 4, "never reached"


def test_the_choice_is_the_best_on_held_out_questions(embedded, task):
    model, _ = embedded

    def make(model, task, ridge):
        if ridge < 1e-3:
            raise BadInput("too small")
        return ridge_on_down_alone(model, task, ridge)

    method = compiled.Method("down", make, (1e-6, 1e6, 1e-2))
    assert compiled.chosen(method, model, [task]) == 1e-2
    held_out = {r: task.measure(make(model, task, r)) for r in (1e6, 1e-2)}
    assert all(held_out[1e-2][name]["kl"] < held_out[1e6][name]["kl"] for name in HELD_OUT)


def test_the_training_is_the_first_to_reach_each_kl_and_the_lowest_at_the_end(monkeypatch):
    fast, slow, never = (Training(rate, decays=False) for rate in (1e-1, 1e-3, 1e-5))
    how = {fast: ({1e-4: 10, 1e-6: 900}, 5e-7), slow: ({1e-4: 500, 1e-6: 800}, 3e-7), never: ({}, 1e-1)}

    def stub(model, task, rank, training, steps):
        steps_to, final = how[training]
        reached = {threshold: Reached(count, float(count)) for threshold, count in steps_to.items()}
        return Distilled(None, {}, reached, final, final, 1.0)

    monkeypatch.setattr(compiled, "distil", stub)
    assert compiled.tuned(None, [None], 8, (never, fast, slow), 1000) == {1e-4: fast, 1e-6: slow, "final": slow}


def test_a_refusal_is_a_row(embedded, task):
    model, _ = embedded
    refusing = compiled.Method("keeping", lambda model, task, _: compiled.one_set_of_weights(model, task, rank=0))
    assert "rank must be" in compiled.row(refusing, model, task, None)["refused"]
