"""``ct.compile_context``: exact on its queries beside the unpatched model, fits that say so, and the parts it is made of."""

from __future__ import annotations

import json

import pytest
import torch
from compiled_facts import ASKED, OTHERWISE, PAIR, Plain, eight, exactly, facts, load

import controllability as ct
from controllability.compiling import Query, unrelated_texts as unrelated, write as picture
from controllability.compiling.answers import end_tokens, with_answers
from controllability.compiling.exact_or_ridge import rank_of
from controllability.compiling.queries import read_queries
from controllability.compiling.token_sets import Context, Sample, batches, beginnings, padded, positions
from controllability.compiling.yardstick import agreement, logits_of
from controllability.models.loading import load_model
from controllability.models.reading.positions import pair_positions

# ------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("seed", [3, 4])
def test_eight_facts_in_one_set_of_weights(seed):
    context, asked, _ = facts(seed, 8)
    before = {k: v.clone() for k, v in load()[0].state_dict().items()}
    found = eight() if seed == 3 else exactly(*load(), context, asked)
    assert all(torch.equal(v, before[k]) for k, v in load()[0].state_dict().items())
    assert found.exact
    queries = found.results["queries"]  # measured one query at a time, not in the batch that was solved
    assert queries.max_logit_error < 1e-3 < 5 < found.sets["queries"].unpatched.max_logit_error
    assert (queries.top1_agreement, queries.kl < 1e-9) == (1, True)
    assert found.sets["queries"].unpatched.top1_agreement < 0.6
    rows = [row for row in found.answers() if row["set"] == "queries"]
    assert [row["query"] for row in rows] == asked
    assert all(row["patched"] == row["with_context"] in context for row in rows)
    assert not any(row["without_context"] == row["with_context"] for row in rows)
    assert found.tokens == len(
        {tuple(f"<bos> {text}".split()[: i + 1]) for text in asked for i in range(len(text.split()) + 1)}
    )


def test_what_is_not_in_the_set_is_reported_as_it_is():
    found = eight()
    heldout, elsewhere = found.results["heldout"], found.results["unrelated"]
    assert heldout.kl > 1e-3 > 1e-9 > found.results["queries"].kl
    assert elsewhere.max_logit_error > 0.1  # weights changed: other text drifts, and it says so
    assert found.sets["unrelated"].unpatched.max_logit_error == 0
    known = beginnings(found.sets["queries"].samples)
    for sample, wanted in zip(found.sets["heldout"].samples, found.sets["heldout"].wanted, strict=True):
        assert len(wanted) == sum(prefix not in known for prefix in sample.prefixes())


def test_the_report_is_json():
    data = eight().to_dict()
    json.dumps(data, allow_nan=False)
    for name in ("queries", "heldout", "unrelated"):
        for part in (data[name], data[name]["unpatched"]):
            assert {"top1_agreement", "kl", "max_logit_error"} <= set(part)
    assert (data["exact"], data["certificate"], data["ridge"], data["first_tokens"]) == (True, None, 0.0, ["<bos>"])
    assert data["rank"] == rank_of(eight().patch) <= data["tokens"]
    assert [layer["index"] for layer in data["layers"]] == [0, 1, 2]


