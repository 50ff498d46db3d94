"""Queries as users have them, with wordings and answers, and what three models answer by themselves, as text."""

from __future__ import annotations

import json
import re

import pytest
import torch
from compiled_facts import ASKED, OTHERWISE, PAIR, Plain, exactly, load
from helpers import snapshot, unchanged
from test_joined_texts import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import controllability as ct
from controllability.cli.main import main
from controllability.compiling import Query, compile_context
from controllability.compiling.answers import continuations, given_in, heard
from controllability.compiling.queries import read_queries
from controllability.compiling.token_sets import Context, Sample
from controllability.models.reading.token_text import text_after, word

BOTH = [Query(ASKED[0], 2, (OTHERWISE[0],), "Oslo", True), Query(ASKED[1], answer="Rome")]


def read(tmp_path, *lines):
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    return read_queries(tmp_path / "queries.jsonl")


def samples_of(queries, heldout=(), **options):
    return exactly(*load(), PAIR, queries, heldout, **options).sets["queries"].samples


def test_the_fields_of_a_line(tmp_path):
    found, notes = read(
        tmp_path, '{"query": "a ?", "wordings": ["b ?"], "answer": "c", "weight": 2, "hard": true}', '{"query": "d"}'
    )
    assert found == [Query("a ?", 2, (), "c", True), Query("b ?", 2, (), "c", True), Query("d")] and notes == []


LINES = {
    '"wordings": "b"': "wordings must be a list of texts, got 'b'",
    '"wordings": [" "]': r"wordings\[0\] is empty",
    '"wordings": ["b", 3]': r"wordings\[1\] must be a text, got int",
    '"answer": ""': "the answer is empty",
    '"answer": 4': "the answer must be a text, got int",
    '"hard": 1': "hard must be true or false, got 1",
    '"wording": []': "unknown field 'wording': the fields are query, weight, wordings, answer and hard",
}


@pytest.mark.parametrize("field", LINES)
def test_a_line_that_cannot_be_used(tmp_path, field):
    with pytest.raises(ct.BadInput, match=f"line 1.*{LINES[field]}"):
        read(tmp_path, f'{{"query": "a", {field}}}')


