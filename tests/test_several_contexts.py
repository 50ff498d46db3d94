"""Several contexts in one set of weights, one after the other, and one of them taken out again: as if solved at once. (theory 5, 7)"""

from __future__ import annotations

import contextlib
import functools
import random

import pytest
import torch
from helpers import error, snapshot, unchanged
from test_streaming import Talk, built
from torch.nn.utils.rnn import pad_sequence

import controllability as ct
from controllability.compiling.metric_sweep import drifts
from controllability.compiling.unrelated_texts import ordinary_moments
from controllability.embedded.world import NAMES, RELATIONS
from controllability.models.loading import load_model
from controllability.models.patches import extend as extending

ABOUT = list(RELATIONS)  # four contexts, whose questions begin differently


@functools.cache
def load(dtype):
    return load_model("embedded", dtype)


@functools.cache
def moments(dtype="float32"):
    model, tokenizer = load(dtype)
    return ordinary_moments(model, tokenizer, 96, lambda *_: None, 4096)


def facts(about):
    rng, relation = random.Random(ABOUT.index(about)), RELATIONS[about]
    names, values = rng.sample(NAMES, 3), rng.sample(relation.values, 3)
    context = " ".join(relation.statement.format(name=n, value=v) for n, v in zip(names, values, strict=True))
    return context, [relation.questions[0].format(name=name) for name in names]


def ids(text, special=True):
    return torch.tensor(load("float32")[1](text, add_special_tokens=special)["input_ids"])


def runs(about):
    """(target, source, positions of both) of each question."""
    text, questions = facts(about)
    context = ids(text)
    for question in questions:
        asked = ids(question, False)
        here = torch.arange(1 + len(asked))
        yield (
            torch.cat([context, asked]),
            torch.cat([context[:1], asked]),
            here,
            torch.where(here > 0, here + len(context) - 1, 0),
        )


def at_once(model, contexts, second):
    """One batch of all their questions."""
    return in_one_batch(model, [run for about in contexts for run in runs(about)], via="output", moments=second)


def in_one_batch(model, sequences, **options):
    target, source, here, there = zip(*sequences, strict=True)
    inputs = [
        {"input_ids": pad_sequence(list(rows), batch_first=True), "attention_mask": pad_sequence([r * 0 + 1 for r in rows], batch_first=True)}
        for rows in (target, source)
    ]  # fmt: skip
    longest = torch.arange(max(map(len, here))).expand(len(here), -1)
    positions = longest, pad_sequence(list(there), batch_first=True)
    return ct.patch_model(model, *inputs, scope="all", positions=positions, **options)


def learn(patch, model, about):
    for target, source, here, there in runs(about):
        patch.extend(model, {"input_ids": target[None]}, {"input_ids": source[None]}, positions=(here, there))


def apart(one, other):
    """The largest difference of two patches' changes, beside the change."""
    found = 0.0
    for a, b in zip(one.entries, other.entries, strict=True):
        x, y = (e.delta.left.mT @ e.delta.right if hasattr(e.delta, "right") else e.delta.value for e in (a, b))
        found = max(found, float((x - y).abs().max() / y.abs().max()))
    return found


@torch.no_grad()
def missed(model, patch, about):
    with patch.applied(model):
        found = [model(source[None]).logits[0, here] for _, source, here, _ in runs(about)]
    wanted = [model(target[None]).logits[0, there] for target, _, _, there in runs(about)]
    return max(map(error, found, wanted))


def mode(dtype):
    return ct.exact_mode() if dtype == "float64" else contextlib.nullcontext()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_contexts_one_after_the_other_are_those_contexts_at_once(dtype):
    """They share their first token, which is solved for once; drift grows with what is asked, not with the number of steps."""
    (model, _), second = load(dtype), moments()
    allowed = 1e-9 if dtype == "float64" else 1e-4
    with mode(dtype):
        patch = at_once(model, ABOUT[:1], second)
        drift = {1: max(drifts(model, patch).values())}
        for count in (2, 3, 4):
            learn(patch, model, ABOUT[count - 1])
            drift[count] = max(drifts(model, patch).values())
            assert apart(patch, at_once(model, ABOUT[:count], second)) < allowed
            assert max(missed(model, patch, about) for about in ABOUT[:count]) < allowed
        assert drift[1] < 0.2 and drift[2] < 2 * drift[1] and drift[4] < 3 * drift[1]
        before = [missed(model, patch, about) for about in ABOUT]
        done = patch.unlearn(model, {"input_ids": ids(facts(ABOUT[0])[0])[None]})
        assert done.anew and done.tokens == -sum(len(source) for _, source, *_ in runs(ABOUT[0]))
        assert apart(patch, at_once(model, ABOUT[1:], second)) < allowed
        after = [missed(model, patch, about) for about in ABOUT]
        assert before[0] < allowed < 0.3 < after[0] and max(after[1:]) < allowed
        for about in ABOUT[1:3]:
            patch.unlearn(model, {"input_ids": ids(facts(about)[0])[None]})
        assert apart(patch, at_once(model, ABOUT[3:], second)) < allowed
        learn(patch, model, ABOUT[0])
        assert apart(patch, at_once(model, [ABOUT[3], ABOUT[0]], second)) < allowed