def test_answer_tokens_are_the_contextual_models_own():
    model, tokenizer = load()
    found = exactly(model, tokenizer, PAIR, ASKED, answer_tokens=3)
    for sample, text in zip(found.sets["queries"].samples, ASKED, strict=True):
        ids = tokenizer(f"{PAIR} {text}", return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist()
        assert list(sample.target) == alone
    assert found.exact
    assert found.results["queries"].positions == 2 * (5 + 3)
    with found.patch.applied(model):  # the compiled model says the whole answer by itself
        ids = tokenizer(ASKED[1], return_tensors="pt")["input_ids"]
        assert model.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist()[-3:] == alone[-3:]


def test_answers_stop_before_the_end_of_the_text():
    model, tokenizer = load()
    sample = Context.of(tokenizer, PAIR).sample(ASKED[0])
    grown = with_answers(model, [sample], 4, frozenset(), lambda *_: None)[0]
    third = grown.target[len(sample.target) + 2]
    stopped = with_answers(model, [sample], 4, frozenset({third}), lambda *_: None)[0]
    assert stopped.target == grown.target[: len(sample.target) + 2]
    assert tokenizer.eos_token_id in end_tokens(model, tokenizer)


def test_without_a_first_token_the_contexts_own_is_the_anchor():
    found = exactly(load()[0], Plain(), PAIR, ASKED, OTHERWISE)
    assert (found.context.anchored, found.first_tokens) == (True, ["Mia"])
    assert found.exact
    assert all(sample.source[0] == sample.target[0] for sample in found.sets["queries"].samples)
    assert found.results["queries"].max_logit_error < 1e-3 < found.sets["queries"].unpatched.max_logit_error


def test_in_float64():
    model = load_model("embedded", "float64")[0]
    with ct.exact_mode():
        found = exactly(model, load()[1], PAIR, ASKED)
    assert found.exact
    assert found.results["queries"].max_logit_error < 1e-12 < 5 < found.sets["queries"].unpatched.max_logit_error


# ------------------------------------------------------------------------------------ least squares


def test_a_positive_ridge_is_a_fit_and_says_so():
    found = exactly(*load(), PAIR, ASKED, ridge=0.1)
    assert (found.exact, found.solution.ridge, found.solution.plan) == (False, 0.1, None)
    assert found.results["queries"].max_logit_error > 1e-3
    assert found.to_dict()["certificate"] is None


def test_a_rank_that_is_too_small_for_the_set_makes_it_a_fit():
    full = rank_of(exactly(*load(), PAIR, ASKED, rank=96).patch)
    found = exactly(*load(), PAIR, ASKED, OTHERWISE, rank=3)
    assert full > rank_of(found.patch) == 3
    assert (found.exact, found.solution.strength) == (False, "strong")
    reasons = [attempt["reason"] for attempt in found.to_dict()["tried"]]
    assert len(reasons) == 2
    assert all(f"the exact patch has rank {full}, more than 3" in reason for reason in reasons)
    with pytest.raises(ct.SideConditionFailed, match=f"has rank {full}, more than 3"):
        exactly(*load(), PAIR, ASKED, rank=3, ridge=0)


def test_a_weight_draws_the_fit_to_its_query():
    def errors(weight):
        found = exactly(*load(), PAIR, [Query(ASKED[0], weight), ASKED[1]], ridge=3.0)
        yardstick = found.sets["queries"]
        return [agreement(x[-1:], y[-1:]).kl for x, y in zip(found.logits["queries"], yardstick.wanted, strict=True)]

    light, heavy = errors(1), errors(30)
    assert heavy[0] < light[0]
    assert heavy[0] / heavy[1] < 0.5 * light[0] / light[1]


def test_smaller_ranks_are_measured_and_the_compiled_one_is_the_last(monkeypatch):
    monkeypatch.setattr(picture, "ranks_below", lambda full: [1, 4])
    found = exactly(*load(), PAIR, ASKED, OTHERWISE)
    rows = picture.measure_by_rank(found, load()[0], lambda *_: None)
    assert [row.rank for row in rows] == [1, 4, rank_of(found.patch)]
    assert rows[-1].results == found.results
    assert rows[0].results["queries"].kl > rows[-1].results["queries"].kl
    assert {"queries", "heldout", "unrelated"} <= set(rows[0].to_dict())


# ------------------------------------------------------------------------------------------ pieces


FILES = {
    "missing": (None, "cannot read the queries file .*: No such file"),
    "empty": (b"", "is empty: write one text a line"),
    "blank": (b" \n\n\t\n", "is empty"),
    "not utf-8": (b"Where\n\xff\xfe", "is not UTF-8: byte 6 is 0xff"),
}
JSONL = {
    "not json": ('{"query": "a"}\n{', "line 2 is not JSON"),
    "a list": ('["a"]', "line 1 has no query"),
    "no query": ('{"text": "a"}', "line 1 has no query"),
    "empty": ('{"query": " "}', "line 1 has no query"),
    "weight": ('{"query": "a", "weight": -1}', "weight must be a whole number from 1 to 100, got -1"),
    "half": ('{"query": "a", "weight": 0.5}', "got 0.5"),
    "nan": ('{"query": "a", "weight": NaN}', "got nan"),
    "half a character": ('{"query": "a\\ud800"}', "line 1: the query cannot be written as UTF-8"),
    "field": ('{"query": "a", "wieght": 2}', "unknown field 'wieght'"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, *JSONL])
def test_a_query_file_that_cannot_be_used(tmp_path, name):
    content, reason = FILES.get(name) or JSONL[name]
    path = tmp_path / ("queries.jsonl" if name in JSONL and name not in FILES else "queries.txt")
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ct.BadInput, match=reason):
        read_queries(path)


