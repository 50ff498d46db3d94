"""One patch for a batch: different lengths, padding on either side, shared beginnings, contradictions; and fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import error, hook_count, snapshot, unchanged

import controllability as ct
from controllability.deltas import ExpertLowRank, LowRank

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from scope_all import MODELS, random_model, relative, task

EXACT = 1e-9
FIRST, LENGTHS = 1, (4, 7, 2)


@pytest.fixture(scope="module")
def small():
    made = {}
    return lambda name: made.setdefault(name, random_model(name, 32, 64, 2))


@pytest.fixture(autouse=True)
def exactly():
    with torch.no_grad(), ct.exact_mode():
        yield


def texts(contexts=(9, 9, 9), seed=0):
    """[(context, query)] as lists of ids: all contexts start with ``FIRST``, all queries are of distinct tokens."""
    ids = (torch.randperm(500, generator=torch.Generator().manual_seed(seed)) + 50).tolist()
    taken = iter(ids)
    return [
        ([FIRST, *(next(taken) for _ in range(long))], [next(taken) for _ in range(length)])
        for long, length in zip(contexts, LENGTHS, strict=True)
    ]


def padded(rows, side):
    """Model inputs (B, L) with an attention mask, and the place of every row's tokens in it."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    places = []
    for i, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
        places.append(list(range(start, start + len(row))))
    # GPT-J's table of angles has float32 numbers: only the same positions give the same states
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if side == "left" else {}
    return {"input_ids": ids, "attention_mask": mask} | positions, places


def joint(model, pairs, side="right", **options):
    """The patch of these (context, query): each query runs behind its first token, which is paired with the target's."""
    source, here = padded([[context[0], *query] for context, query in pairs], side)
    target, there = padded([context + query for context, query in pairs], side)
    there = [[p[0], *p[len(context) :]] for p, (context, _) in zip(there, pairs, strict=True)]
    longest = max(map(len, here))
    source_positions, target_positions = torch.zeros(2, len(pairs), longest, dtype=torch.long)
    for i, (s, t) in enumerate(zip(here, there, strict=True)):
        pads = [p for p in range(longest) if p not in s]  # (B, n) wants as many of each row: padding fills up
        source_positions[i] = torch.tensor([*s, *pads])
        target_positions[i] = torch.tensor([*t, *[t[-1]] * len(pads)])
    return ct.patch_model(
        model, target, source, scope="all", positions=(source_positions, target_positions), **options
    )  # fmt: skip


def logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0]


def alone(model, pairs):
    """[logits of each query alone] and those that it has behind its context."""
    found = [logits(model, [context[0], *query]) for context, query in pairs]
    wanted = [
        logits(model, context + query)[[0, *range(len(context), len(context) + len(query))]] for context, query in pairs
    ]
    return found, wanted