def test_each_wording_is_a_row_of_the_set_with_the_weight_the_answer_and_the_flag():
    found = samples_of(BOTH, ridge=1.0)
    assert [sample.text for sample in found] == [ASKED[0], OTHERWISE[0], ASKED[1]]
    assert [(sample.weight, sample.hard, sample.answer) for sample in found] == [
        (2, True, "Oslo"), (2, True, "Oslo"), (1, False, "Rome"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "queries",
    [
        [Query(ASKED[0], answer="Oslo"), Query(ASKED[0], answer="Rome")],
        [Query(ASKED[0], answer="Oslo"), Query(ASKED[1], wordings=(ASKED[0] + " ",), answer="Rome")],
        [Query(ASKED[0], answer="Oslo"), Query(ASKED[0].replace(" ", "  "), answer="Rome")],  # the same tokens
    ],
)
def test_two_answers_to_one_query_are_refused_and_named(queries):
    with pytest.raises(
        ct.BadInput, match=r"Where +does.* is given two answers, 'Oslo' and 'Rome': leave one of them out"
    ):
        exactly(*load(), PAIR, queries)


def test_equal_wordings_are_taken_once_and_said():
    queries = [
        Query(ASKED[0], wordings=(ASKED[0], OTHERWISE[0], OTHERWISE[0] + " ")),
        Query(ASKED[1], wordings=(ASKED[0],)),
    ]
    with pytest.warns(UserWarning) as said:
        found = samples_of(queries)
    assert [sample.text for sample in found] == [ASKED[0], OTHERWISE[0], ASKED[1]]
    told = [str(w.message) for w in said]
    assert told == [
        f"the queries hold {ASKED[0]!r} 3 times: it is taken once",
        f"the queries hold {OTHERWISE[0]!r} 2 times: it is taken once",
    ]
    with pytest.raises(ct.BadInput, match=f"the held-out query {re.escape(repr(OTHERWISE[0]))} is one of the queries"):
        exactly(*load(), PAIR, [Query(ASKED[0], wordings=(OTHERWISE[0],))], [OTHERWISE[0]])


def test_the_answer_belongs_to_the_set_and_its_targets_are_the_contextual_models():
    model, tokenizer = load()
    found = exactly(model, tokenizer, PAIR, BOTH)
    yardstick = found.sets["queries"]
    for sample, wanted in zip(yardstick.samples, yardstick.wanted, strict=True):
        text = f"{sample.text} {sample.answer}"
        assert list(sample.source) == tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(tokenizer(f"{PAIR} {text}", return_tensors="pt")["input_ids"]).logits[0]
        assert len(wanted) == len(sample.source) - 1
        assert torch.allclose(wanted, logits[-len(wanted) :], rtol=0, atol=2e-5)
    assert (found.to_dict()["queries"]["right"], found.to_dict()["queries"]["unpatched"]["right"]) == (1.0, 0.0)


def test_an_answer_that_the_context_does_not_give_is_warned_of_by_name():
    queries = [BOTH[0], Query(ASKED[1], answer="Paris")]
    told = f"the context does not say so to this model: {ASKED[1]!r} is to be answered 'Paris', and with the context it says 'Rome .'"
    with pytest.warns(ct.ControllabilityWarning, match=re.escape(told)) as said:
        found = exactly(*load(), PAIR, queries)
    assert len(said) == 1
    sample = found.sets["queries"].samples[-1]
    assert load()[1].decode(sample.source).endswith("Leo live ? Paris")  # what was given stands in the set
    assert found.to_dict()["queries"]["right"] == 1.0  # of those that the contextual model has right
    assert [row["patched"] for row in found.answers()] == ["Oslo", "Oslo", "Rome"]


def test_held_out_queries_have_answers_too_and_they_are_generated():
    model, tokenizer = load()
    heldout = [Query(OTHERWISE[0], answer="Oslo"), OTHERWISE[1]]
    found = compile_context(model, tokenizer, PAIR, ASKED, heldout, answer_tokens=3)
    asked, other = found.sets["heldout"].samples
    assert (asked.answered, other.answered) == (1, 0)
    rows = [row for row in found.answers() if row["set"] == "heldout"]
    assert rows[0]["with_context"] == "Oslo"
    with found.patch.applied(model):
        ids = tokenizer(OTHERWISE[1], return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert rows[1]["patched"] == tokenizer.decode(said)
    assert len(rows[1]["without_context"].split()) == 3  # goes on from its own token, not from the contextual model's
    assert rows[1]["without_context"].split()[0] != rows[1]["with_context"].split()[0]


def test_the_exact_match_is_of_generated_answers():
    model, tokenizer = load()
    found = compile_context(model, tokenizer, PAIR, ASKED, OTHERWISE, answer_tokens=2)
    data = found.to_dict()
    for name in ("queries", "heldout"):
        rows = [row for row in found.answers() if row["set"] == name]
        for who, held in (("patched", data[name]), ("without_context", data[name]["unpatched"])):
            assert held["exact_match"] == sum(row[who] == row["with_context"] for row in rows) / len(rows)
            assert held["right"] is None  # no answer was given
    assert data["queries"]["exact_match"] == 1 > data["queries"]["unpatched"]["exact_match"]


def test_one_batch_says_what_single_runs_say():
    model, tokenizer = load()
    samples = [Context.of(tokenizer, PAIR).sample(text) for text in (*ASKED, *OTHERWISE)]
    joint = continuations(model, samples, [1, 4, 0, 2], "target", frozenset())
    alone = [
        continuations(model, [s], [n], "target", frozenset())[0] for s, n in zip(samples, [1, 4, 0, 2], strict=True)
    ]
    assert joint == alone and [len(said) for said in joint] == [1, 4, 0, 2]
    assert (
        len(continuations(model, samples[:1], [9], "target", frozenset(), len(samples[0].target))[0]) == 1
    )  # the limit


def test_an_answer_ends_where_its_word_or_number_ends():
    assert (
        given_in("4", "4")
        and given_in("Oslo, and", "Oslo")
        and given_in("東京です", "東京")
        and given_in("the  dog", "the dog")
    )
    assert not any(
        given_in(*pair) for pair in (("42", "4"), ("Osloer", "Oslo"), ("", "Oslo"), ("Os", "Oslo"), ("oslo", "Oslo"))
    )


@pytest.mark.parametrize("decoder", [True, False])
def test_answers_are_text_whatever_pieces_the_tokenizer_has(decoder):
    pieces = ["Where", "?", "▁every", "▁day", "s", "."]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    if decoder:
        made.decoder = decoders.Metaspace()
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=made)
    assert text_after(sentencepiece, [0, 1], [2, 3, 4, 5]) == " every days."
    assert heard(sentencepiece, Sample("Where?", (0, 1, 2), (0, 1, 2), 0, answered=1), (2, 3, 4)) == "every days"
    assert word(sentencepiece, 2) == "every"
    bytes_ = byte_tokenizer()
    if not decoder:
        bytes_.backend_tokenizer.decoder = None
    ids = bytes_(" Oslo. Hi", add_special_tokens=False)["input_ids"]
    assert text_after(bytes_, bytes_("Mia lives in")["input_ids"], ids) == " Oslo. Hi"
    assert word(bytes_, ids[0]) == "Oslo"


def test_an_answer_goes_on_from_its_query_with_a_space_unless_one_of_them_brings_white_space():
    context = Context.of(byte_tokenizer(), "Mia lives in Oslo.")
    for query, answer, text in (
        ("Mia", "lives", "Mia lives"),
        ("Where?\n", "Mia", "Where?\nMia"),
        ("Where?", "\nMia", "Where?\nMia"),
    ):
        sample = context.of_query(Query(query, answer=answer))
        assert context.tokenizer.decode([*sample.source[1:], *sample.spelt]) == text
    with pytest.raises(ct.BadInput, match="have 255 tokens and 3 answer tokens; the model has 256 positions"):
        exactly(*load(), PAIR, [Query("Mia " * 244, answer="Oslo .")])


def test_a_rendered_chat_keeps_one_bos_also_where_the_tokenizer_puts_none():
    """What a chat template wrote begins with <bos> in the context and in the query; a tokenizer without one takes it for an anchor."""
    for tokenizer in (byte_tokenizer(), byte_tokenizer(template=False)):
        context = Context.of(tokenizer, "<bos><turn>Mia lives in Oslo.\n")
        for query in ("<turn>Where?\n", "<bos><turn>Where?\n"):
            sample = context.sample(query)
            assert sample.source.count(0) == sample.target.count(0) == 1
            assert tokenizer.decode([*sample.target]) == "<bos><turn>Mia lives in Oslo.\n<turn>Where?\n"
    anchored = Context.of(Plain(), PAIR)
    assert load()[1].decode(anchored.sample("Mia has").source) == "Mia Mia has"  # a word is no mark: it is kept


def test_a_context_beyond_the_position_limit_is_named():
    with pytest.raises(ct.BadInput, match="the context has 301 tokens, and the model 256 positions: there is no room"):
        exactly(*load(), "Mia " * 300, ASKED)


def test_the_model_writes_further_questions_itself():
    model, tokenizer = load()
    before, state = snapshot(model), torch.get_rng_state()
    known = [*ASKED, "in which  city does LEO stay ?"]
    found = ct.further_questions(model, tokenizer, PAIR, 6, known)
    assert 0 < len(found) <= 6 and all(re.fullmatch(r"[A-Z][a-z]+( \w+)+ \?", question) for question in found)
    assert len(set(found)) == len(found) and not {*found} & {*ASKED, "In which city does Leo stay ?"}
    assert (
        ct.further_questions(model, tokenizer, PAIR, 6, known)
        == found
        != ct.further_questions(model, tokenizer, PAIR, 6, known, seed=1)
    )
    assert torch.equal(torch.get_rng_state(), state) and unchanged(model, before)
    assert ct.compile_context(model, tokenizer, PAIR, [*ASKED, *found]).results["queries"].kl < 0.2
    for count in (0, True, 2.0):
        with pytest.raises(ct.BadInput, match=f"a whole number from 1 on, got {count}"):
            ct.further_questions(model, tokenizer, PAIR, count)
    with pytest.raises(ct.BadInput, match="the model has 256 positions"):
        ct.further_questions(model, tokenizer, "Mia " * 240, 1)
    with pytest.raises(ct.BadInput, match="a Linear does not generate"):
        ct.further_questions(torch.nn.Linear(1, 1), tokenizer, PAIR, 1)


def test_further_questions_on_the_command_line(tmp_path, capsys):
    (tmp_path / "queries.txt").write_text("\n".join(ASKED))
    line = [
        "compile",
        "embedded",
        "--context",
        PAIR,
        "--queries",
        str(tmp_path / "queries.txt"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main([*line, "--further-questions", "0"]) == 2
    assert "must be a whole number from 1 on, got 0" in capsys.readouterr().err
    assert main([*line, "--further-questions", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == "controllability: the model wrote 3 further questions: they are among the queries\n"
    asked = [row["query"] for row in json.loads(out)["answers"]]
    assert asked[:2] == ASKED and len({*asked}) == 5
