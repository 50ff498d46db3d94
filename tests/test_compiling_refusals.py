"""What ``ct.compile_context`` refuses, with the reason or a certificate."""

from __future__ import annotations

import random

import numpy as np
import pytest
from compiled_facts import ASKED, PAIR, Plain, exactly, facts, load

import controllability as ct
from controllability.compiling import Query, exact_or_ridge as solving
from controllability.compiling.token_sets import Context
from controllability.embedded.world import vocabulary


def test_more_tokens_than_the_theorem_holds():
    rng, words = random.Random(1), vocabulary()
    texts = [" ".join(rng.choices(words, k=11)) for _ in range(10)]  # 110 tokens at width 96
    with pytest.raises(ct.SideConditionFailed) as refused:
        exactly(*load(), PAIR, texts, via="input-output", ridge=0)
    certificate = refused.value.certificate
    assert certificate.to_dict()["kind"] == "dependent tokens"
    assert "depend on each other" in str(refused.value)


@pytest.mark.slow
def test_more_tokens_than_the_other_theorem_holds():
    rng, words = random.Random(2), vocabulary()
    with pytest.raises(ct.SideConditionFailed) as refused:  # its bound is the hidden width, 256
        exactly(*load(), PAIR, [" ".join(rng.choices(words, k=30)) for _ in range(9)], via="output", ridge=0)
    assert refused.value.certificate.to_dict()["kind"] == "dependent tokens"


def test_keep_rms_refuses_with_a_certificate():
    context, asked, _ = facts(3, 8)
    with pytest.raises(ct.SideConditionFailed) as refused:
        exactly(*load(), context, asked, keep_rms=True, via="output")
    certificate = refused.value.certificate
    assert certificate.to_dict()["kind"] == "farkas"
    assert certificate.holds()
    assert exactly(*load(), PAIR, ASKED, keep_rms=True).exact  # where it can be kept


def test_what_rounding_spoils_is_not_called_exact(monkeypatch):
    monkeypatch.setattr(solving, "tolerance", lambda model: 1e-12)
    with pytest.raises(ct.NotVerified, match="rounding is magnified too much; try float64"):
        exactly(*load(), PAIR, ASKED, ridge=0)
    monkeypatch.setattr(solving, "NEARLY", 1e9)
    found = exactly(*load(), PAIR, ASKED)
    assert (found.exact, found.solution.rounded, found.solution.ridge) == (False, True, 0)
    assert found.results["queries"].max_logit_error < 1e-3
    assert {row["first_token_kept"] for row in found.to_dict()["tried"]} == {True, False}