# ------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_sequences_of_different_lengths_share_one_patch(small, name, side):
    """Solved padded on either side, from contexts of different lengths; used on each query alone, without padding."""
    model, pairs = small(name), texts(contexts=(5, 9, 7))
    mp = joint(model, pairs, side)
    assert mp.report.tokens == sum(LENGTHS) + len(LENGTHS), "padding reproduces nothing"
    unpatched, wanted = alone(model, pairs)
    with mp.applied(model):
        patched, _ = alone(model, pairs)
    for found, without, goal in zip(patched, unpatched, wanted, strict=True):
        assert relative(found, goal) <= EXACT < 0.02 < relative(without[1:], goal[1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_reads_both_ways_takes_its_pairs_from_positions(small, side):
    """BERT: all tokens of a sample see each other, and none sees the padding."""
    model, pairs = small("bert"), texts()
    mp = joint(model, pairs, side)
    source, target = mp.inputs["source"], mp.inputs["target"]
    source_positions, target_positions = mp.inputs["positions"]
    rows = torch.arange(len(pairs))[:, None]
    kept = source["attention_mask"][rows, source_positions].bool()
    wanted = model(**target).logits[rows, target_positions][kept]
    unpatched = model(**source).logits[rows, source_positions][kept]
    with mp.applied(model):
        patched = model(**source).logits[rows, source_positions][kept]
    assert relative(patched, wanted) <= EXACT < 0.1 < relative(unpatched, wanted)


def test_the_ends_meet_without_positions(small):
    """Padding on both sides differs: the mask says which tokens are the last ones."""
    model, pairs = small("llama"), texts(contexts=(5, 9, 7))
    source, _ = padded([query for _, query in pairs], "right")
    target, _ = padded([context + query for context, query in pairs], "left")
    mp = ct.patch_model(model, target, source, scope="all")
    wanted = [logits(model, context + query)[len(context) :] for context, query in pairs]
    unpatched = [logits(model, query) for _, query in pairs]
    with mp.applied(model):
        patched = [logits(model, query) for _, query in pairs]
    for found, without, goal in zip(patched, unpatched, wanted, strict=True):
        assert relative(found, goal) <= EXACT < 0.1 < relative(without, goal)


def test_duplicates_and_shared_beginnings_are_accepted(small):
    """Equal state and equal target: three samples of which one stands there twice and one begins like another."""
    context, query = texts()[1]
    pairs = [(context, query), (context, query), (context, [*query[:4], 13, 14])]
    for name in ("llama", "gemma3"):
        model = small(name)
        mp = joint(model, pairs)
        unpatched, wanted = alone(model, pairs)
        with mp.applied(model):
            patched, _ = alone(model, pairs)
        for found, without, goal in zip(patched, unpatched, wanted, strict=True):
            assert relative(found, goal) <= EXACT < 0.02 < relative(without[1:], goal[1:])
        ranks = {e.delta.left.shape[-2] for e in mp.entries if isinstance(e.delta, LowRank)}
        assert max(ranks) <= 1 + len(query) + 2, "a token that stands there twice counts once"


@pytest.mark.parametrize("name", MODELS)
def test_contradictory_duplicates_are_refused_and_both_are_named(small, name):
    """One query behind two contexts: one state, two targets."""
    model, (one, other, third) = small(name), texts()
    pairs = [(one[0], one[1]), (other[0], one[1]), third]
    if name == "bert":
        pairs = pairs[:2]  # another sample would only change the padding
    before = snapshot(model)
    with pytest.raises(ct.SideConditionFailed) as caught:
        joint(model, pairs)
    names = sorted(caught.value.certificate.to_dict()["names"])
    assert len(names) == 2
    first, second = (name.removeprefix(f"sample {i}, position ") for i, name in enumerate(names))
    assert first == second
    assert caught.value.certificate.inputs < 1e-12 < 1e-3 < caught.value.certificate.targets
    for name in names:
        assert name in str(caught.value)
    assert unchanged(model, before)
    assert hook_count(model) == 0


# --------------------------------------------------------------------------------------- fits


def fitted(model, tokens=12, **options):
    """(patch, its error on the set, the unpatched one)."""
    target, source, positions = task(tokens)
    mp = ct.patch_model(model, target, source, scope="all", positions=positions, **options)
    wanted = model(**target).logits[:, positions[1]]
    with mp.applied(model):
        patched = model(**source).logits
    return mp, relative(patched, wanted), relative(model(**source).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_the_error_of_a_ridge_falls_with_it(small, name):
    errors = [fitted(small(name), ridge=ridge)[1] for ridge in (1.0, 1e-2, 1e-4, 1e-6, 1e-8)]
    assert errors == sorted(errors, reverse=True)
    exact, unpatched = fitted(small(name))[1:]
    assert exact <= EXACT < errors[-1] < 1e-4 < 0.05 < errors[0]
    assert errors[1] < unpatched


def sizes(mp):
    """The rank of every ΔW as a dense matrix, the largest of each stack of experts."""
    found = {}
    for entry in mp.entries:
        if isinstance(entry.delta, LowRank):
            dense = entry.delta.dense() if isinstance(entry.delta, ExpertLowRank) else entry.delta.dense()[None]
            found[str(entry.param)] = int(torch.linalg.matrix_rank(dense, rtol=1e-10).max())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_bounds_every_change(small, name):
    model = small(name)
    mp, error_of_three, unpatched = fitted(model, rank=3)
    assert max(sizes(mp).values()) <= 3 < max(sizes(fitted(model)[0]).values())
    assert max(e.delta.left.shape[-2] for e in mp.entries if isinstance(e.delta, LowRank)) <= 3
    assert 1e-3 < error_of_three < unpatched
    assert fitted(model, rank=12)[1] <= EXACT, "as many as there are tokens"


def test_a_full_rank_gives_the_exact_patch(small):
    model = small("llama")
    exact, full = fitted(model)[0], fitted(model, rank=12)[0]
    for one, other in zip(exact.entries, full.entries, strict=True):
        assert one.param == other.param
        assert error(one.delta.dense(), other.delta.dense()) < 1e-9


def test_a_fit_says_that_it_is_one(small):
    model = small("llama")
    assert fitted(model)[0].report.fit is None
    assert "least squares" not in str(fitted(model)[0].report)
    mp, found, _ = fitted(model, ridge=0.5, rank=4)
    assert mp.report.fit == {"ridge": 0.5, "rank": 4}
    assert mp.report.to_dict()["fit"] == {"ridge": 0.5, "rank": 4}
    told = json.loads(json.dumps(mp.report.to_dict()))
    assert type(mp.report).from_dict(told).to_dict() == told
    for text in (str(mp.report), mp.report.table()):
        assert "a fit by least squares (ridge 0.5, rank 4), not exact" in text
        assert f"{mp.report.residual:.2g}" in text.splitlines()[-1]
    assert mp.report.residual > 0.01
    assert found > 0.01
