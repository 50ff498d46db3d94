"""Increments sum to the patch, shares to 1; the fact that answers has the largest; what is not as it should be is said."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from family_models import build
from helpers import exactly, snapshot, tiny_gemma, unchanged
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import controllability as ct
from controllability.embedded.world import draw_world
from controllability.errors import BadInput
from controllability.instrument.interventions import rank_correlation
from controllability.models.sweep.shared_past import CroppedPast

FACTS = ["Mia lives in Oslo .", "Leo lives in Rome .", "Ana has a cat .", "Tom has a dog ."]
CONTEXT, QUERY = " ".join(FACTS), "Where does Leo live ?"
TOKENIZER = ct.load_model("embedded")[1]


def attribute(model, context=CONTEXT, query=QUERY, **options):
    return ct.attribute(model, TOKENIZER, context, query, **({"ablations": 0} | options))


def ids_of(context, query=QUERY):
    return torch.tensor([TOKENIZER(f"{context} {query}" if context else query)["input_ids"]])


def whole(model, route="secular", context=CONTEXT):
    """The patch by itself, without a cache and without the instrument."""
    target, source = ids_of(context), ids_of("")
    count, shift = source.shape[1], target.shape[1] - source.shape[1]
    at = list(range(1, count)), list(range(1 + shift, count + shift))
    return ct.patch_model(model, {"input_ids": target}, {"input_ids": source}, route=route, positions=at)


def logprob(model, context, answer):
    with torch.no_grad():
        said = model(ids_of(context)).logits[0, -1].log_softmax(-1)
    return float(said[TOKENIZER(answer, add_special_tokens=False)["input_ids"][0]])


MODELS = {
    "embedded": lambda: ct.load_model("embedded", dtype="float64")[0],
    "window of 8": lambda: tiny_gemma(layers=4, vocab=len(TOKENIZER), dtype=torch.float64),
}


@pytest.mark.parametrize("order", ["forward", "backward", "all", (2, 0, 3, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_increments_sum_to_the_patch_that_was_made_by_itself(name, order):
    model = MODELS[name]()
    before = snapshot(model)
    with exactly(torch.float64):
        found, wanted = attribute(model, order=order), whole(model)
    assert unchanged(model, before)
    assert len(found.orders) == (24 if order == "all" else 1)
    for parameter in found.parameters:
        matrix = wanted.delta(parameter, token=-1).matrix
        for o in range(len(found.orders)):
            total = sum(found.increment(i, parameter, o).matrix for i in range(4))
            assert float((total - matrix).norm() / matrix.norm()) <= 1e-12, parameter
    assert found.residual <= 1e-14
    assert float((found.shares.sum(-1) - 1).abs().max()) <= 1e-12
    for layer in (None, *found.layers):
        assert float(found.score(layer).sum()) == pytest.approx(1, abs=1e-12)


def test_an_increment_is_the_difference_of_two_patches():
    model = MODELS["window of 8"]()
    with exactly(torch.float64):
        found = attribute(model)
        steps = [whole(model, context=" ".join(FACTS[:n])) for n in (1, 2, 3)]
    for row, parameter in enumerate(found.parameters):
        one, two, three = (step.delta(parameter, token=-1).matrix for step in steps)
        for chunk, wanted in ((0, one), (1, two - one), (2, three - two)):
            change = found.increment(chunk, parameter)
            assert float((change.matrix - wanted).norm() / three.norm()) < 1e-12
            assert change.norm == pytest.approx(float(wanted.norm()), rel=1e-6)
            assert float(found.norms[0, row, chunk]) == pytest.approx(float(wanted.norm()), rel=1e-6)
        share = float((wanted * found.patch(parameter).matrix).sum() / found.patch(parameter).matrix.norm() ** 2)
        assert float(found.shares[0, row, 2]) == pytest.approx(share, abs=1e-9)


def test_the_path_is_the_models_own_with_each_context():
    model = MODELS["embedded"]()
    forward, backward = attribute(model), attribute(model, order="backward")
    for i in range(5):
        assert float(forward.logprobs[0, i]) == pytest.approx(logprob(model, " ".join(FACTS[:i]), "Rome"), abs=1e-4)
        assert float(backward.logprobs[0, i]) == pytest.approx(logprob(model, " ".join(FACTS[i:]), "Rome"), abs=1e-4)
    assert forward.answer == "Rome"


def test_orders_differ_and_spread_says_by_how_much():
    model = MODELS["embedded"]()
    every, forward = attribute(model, order="all"), attribute(model)
    assert float(forward.spread().max()) == 0 < float(every.spread().max())
    assert every.orders[0] == (0, 1, 2, 3)
    assert torch.allclose(every.shares[0], forward.shares[0], atol=1e-4)  # its first order is the forward one
    drawn = [attribute(model, order="all", chunks="token", permutations=3, seed=s).orders for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({*drawn[0]}) == 3


def test_the_fact_that_answers_has_the_largest_share():
    """And a question whose answer is elsewhere has another: the negative control."""
    model, rng, right, other = ct.load_model("embedded")[0], random.Random(3), 0, 0
    for _ in range(12):
        world = draw_world(rng, 8)
        question = rng.choice(world.questions)
        found = attribute(model, world.context, question.text, order="all", permutations=4)
        best = found.chunks[int(found.score(1).argmax())]
        right += question.name in best.text.split()
        other += rng.choice([q for q in world.questions if q.name != question.name]).name in best.text.split()
    assert right >= 11 and other <= 2


def test_interventions_are_contexts_without_chunks():
    model = MODELS["embedded"]()
    found = attribute(model, ablations=9, seed=1)
    beside = found.interventions
    full = logprob(model, CONTEXT, "Rome")
    for i, fall in enumerate(beside.leave_one_out):
        left = " ".join(fact for k, fact in enumerate(FACTS) if k != i)
        assert fall == pytest.approx(full - logprob(model, left, "Rome"), abs=1e-4)
    for kept, value in zip(beside.kept, beside.logprobs, strict=True):
        assert value == pytest.approx(logprob(model, " ".join(FACTS[i] for i in kept), "Rome"), abs=1e-4)
    assert max(range(4), key=beside.leave_one_out.__getitem__) == 1
    first = beside.drops["leave one out"]
    assert first[1] == pytest.approx(beside.leave_one_out[1]) and {*first} == {1, 2, 3}
    predicted = [sum(beside.leave_one_out[i] for i in kept) for kept in beside.kept]
    assert beside.lds["leave one out"] == rank_correlation(predicted, beside.logprobs)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1 and rank_correlation([1, 1], [1, 2]) is None
    assert attribute(model).interventions is None


def test_an_answer_of_several_tokens_counts_with_all_of_them():
    model = MODELS["embedded"]()
    found = attribute(model, answer="Rome . Leo")
    ids = torch.cat(
        [ids_of(CONTEXT), torch.tensor([TOKENIZER("Rome . Leo", add_special_tokens=False)["input_ids"]])], 1
    )
    with torch.no_grad():
        said = model(ids).logits[0].log_softmax(-1)
    wanted = sum(float(said[i - 1, ids[0, i]]) for i in (-3, -2, -1))
    assert float(found.logprobs[0, -1]) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "chunks", ["sentence", "token", "line", FACTS, [f"{fact} " for fact in FACTS], lambda text: text.split()]
)
def test_chunks_are_characters_of_the_text_and_tokens_of_the_run(chunks):
    context = CONTEXT.replace("Rome . ", "Rome .\n") if chunks == "line" else CONTEXT
    found = attribute(ct.load_model("embedded")[0], context, chunks=chunks)
    assert found.chunks[-1].tokens.stop == len(TOKENIZER(context)["input_ids"])
    for before, after in zip(found.chunks, found.chunks[1:], strict=False):
        assert before.tokens.stop == after.tokens.start and before.stop <= after.start
        assert not context[before.stop : after.start].strip()
    for chunk in found.chunks:
        assert context[chunk.start : chunk.stop] == chunk.text
        own = TOKENIZER(chunk.text, add_special_tokens=False)["input_ids"]
        assert own == [found.solved.reading.ids[t] for t in chunk.tokens]
    assert len(found.chunks) == {"sentence": 4, "line": 2, "token": 20}.get(
        chunks if isinstance(chunks, str) else "", len(found.chunks)
    )


def test_one_run_over_the_context_serves_every_beginning_of_it():
    model, lengths = MODELS["embedded"](), []
    with model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape), with_kwargs=True
    ):
        attribute(model)  # what is tried once on a model is known then
        lengths.clear()
        found = attribute(model)
    context = len(found.solved.reading.ids)
    assert sum(length > context for _, length in lengths) == 1, lengths
    assert not found.notes and found.tokens < 3 * found.plain


def test_a_model_whose_cache_cannot_be_cropped_is_run_anew_and_says_so(monkeypatch):
    model = MODELS["window of 8"]()
    with exactly(torch.float64):
        cropped = attribute(model)
        of = CroppedPast.of
        monkeypatch.setattr(CroppedPast, "of", staticmethod(lambda *given: (None, of(*given)[1][:1])))
        found = attribute(model)
    assert "cannot be cropped" in found.notes[0] and found.tokens > cropped.tokens
    assert torch.allclose(found.shares, cropped.shares, atol=1e-10)


def test_a_cache_that_is_no_plain_one_is_never_cropped():
    model = build("jamba")
    past, logits = CroppedPast.of(model, [3, 4, 5, 6], [7, 8], 1)
    assert past is None and logits.shape[:2] == (1, 2)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "jamba"])
def test_a_model_with_states_in_place_of_a_cache_is_run_anew_and_says_at_what_cost(family):
    model = build(family)
    with exactly(torch.float64):
        found = attribute(model, order="forward")
    cost = f"{found.tokens / found.plain:.1f} times the tokens of a plain run"
    assert cost in found.notes[0] and "cannot be cropped" in str(found) and found.tokens > 3 * found.plain
    assert found.residual <= 1e-12


def without_first_token():
    """The same tokenizer, which puts nothing before a text."""
    settings = json.loads(TOKENIZER.backend_tokenizer.to_str()) | {"post_processor": None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, without_first_token()], ids=["first token", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gptj"])
@pytest.mark.parametrize("options", [{}, {"order": "backward"}, {"place": "mixer"}], ids=str)
def test_other_families(family, tokenizer, options):
    model = build(family, dtype=torch.float64)
    with exactly(torch.float64):
        found = ct.attribute(model, tokenizer, CONTEXT, QUERY, ablations=0, **options)
    assert found.residual <= 1e-13 and not found.notes
    live = found.whole > 0
    assert bool(live.any()) and float((found.shares[:, live].sum(-1) - 1).abs().max()) <= 1e-12
    for row, parameter in enumerate(found.parameters):
        change = found.increment(2, parameter)
        assert change.norm == pytest.approx(float(change.matrix.norm()), rel=1e-6, abs=1e-12)
        assert float(found.norms[0, row, 2]) == pytest.approx(change.norm, rel=1e-6, abs=1e-12)


BAD = [
    ({"chunks": FACTS[:3]}, "do not make up the context"),
    ({"chunks": [*FACTS[1:], FACTS[0]]}, "does not follow"),
    ({"chunks": [FACTS[0], " ", *FACTS[1:]]}, "chunk 1 is empty"),
    ({"chunks": [CONTEXT]}, "one chunk"),
    ({"chunks": "word"}, "choose sentence, line or token"),
    ({"chunks": 3}, "list of texts"),
    ({"context": "Mia lives in Oslo ."}, "one chunk"),
    ({"context": " "}, "the context is empty"),
    ({"query": "  "}, "the query is empty"),
    ({"query": None}, "must be a text"),
    ({"order": "sideways"}, "choose forward, backward, all"),
    ({"order": [0, 1]}, "permutation of 0 … 3"),
    ({"order": [0, 1, 1, 2]}, "permutation"),
    ({"order": "all", "permutations": 25}, "4 chunks have 24 orders, got 25"),
    ({"order": "all", "permutations": 0}, "got 0"),
    ({"permutations": 3}, "belongs to order='all'"),
    ({"ablations": -1}, "ablations"),
    ({"ablations": True}, "ablations"),
    ({"token": 6}, "the query has tokens 0 to 4"),
    ({"token": "last"}, "got 'last'"),
    ({"place": "nowhere"}, "nowhere"),
    ({"route": "shortest"}, "shortest"),
    ({"answer": ""}, "the answer is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_clear_error(given, words):
    model = ct.load_model("embedded")[0]
    before = snapshot(model)
    with pytest.raises(BadInput, match=words):
        attribute(model, **given)
    assert unchanged(model, before)


def test_layers_and_increments_that_are_not_there():
    found = attribute(ct.load_model("embedded")[0])
    for wrong, words in ((lambda: found.score(9), "layer 9"), (lambda: found.increment(4, found.parameters[0]), "chunks 0 to 3"),
                         (lambda: found.increment(0, "w"), "no parameter 'w'")):  # fmt: skip
        with pytest.raises(BadInput, match=words):
            wrong()


def test_the_table_the_records_and_the_json_say_the_same():
    found = attribute(ct.load_model("embedded")[0], ablations=4)
    data, records = found.to_dict(), found.records()
    assert [chunk["text"].strip() for chunk in data["chunks"]] == FACTS
    assert math.isclose(data["chunks"][1]["shares"]["layer 1"], float(found.score(1)[1]))
    assert len(records) == len(found.parameters) * 4 and "rank correlation with 4" in str(found)
    assert sum(row["share"] for row in records if row["parameter"] == found.parameters[-1]) == pytest.approx(1)


def test_what_misses_its_target_is_refused():
    model = ct.load_model("embedded")[0]
    noisy = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, y: y + 0.1 * torch.randn_like(y))
    with noisy, pytest.raises(ct.ControllabilityError):
        attribute(model)