BAD = {
    "no queries": ((PAIR, []), {}, "there are no queries"),
    "one text": ((PAIR, ASKED[0]), {}, "give a list of texts"),
    "an empty query": ((PAIR, ["  "]), {}, r"queries\[0\] is empty"),
    "a number": ((PAIR, [3]), {}, "must be a text or a Query, got int"),
    "a weight": ((PAIR, [Query("a", 0)]), {}, "a whole number from 1 to 100, got 0"),
    "empty context": (("  ", ASKED), {}, "the context is empty"),
    "no context": (("", ASKED), {}, "the context is empty"),
    "a list for a context": (([PAIR], ASKED), {}, "the context must be a text, got list"),
    "half a character": ((PAIR + " \udcff", ASKED), {}, r"the context cannot be written as UTF-8: character 40 is '.udcff'"),
    "half a query": ((PAIR, ["Wo \ud800 ?"]), {}, r"queries\[0\] cannot be written as UTF-8: character 3 is '.ud800'"),
    "no list": ((PAIR, None), {}, "queries: give a list of texts, got NoneType"),
    "queries with weights in a dict": ((PAIR, {ASKED[0]: 2}), {}, "queries: give a list of texts, got dict"),
    "a query without a text": ((PAIR, [Query(None)]), {}, r"queries\[0\] must be a text, got NoneType"),
    "a weight that is NaN": ((PAIR, [Query("a", float("nan"))]), {}, "a whole number from 1 to 100, got nan"),
    "a weight that is true": ((PAIR, [Query("a", True)]), {}, "a whole number from 1 to 100, got True"),
    "a huge weight": ((PAIR, [Query("a", 10**400)]), {}, "a whole number from 1 to 100, got 1000"),
    "overlap": ((PAIR, ASKED, [" " + ASKED[1]]), {}, "'Where does Leo live [?]' is one of the queries"),
    "same tokens": ((PAIR, ASKED, ["Where  does Leo live ?"]), {}, "has the tokens with which the query"),
    "a beginning": ((PAIR, ASKED, ["Where does"]), {}, "'Where does' has the tokens with which"),
    "too long": ((PAIR, [ASKED[0], "Mia " * 250]), {}, "query 'Mia Mia .* have 261 tokens; the model has 256"),
    "answer too long": ((PAIR, ASKED), {"answer_tokens": 300}, "and 300 answer tokens; the model has 256 positions"),
    "ridge": ((PAIR, ASKED), {"ridge": -1.0}, "ridge λ must be a number from 0 on, got -1"),
    "ridge nan": ((PAIR, ASKED), {"ridge": float("nan")}, "must be a number from 0 on"),
    "ridge true": ((PAIR, ASKED), {"ridge": True}, "must be a number from 0 on, got True"),
    "ridge array": ((PAIR, ASKED), {"ridge": np.array([1.0, 2.0])}, r"must be a number from 0 on, got array\(\[1"),
    "ridge beyond all floats": ((PAIR, ASKED), {"ridge": 10**400}, "must be a number from 0 on, got 1000"),
    "ridge word": ((PAIR, ASKED), {"ridge": "much"}, "must be a number from 0 on"),
    "rank 0": ((PAIR, ASKED), {"rank": 0}, "the rank must be at least 1"),
    "rank of another type": ((PAIR, ASKED), {"rank": 2.0}, "the rank must be a Python int, got 2.0"),
    "keep_rms a word": ((PAIR, ASKED), {"keep_rms": "no"}, "keep_rms must be True or False, got 'no'"),
    "rank above the width": ((PAIR, ASKED), {"rank": 97}, "rank 97 is above the model's width: .* more than 96"),
    "answer tokens": ((PAIR, ASKED), {"answer_tokens": -1}, "answer tokens must be 0 or more, got -1"),
    "via": ((PAIR, ASKED), {"via": "input"}, "unknown via 'input'"),
    "keep and fit": ((PAIR, ASKED), {"keep_rms": True, "ridge": 1.0}, "leave one of them out"),
    "unrelated": ((PAIR, ASKED, [], [" "]), {}, r"unrelated texts\[0\] is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, options, reason = BAD[name]
    with pytest.raises(ct.BadInput, match=reason):
        exactly(*load(), *arguments, **options)


def test_a_tokenizer_that_is_none_or_another_models():
    model, tokenizer = load()
    for wrong, given in (((model, None), "got Gemma3ForCausalLM and NoneType"), ((tokenizer, model), "got Tokenizer")):
        with pytest.raises(ct.BadInput, match=f"give a model of transformers and its tokenizer, {given}"):
            exactly(*wrong, PAIR, ASKED)

    class Larger(Plain):
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [token + 100 for token in self.own(text)["input_ids"]]}

    with pytest.raises(ct.BadInput, match=r"gives token 1\d\d, and the model knows 107: is it another model's"):
        exactly(model, Larger(), PAIR, ASKED)


@pytest.mark.parametrize("weight", [2.0, np.int64(2)])
def test_a_whole_number_of_another_type_is_a_weight(weight):
    found = exactly(*load(), PAIR, [Query(ASKED[0], weight), ASKED[1]], ridge=3.0)
    assert [(type(s.weight), s.weight) for s in found.sets["queries"].samples] == [(int, 2), (int, 1)]


def test_a_context_that_every_query_keeps_is_nothing_to_compile():
    with pytest.raises(ct.BadInput, match="there is nothing to compile"):
        Context.of(Plain(), "Mia")


def test_a_repeated_query_is_taken_once_and_said():
    with pytest.warns(UserWarning, match="hold 'Where does Mia live [?]' 3 times"):
        found = exactly(*load(), PAIR, [ASKED[0], ASKED[0] + " ", ASKED[1], ASKED[0]])
    assert len(found.sets["queries"].samples) == 2
