"""Texts as tokens: every special token once, and the space that the user wrote between context and query."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from controllability.cli.generate import encoded
from controllability.cli.main import main
from controllability.compiling.token_sets import Context, unrelated_sample
from controllability.models.loading import encode
from controllability.models.tokens import how_joined

WORDS = ["Mia", "Ġlives", "Ġin", "ĠOslo", ".", "Where", "?", "Ġ", "Ċ"]


def byte_tokenizer(ends: bool = False, template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE, for which " Where" is another token than "Where"; <bos> before every text, maybe <eos> behind."""
    letters = sorted({c for word in WORDS for c in word} | {"H", "i"})
    vocabulary, merges = {"<bos>": 0, "<eos>": 1, "<turn>": 2} | {c: i + 3 for i, c in enumerate(letters)}, []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary["ĠWhere"] = len(vocabulary)
    merges.append(("Ġ", "Where"))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if template:
        single = "<bos> $A <eos>" if ends else "<bos> $A"
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": ["<turn>"]}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_that_begins_with_bos_has_one(ends):
    tokenizer = byte_tokenizer(ends)
    text, query = "<bos><turn>Mia lives in Oslo.\n", "Where?"
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert wanted.count(0) == 1
    target, source = encode(tokenizer, text, query)
    asked = tokenizer(query, add_special_tokens=False)["input_ids"]
    assert target["input_ids"][0].tolist() == wanted + asked
    assert source["input_ids"][0].tolist() == asked
    assert source["position_ids"][0].tolist() == list(range(len(wanted), len(wanted) + len(asked)))
    assert encoded(tokenizer, text, 0, 1) == list(unrelated_sample(tokenizer, text).source) == wanted
    context = Context.of(tokenizer, text)
    assert (list(context.tokens), context.lead, context.anchored) == (wanted, (wanted[0],), False)
    for sent in (query, f"<bos>{query}"):
        sample = context.sample(sent)
        assert (
            list(sample.source)
            == [0, *asked]
            == tokenizer(sent, add_special_tokens=False)["input_ids"][-len(asked) - 1 :]
            or sent == query
        )
        assert list(sample.target) == wanted + asked


def test_what_the_user_wrote_is_kept():
    tokenizer = byte_tokenizer(ends=True)
    for text in ("<bos><bos>Mia", "Mia<eos>", "<turn>Mia", "Mia"):
        ids = encode(tokenizer, text, "Where")[0]["input_ids"][0].tolist()[:-1]
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == (own if own[0] == 0 else [0, *own]), text
    plain = byte_tokenizer(template=False)
    assert encode(plain, "<bos>Mia", "Where")[0]["input_ids"][0].tolist()[0] == 0
    assert Context.of(plain, "Mia lives").anchored


@pytest.mark.parametrize("context, query, between", [
    ("Mia lives in Oslo.", " Where?", " "), ("Mia lives in Oslo. ", "Where?", " "), ("Mia lives in Oslo.\n", "Where?", "\n"),
    ("Mia lives in Oslo.", "Where?", ""),
])  # fmt: skip
def test_the_space_between_is_the_users(context, query, between):
    tokenizer = byte_tokenizer()
    target, source = encode(tokenizer, context, query)
    ids = target["input_ids"][0].tolist()
    assert ids == tokenizer(context + query)["input_ids"]
    assert ("ĠWhere" in tokens(tokenizer, ids)) is (between == " ")
    assert torch.equal(target["input_ids"][:, -source["input_ids"].shape[1] :], source["input_ids"])
    assert how_joined(tokenizer, context, query, ids) == {"between": between, "as_one_text": True}


def test_patch_says_how_the_texts_were_joined(capsys):
    for context, query, between, said in (
        ("Mia lives in Oslo .", "Where does Mia live ?", "", "context and query are joined without a space between them; tokenised as one"),
        ("Mia lives in Oslo . ", "Where does Mia live ?", " ", "context and query are joined with ' ' between them\n"),
    ):  # fmt: skip
        command = ["patch", "embedded", "--context", context, "--query", query, "--skip-sensitivity"]
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["joined"] == {"between": between, "as_one_text": between == " "}
        assert main(command) == 0
        assert said in capsys.readouterr().out
