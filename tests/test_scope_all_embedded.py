"""Eight facts in one set of weights of the embedded model: every position of every question, in float32."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import hook_count, snapshot, unchanged
from safetensors.torch import load_file, save_file

import controllability as ct
from controllability.embedded.world import draw_world
from controllability.models.loading import load_model
from controllability.models.sweep import source_run
from controllability.rules import normalised_jointly as joint_normalised
from controllability.solvers.joint_scale import joint_scale
from controllability.solvers.resorts import Resort

WANTED = 1e-3  # largest logit error
FRESH = Path(ct.__file__).parent / "compiling" / "fresh_process.py"


class Facts(NamedTuple):
    """A world of eight facts as token ids, and what its questions are to give."""

    context: list[int]
    questions: list[list[int]]
    answers: list[str]

    def alone(self, i):
        """Question ``i`` as it is asked without the context: behind the first token of all texts."""
        return torch.tensor([[self.context[0], *self.questions[i]]])

    def places(self, i):
        """Where its tokens stand behind the context."""
        start = len(self.context)
        return [0, *range(start, start + len(self.questions[i]))]

    def wanted(self, model, i):
        return model(torch.tensor([self.context + self.questions[i]])).logits[0, self.places(i)]

    def inputs(self):
        """(target, source, positions) of all questions as one batch, padded on the right."""
        longest, start = max(map(len, self.questions)), len(self.context)
        source, kept = torch.zeros(2, len(self.questions), 1 + longest, dtype=torch.long)
        target, seen = torch.zeros(2, len(self.questions), start + longest, dtype=torch.long)
        for i, question in enumerate(self.questions):
            end = 1 + len(question)
            source[i, :end], kept[i, :end] = self.alone(i)[0], 1
            target[i, : start + len(question)] = torch.tensor(self.context + question)
            seen[i, : start + len(question)] = 1
        there = torch.tensor([0, *range(start, start + longest)])
        return (
            {"input_ids": target, "attention_mask": seen}, {"input_ids": source, "attention_mask": kept},
            (torch.arange(1 + longest), there),
        )  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def facts(tokenizer, seed):
    world = draw_world(random.Random(seed), 8)
    ids = [tokenizer(q.text, add_special_tokens=False)["input_ids"] for q in world.questions]
    return Facts(tokenizer(world.context)["input_ids"], ids, [q.answer for q in world.questions])


def solved(model, known, **options):
    target, source, positions = known.inputs()
    return ct.patch_model(model, target, source, scope="all", positions=positions, **options)


def asked(model, known):
    """Logits of every question, each in a pass of its own."""
    return [model(known.alone(i)).logits[0] for i in range(len(known.questions))]


def off(found, wanted):
    """The largest logit error over all questions and positions."""
    return max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True))


def right(tokenizer, logits, known):
    """How many questions are answered rightly."""
    words = [tokenizer.decode(x[-1].argmax()).strip() for x in logits]
    return sum(word == answer for word, answer in zip(words, known.answers, strict=True))


OTHERS = [pytest.param(4, "input-output", marks=pytest.mark.slow), pytest.param(13, "output", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("seed", "via"), [(0, "input-output"), (3, "output"), *OTHERS])
def test_eight_facts_in_one_set_of_weights(embedded, seed, via):
    """As a batch, one question at a time, and merged."""
    model, tokenizer = embedded
    known, before = facts(tokenizer, seed), snapshot(model)
    wanted = [known.wanted(model, i) for i in range(8)]
    unpatched = asked(model, known)
    mp = solved(model, known, via=via)
    routes = [layer.route for layer in mp.report.layers]
    assert Resort.NEAREST in routes[:-1]
    assert routes[-1] in ("kept rms", Resort.SIZED), "nothing but a norm comes after the last layer"
    with mp.applied(model):
        source = mp.inputs["source"]
        batch = [x[m.bool()] for x, m in zip(model(**source).logits, source["attention_mask"], strict=True)]
        alone = asked(model, known)
    assert off(batch, wanted) <= WANTED
    assert off(alone, wanted) <= WANTED < 5 < off(unpatched, wanted)
    assert (
        right(tokenizer, alone, known) == right(tokenizer, wanted, known) >= 7 > 4 >= right(tokenizer, unpatched, known)
    )
    mp.merge(model, corrected=True)
    merged = asked(model, known)
    mp.unmerge(model)
    assert off(merged, wanted) <= WANTED
    assert right(tokenizer, merged, known) == right(tokenizer, wanted, known)
    assert unchanged(model, before)
    assert hook_count(model) == 0


@pytest.mark.slow  # by default the command does the same: test_merged_weights_for_plain_transformers
def test_a_plain_checkpoint_in_a_fresh_process(embedded, tmp_path):
    """Merged and saved; loaded by plain transformers, which knows nothing of us."""
    model, tokenizer = embedded
    known = facts(tokenizer, 1)
    wanted, unpatched = [known.wanted(model, i) for i in range(8)], asked(model, known)
    mp = solved(model, known)
    mp.merge(model, corrected=True)
    try:
        model.save_pretrained(tmp_path / "merged")
    finally:
        mp.unmerge(model)
    tokenizer.save_pretrained(tmp_path / "merged")
    save_file({str(i): known.alone(i) for i in range(8)}, tmp_path / "ids")
    paths = [str(tmp_path / name) for name in ("merged", "ids", "logits")]
    subprocess.run([sys.executable, str(FRESH), *paths], check=True, capture_output=True)
    fresh = load_file(tmp_path / "logits")
    plain = [fresh[str(i)][0] for i in range(8)]
    assert off(plain, wanted) <= WANTED < 5 < off(unpatched, wanted)
    assert right(tokenizer, plain, known) == right(tokenizer, wanted, known) > right(tokenizer, unpatched, known)


def test_without_making_good_later_rounding_is_magnified(embedded, monkeypatch):
    """The control: every layer exact.  The batch that it was solved on hides it; one question at a time does not."""
    model, tokenizer = embedded
    known = facts(tokenizer, 0)
    wanted = [known.wanted(model, i) for i in range(8)]
    monkeypatch.setattr(source_run, "options_at", lambda joint, *_: replace(joint, read_by="anyone"))
    mp = solved(model, known)
    assert Resort.NEAREST not in {layer.route for layer in mp.report.layers}
    with mp.applied(model):
        alone = asked(model, known)
    assert mp.report.layers[-1].residual < 1e-5
    assert off(alone, wanted) > 100 * WANTED


def test_the_last_layer_alone_is_held_to_its_target(embedded):
    """A layer that is only near its target says so, in its residual and in the route of each token."""
    model, tokenizer = embedded
    mp = solved(model, facts(tokenizer, 0))
    *before, last = mp.report.layers
    near = [layer for layer in before if layer.route == Resort.NEAREST]
    assert near
    assert all(layer.residual > 1e-3 for layer in near)
    assert {route for layer in near for route in layer.tokens.route} == {Resort.NEAREST}
    assert last.residual < 1e-5
    target = mp.target_logits.flatten(0, 1)  # shorter samples begin with NaN
    target = target[~target.isnan().any(-1)]
    assert float((mp.logits[mp.rows.sample, mp.rows.position] - target).abs().max()) <= WANTED


def test_in_float64_every_layer_is_exact():
    """Nothing has to be made good where rounding is small: no layer is only near."""
    model, tokenizer = load_model("embedded", "float64")
    known = facts(tokenizer, 0)
    with ct.exact_mode():
        wanted = [known.wanted(model, i) for i in range(8)]
        mp = solved(model, known)
        with mp.applied(model):
            alone = asked(model, known)
    assert {layer.route for layer in mp.report.layers} <= {"kept rms", "moved rms"}
    assert mp.report.residual < 1e-9
    assert off(alone, wanted) < 1e-6


def test_a_fit_takes_the_nearest_scale(embedded, monkeypatch):
    """Least squares leave something over; a scale that magnifies it a thousandfold (the control) gives nonsense."""
    model, tokenizer = embedded
    known = facts(tokenizer, 0)
    wanted, unpatched = [known.wanted(model, i) for i in range(8)], asked(model, known)

    def fitted(ridge):
        mp = solved(model, known, via="output", ridge=ridge)
        with mp.applied(model):
            return mp, asked(model, known)

    mp, found = fitted(1e-2)
    assert {layer.route for layer in mp.report.layers} == {"nearest"}
    assert off(found, wanted) < 1 < 5 < off(unpatched, wanted)
    assert right(tokenizer, found, known) == right(tokenizer, wanted, known)
    assert off(fitted(1e-4)[1], wanted) < off(found, wanted)

    def exact(task, route, ridge=0.0):
        answer = joint_scale(task.G, task.m, task.square, task.eps, task.stored)
        return joint_normalised.Chosen(answer.scale, answer.before, route)

    monkeypatch.setattr(joint_normalised.ScaleTask, "nearest", exact)
    assert off(fitted(1e-2)[1], wanted) > 5