@pytest.mark.parametrize(
    ("family", "via"), [("llama", "input-output"), ("llama", "output"), ("mixtral", "input-output"), ("gptj", "output")]
)
def test_streaming_in_the_metric_is_solving_at_once(family, via):
    """Token by token, nothing solved anew: the same ΔW, whose directions are orthonormal in Σ; without the metric it is another."""
    model, talk = built(family), Talk()
    generator = torch.Generator().manual_seed(1)
    second = ct.second_moments(model, [torch.randint(0, 120, (8, 60), generator=generator)])
    with ct.exact_mode():
        patch = talk.patch(model, 2, via=via, moments=second)
        for count in range(3, 13):
            done = patch.extend(model, talk.target(count), talk.source(count))
            assert (done.tokens, done.grown, done.anew) == (1, True, False)
        whole = talk.patch(model, 12, via=via, moments=second)
        assert apart(patch, whole) < 1e-9 < 1e-2 < apart(patch, talk.patch(model, 12, via=via))
        assert talk.errors(model, patch, 12)[0] < 1e-9
    for entry in patch.entries:
        if entry.param.name in second.metrics and not entry.param.index:
            right = entry.delta.right.double()
            gram = right @ second.metrics[entry.param.name].sigma @ right.mT
            assert torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-9)


@pytest.mark.parametrize("options", [{"ridge": 0.05}, {"rank": 2}, {"ridge": 1e-3, "rank": 3}])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_fit_is_extended_and_unlearns_as_if_solved_at_once(family, options):
    model, one, two = built(family), Talk(2), Talk(3)
    with ct.exact_mode():
        alone, other = one.patch(model, 4, **options), two.patch(model, 5, **options)
        patch = one.patch(model, 3, **options)
        for done in (
            patch.extend(model, one.target(4), one.source(4)),  # goes on
            patch.extend(model, two.target(5), two.source(5), positions=two.pairs(5)),
        ):
            assert done.anew
        sequences = [
            (talk.target(n)["input_ids"][0], talk.source(n)["input_ids"][0], *talk.pairs(n))
            for talk, n in ((one, 4), (two, 5))
        ]
        assert patch.report.fit == alone.report.fit and patch.report.tokens == 11
        assert apart(patch, in_one_batch(model, sequences, **options)) < 1e-9
        assert two.errors(model, patch, 5)[0] < 0.9 * two.errors(model, alone, 5)[0]
        patch.unlearn(model, {"input_ids": torch.cat([one.first, one.context])[None]})
        assert apart(patch, other) < 1e-9


def test_a_fit_of_a_strength_says_why_it_is_not_extended():
    model, tokenizer = load("float32")
    context, questions = facts(ABOUT[0])
    found = ct.compile_context(model, tokenizer, context, questions, moments=moments()).patch
    with pytest.raises(ct.PatchError, match=r"a fit of a strength.*compile another context on top"):
        learn(found, model, ABOUT[1])
    with pytest.raises(ct.PatchError, match="unmerge what is to go"):
        found.unlearn(model, {"input_ids": ids(context)[None]})


def test_queries_of_two_contexts_that_begin_alike_are_refused_and_nothing_is_lost():
    model, one, two = built("llama"), Talk(2), Talk(3)
    two.words = torch.cat([one.words[:2], two.words])
    with ct.exact_mode():
        patch = one.patch(model, 4)
        with pytest.raises(ct.SideConditionFailed) as refused:
            patch.extend(model, two.target(4), two.source(4), positions=two.pairs(4))
        assert refused.value.certificate is not None
        assert one.errors(model, patch, 4)[0] < 1e-9 and patch.report.tokens == 5 and not patch.extensions