def test_query_files(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_bytes("\ufeffWo?\r\n\n  Où ?\nWo?\n".encode())
    found, notes = read_queries(plain)
    assert [query.text for query in found] == ["Wo?", "  Où ?"]
    assert notes == ["the queries hold 'Wo?' 2 times: it is taken once"]
    lines.write_text('{"query": "a", "weight": 3}\n\n{"query": "b"}\n')
    assert read_queries(lines) == ([Query("a", 3), Query("b", 1)], [])


def test_token_sets_pair_each_token_with_its_own():
    samples = [Sample("a", (1, 7, 8), (1, 5, 5, 5, 7, 8), 1), Sample("b", (1, 7), (1, 5, 5, 5, 7), 1)]
    source, target = positions(samples)
    assert (source.tolist(), target.tolist()) == ([0, 1, 2], [0, 4, 5])
    assert positions(samples, pinned=False)[1].tolist() == [4, 5]
    inputs = padded(samples, "source")
    assert inputs["input_ids"].tolist() == [[1, 7, 8], [1, 7, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in padded(samples[:1], "target")
    rows = [pair_positions(padded(samples, "target"), inputs, "all", positions(samples))[i].named() for i in (0, 1)]
    assert rows[0] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]  # padding is no token of the set
    assert rows[1] == [[0, 0], [0, 4], [0, 5], [1, 0], [1, 4]]
    assert len(beginnings(samples)) == 3
    assert [len(batch) for batch in batches(samples * 3, "target", room=12)] == [2, 2, 2]


def test_padding_changes_no_logit():
    model, tokenizer = load()
    context = Context.of(tokenizer, PAIR)
    samples = [context.sample(text) for text in (*ASKED, "In which city does Mia stay ?")]
    for joint, alone in zip(logits_of(model, samples), logits_of(model, samples, alone=True), strict=True):
        assert torch.allclose(joint, alone, rtol=0, atol=2e-5)


def test_agreement_can_fail():
    wanted = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    found = agreement([torch.tensor([[0.0, 2.0], [0.0, 1.0]])], wanted)
    p = 1 / (1 + torch.tensor(-2.0).exp().item())
    assert (found.top1_agreement, found.max_logit_error, found.relative_error, found.positions) == (0.5, 2, 1, 2)
    assert found.kl == pytest.approx((2 * p - 1) * 2 / 2)
    with pytest.raises(ct.NotVerified, match="not finite"):
        agreement([wanted[0] * torch.nan], wanted)
    with pytest.raises(ct.BadInput, match="no position to compare"):
        agreement([wanted[0][:0]], [wanted[0][:0]])


def test_texts_that_have_nothing_to_do_with_the_context():
    _, tokenizer = load()
    samples = unrelated.unrelated_samples(tokenizer, [], PAIR, ASKED, 256)
    assert len(samples) == unrelated.COUNT
    assert all(sample.source == sample.target for sample in samples)
    assert not any("Mia lives in Oslo" in s.text or "Leo lives in Rome" in s.text for s in samples)
    assert all(tokenizer.unk_token_id not in sample.source for sample in samples)

    class Strange(Plain):
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [self.own.unk_token_id] * 5}

    drawn = unrelated.unrelated_samples(Strange(), [], PAIR, ASKED, 256)
    assert not set(drawn[0].source) & set(tokenizer.all_special_ids)

    class English(Plain):
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [5, 6, 7]}

    assert [s.text for s in unrelated.unrelated_samples(English(), [], PAIR, ASKED, 256)] == [*unrelated.SENTENCES]
