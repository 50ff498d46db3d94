"""Ordinary text when nobody gives any: pages that the vocabulary knows and, as much again, what the model writes by itself."""

from __future__ import annotations

import pytest
import torch
from helpers import snapshot, unchanged
from test_moments import llama

import controllability as ct
from controllability.compiling import unrelated_texts
from controllability.compiling.unrelated_texts import FEWEST, OWN_LENGTH as LENGTH, ordinary_moments
from controllability.models.loading import load_model


class Words:
    """A tokenizer that knows every word (as one of 50 numbers), or none; ``lead`` stands before every text."""

    all_special_ids, unk_token_id, eos_token_id = (0, 1), 0, 1

    def __init__(self, knows=True, lead=(2,)):
        self.knows, self.lead = knows, lead

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [3 + sum(map(ord, word)) % 47 if self.knows else 0 for word in text.split()]
        return {"input_ids": [*(self.lead if add_special_tokens else ()), *ids]}

    def __len__(self):
        return 60


def read(monkeypatch, model, tokenizer, *given, **options):
    """(the strings, the rows of ids (n, T)) that the moments are made of."""
    seen = []

    def spy(model, texts, *rest, **options):
        seen.extend(texts)
        return ct.second_moments(model, [row for row in seen if not isinstance(row, str)] or [torch.arange(40)])

    monkeypatch.setattr(unrelated_texts, "second_moments", spy)
    ordinary_moments(model, tokenizer, None, lambda *_: None, *given, **options)
    rows = [row for row in seen if not isinstance(row, str)]
    return [text for text in seen if isinstance(text, str)], torch.cat(rows) if rows else torch.zeros(0, 0)


def test_half_pages_and_half_what_the_model_writes(monkeypatch):
    model, tokenizer = llama(), Words()
    before, state = snapshot(model), torch.get_rng_state()
    pages, rows = read(monkeypatch, model, tokenizer)
    assert unchanged(model, before) and torch.equal(torch.get_rng_state(), state)
    counted = sum(len(tokenizer(page)["input_ids"]) for page in pages)
    assert FEWEST <= counted < FEWEST + 1000 and abs(rows.numel() - FEWEST) < 1000
    assert 2 * FEWEST <= counted + rows.numel() < 2 * FEWEST + LENGTH
    assert rows.shape[1] == LENGTH and (rows[:, 0] == 2).all()
    assert torch.equal(read(monkeypatch, model, tokenizer)[1], rows), "always the same"
    fewer = read(monkeypatch, model, tokenizer, 800)
    assert abs(sum(len(tokenizer(page)["input_ids"]) for page in fewer[0]) - 400) < 400 and len(fewer[1]) < 6


def test_tokens_are_drawn_as_the_model_gives_them():
    """Whatever its generation config would have: here the likeliest token alone, and an early end."""
    model = llama()
    model.generation_config.update(top_k=1, temperature=0.01, repetition_penalty=5.0, eos_token_id=7)
    rows = unrelated_texts._written(model, Words(), 4000, 2, lambda *_: None)
    with torch.no_grad():
        logits = model(torch.tensor([[2]])).logits[0, -1]
    logits[7] = -torch.inf  # what ends a text is not drawn
    wanted, found = logits.softmax(-1), rows[:, 1].bincount(minlength=60) / 4000
    assert found.max() < 0.5 and wanted.max() < 0.5
    assert (found - wanted).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert rows.shape == (4000, 2) and found[7] == 0


def test_without_a_first_token_texts_begin_anywhere(monkeypatch):
    rows = read(monkeypatch, llama(), Words(lead=()))[1]
    assert len(rows[:, 0].unique()) > 10 and not {0, 1} & set(rows[:, 0].tolist())


def test_what_knows_no_page_gets_its_own_writing_alone(monkeypatch):
    pages, rows = read(monkeypatch, llama(), Words(knows=False))
    assert not pages and 2 * FEWEST <= rows.numel() < 2 * FEWEST + LENGTH


def test_a_model_that_cannot_write_gets_pages_alone_and_random_tokens_else(monkeypatch):
    model = llama()
    monkeypatch.setattr(type(model), "can_generate", lambda *_: False)
    pages, rows = read(monkeypatch, model, Words())
    assert not rows.numel() and sum(len(page.split()) + 1 for page in pages) >= 2 * FEWEST
    pages, rows = read(monkeypatch, model, Words(knows=False))
    assert not pages and rows.numel() >= 2 * FEWEST and len(rows.unique()) == 58


def test_pages_that_hold_the_context_are_left_out(monkeypatch):
    pages = read(monkeypatch, llama(), Words())[0]
    context = " ".join(pages[3].split()[5:25])
    others = read(monkeypatch, llama(), Words(), without=context)[0]
    assert pages[3] not in others and others[:3] == pages[:3]


def test_the_embedded_model_gets_worlds_of_facts(monkeypatch):
    model, tokenizer = load_model("embedded")
    pages, rows = read(monkeypatch, model, tokenizer)
    assert not rows.numel() and all(" ." in page and "?" not in page for page in pages)


def test_as_many_tokens_as_the_widest_matrix_reads(monkeypatch):
    monkeypatch.setattr(unrelated_texts, "FEWEST", 10)
    rows = read(monkeypatch, llama(), Words(knows=False))[1]
    assert 2 * 48 <= rows.numel() < 2 * 48 + LENGTH
    monkeypatch.setattr(unrelated_texts, "MOST", 20)
    assert 40 <= read(monkeypatch, llama(), Words(knows=False))[1].numel() < 40 + LENGTH


def test_compiling_makes_them_without_the_context(monkeypatch):
    model, tokenizer = load_model("embedded")
    seen = []
    monkeypatch.setattr(unrelated_texts, "_texts", lambda *given: seen.append(given[4]) or iter([torch.arange(3, 60)]))
    with pytest.warns(ct.ControllabilityWarning, match="57 tokens"):
        ct.compile_context(model, tokenizer, "Mia lives in Oslo .", ["Where does Mia live ?"])
    assert seen == ["Mia lives in Oslo ."]