def test_a_context_that_another_begins_with_is_told_from_it():
    """A and A with more behind it: taking the first out leaves the second."""
    model, talk = built("llama"), Talk(1)
    longer, other = Talk(1), Talk(2)
    longer.context, longer.words = torch.cat([talk.context, other.context[:3]]), talk.words[20:]
    with ct.exact_mode():
        patch = talk.patch(model, 4)
        here = torch.arange(5)
        there = torch.where(here > 0, here + len(longer.context), 0)
        patch.extend(model, longer.target(4), longer.source(4), positions=(here, there))
        patch.unlearn(model, {"input_ids": torch.cat([talk.first, talk.context])[None]})
        alone = ct.patch_model(model, longer.target(4), longer.source(4), scope="all", positions=(here, there))
        assert apart(patch, alone) < 1e-12


def test_what_cannot_be_unlearned_says_why_and_nothing_is_lost(tmp_path, monkeypatch):
    model, one, two = built("llama"), Talk(2), Talk(3)
    first = {"input_ids": torch.cat([one.first, one.context])[None]}
    before = snapshot(model)
    with ct.exact_mode():
        patch = one.patch(model, 4)
        with pytest.raises(ct.BadInput, match="it stands for nothing else: let the patch go"):
            patch.unlearn(model, first)
        patch.extend(model, two.target(4), two.source(4), positions=two.pairs(4))
        for strange in (two.words[:5], first["input_ids"][0, :-1], one.target(1)["input_ids"][0], one.first):
            with pytest.raises(ct.BadInput, match="no sequence of this patch has it as its context"):
                patch.unlearn(model, {"input_ids": strange[None]})
        with pytest.raises(ct.BadInput, match=r"context: give input_ids of one sequence, \(1, T\)"):
            patch.unlearn(model, {"input_ids": one.context})
        with patch.applied(model), pytest.raises(ct.PatchError, match="before extending or unlearning"):
            patch.unlearn(model, first)
        patch.save(tmp_path / "patch", model)
        with pytest.raises(ct.PatchError, match="does not remember its tokens"):
            ct.load_patch(tmp_path / "patch").unlearn(model, first)

        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(extending, "solve", stop)
            with pytest.raises(KeyboardInterrupt):
                patch.unlearn(model, first)
        assert one.errors(model, patch, 4)[0] < 1e-9 and two.errors(model, patch, 4)[0] < 1e-9
        assert len(patch.extensions) == 1
        patch.unlearn(model, first)
        patched, unpatched = one.errors(model, patch, 4)
        assert patched > 0.1 * unpatched and two.errors(model, patch, 4)[0] < 1e-9
    assert unchanged(model, before)


@torch.no_grad()
def divergence(base, model, about):
    """Mean KL from the base model with the context to ``model`` without it, at the questions' own tokens."""
    found = []
    for target, source, here, there in runs(about):
        wanted = base(target[None]).logits[0, there[1:]].double().log_softmax(-1)
        got = model(source[None]).logits[0, here[1:]].double().log_softmax(-1)
        found.append((wanted.exp() * (wanted - got)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.slow
def test_a_fit_on_top_of_another_and_the_earlier_queries_in_the_metric():
    """Merged one after the other, later contexts wear the first one away; less where its questions are among the ordinary text."""
    (base, tokenizer), second = load("float32"), moments()
    left = {}
    for protected in (False, True):
        model = load_model("embedded")[0]
        before, patches, asked, metric = snapshot(model), [], [], second
        for about in ABOUT:
            if protected and asked:
                worlds = [row[None] for row in asked] * (second.tokens // sum(map(len, asked)))
                own = ct.second_moments(model, worlds)
                metric = type(second)(
                    {n: type(m)(m.second + own.metrics[n].second) for n, m in second.metrics.items()}, 1
                )
            found = ct.compile_context(model, tokenizer, *facts(about), strength="gentle", moments=metric)
            found.patch.merge(model, measured=False)
            patches.append(found.patch)
            asked += [source for _, source, *_ in runs(about)]
            left[protected, len(patches)] = divergence(base, model, ABOUT[0])
        with pytest.raises(ct.PatchError, match="merged after this one: undo that first"):
            patches[0].unmerge(model)
        for patch in reversed(patches):
            patch.unmerge(model)
        assert unchanged(model, before)
    unpatched = divergence(base, base, ABOUT[0])
    assert left[False, 1] == left[True, 1] < 0.05 * unpatched
    assert left[True, 4] < 1.2 * left[True, 1] < 2 * left[True, 1] < left[False, 4] < 0.2 * unpatched
