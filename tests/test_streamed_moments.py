"""Second moments of a stream of texts: nothing is held, an interrupted run goes on to the bit, and too few tokens are named."""

from __future__ import annotations

import copy
import json
import struct
import warnings

import numpy as np
import pytest
import torch
from test_moments import TEXTS, llama

import controllability as ct
from controllability.models.loading import load_model
from controllability.models.moments import SHRINK, Metric, Moments

SENTENCES = [
    f"{name} lives in {city} ." for name in ["Mia", "Leo", "Ana", "Tom", "Eva"] for city in ["Oslo", "Rome", "Paris"]
] * 20


def same(one, other):
    return one.tokens == other.tokens and all(
        torch.equal(one.metrics[name].second, metric.second) for name, metric in other.metrics.items()
    )


class Interrupted:
    """A progress that ends the run after ``count`` texts, as Ctrl-C does."""

    def __init__(self, count):
        self.count = count

    def __call__(self, stage, done, total):
        self.count -= 1
        if not self.count:
            raise KeyboardInterrupt


def texts(seed=0, count=7):
    return [torch.randint(3, 50, (40,), generator=torch.Generator().manual_seed(seed + s)) for s in range(count)]


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    model, path = llama(), tmp_path / "moments.safetensors"
    whole = ct.second_moments(model, texts())
    for count in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            ct.second_moments(model, texts(), save=path, progress=Interrupted(count + 2))
        with pytest.raises(ct.PatchError, match=r"unfinished \(.* tokens\).* goes on from there"):
            ct.load_moments(path, model)
    ran = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: ran.append(1), with_kwargs=True)
    found = ct.second_moments(model, iter(texts()), save=path)
    hook.remove()
    assert len(ran) == 7 - 5, "what is on disk is not run again"
    assert same(found, whole) and same(ct.load_moments(path, model), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    before = path.read_bytes()
    assert same(ct.second_moments(model, texts(), save=path), whole) and path.read_bytes() == before
    assert same(ct.second_moments(model, texts(count=9), save=path), ct.second_moments(model, texts(count=9)))


def test_an_interrupt_in_the_middle_of_the_layers_spoils_nothing(tmp_path):
    model, path = llama(), tmp_path / "moments.safetensors"
    with pytest.raises(KeyboardInterrupt):
        ct.second_moments(model, texts(), save=path, progress=Interrupted(3))
    known = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ct.second_moments(model, texts(), save=path)
    hook.remove()
    assert path.read_bytes() == known
    assert same(ct.second_moments(model, texts(), save=path), ct.second_moments(model, texts()))


def test_what_is_read_before_a_bad_text_is_kept(tmp_path):
    model, path = llama(), tmp_path / "moments.safetensors"
    with pytest.raises(ct.BadInput, match="got int"):
        ct.second_moments(model, [*texts(count=3), 3], save=path)
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    ct.second_moments(model, texts(count=4), save=path)
    hook.remove()
    assert len(ran) == 1


def test_a_file_of_other_texts_or_another_model_is_not_gone_on_from(tmp_path):
    model, path = llama(), tmp_path / "moments.safetensors"
    ct.second_moments(model, texts(), save=path)
    before = path.read_bytes()
    for other in (texts(1), texts(count=3), [t.reshape(2, 20) for t in texts()]):
        with pytest.raises(ct.BadInput, match="begun on other texts: give a new file, or the same texts"):
            ct.second_moments(model, other, save=path)
    with pytest.raises(ct.PatchError, match="are of other weights"):
        ct.second_moments(llama(1), texts(), save=path)
    with pytest.raises(ct.PatchError, match="are of other weights"):
        ct.load_moments(path, llama(1))
    assert path.read_bytes() == before
    kept = ct.save_moments(ct.second_moments(model, texts()), tmp_path / "kept.safetensors", model)
    with pytest.raises(ct.PatchError, match="of texts that it does not remember"):
        ct.second_moments(model, texts(), save=kept)
    with pytest.raises(ct.PatchError, match="cannot write to"):
        ct.second_moments(model, texts(), save=tmp_path / "kept.safetensors" / "below")


@pytest.mark.parametrize("name", ["tokens", "runs"])
def test_numbers_in_a_forged_file_are_refused(tmp_path, name):
    model, path = llama(), tmp_path / "moments.safetensors"
    ct.second_moments(model, texts(), save=path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + length])
    for wrong in ("9" * 5000, "-1", "1e3", ""):
        head["__metadata__"][name] = wrong
        text = json.dumps(head).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        with pytest.raises(ct.PatchError, match="holds no second moments"):
            ct.load_moments(path, model)


def test_an_endless_stream_is_read_text_by_text():
    model, alive, most = llama(), 0, 0

    class Counted(dict):
        def __init__(self, ids):
            nonlocal alive, most
            super().__init__(input_ids=ids)
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    found = ct.second_moments(model, (Counted(ids[None]) for ids in texts(count=30)))
    assert found.tokens == 1200 and most <= 3


@pytest.mark.slow
def test_no_logits_are_computed_where_the_model_can_do_without():
    model = load_model("embedded")[0]
    big = torch.arange(3, 60).repeat(1, 4).expand(300, -1)  # 300 × 228 × vocabulary: more than two million logits
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    ct.second_moments(model, [big])
    sizes.clear()
    ct.second_moments(model, [big])
    hook.remove()
    assert sizes == [0]


def test_the_callers_generator_may_run_the_model():
    model = llama()

    def own():
        for ids in TEXTS:
            with torch.no_grad():
                model(ids[None])
            yield ids

    assert same(ct.second_moments(model, own()), ct.second_moments(model, TEXTS))


def test_strings_are_read_end_to_end_in_rows_of_equal_length():
    model, tokenizer = load_model("embedded")
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = ct.second_moments(model, SENTENCES, tokenizer)
    hook.remove()
    tokens = [t for text in SENTENCES for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = [[tokenizer.bos_token_id, *tokens[i : i + 95]] for i in range(0, len(tokens), 95)]
    assert shapes[-3:] == [(8, 96), (7, 96), (1, len(rows[-1]))] and len(rows[-1]) < 96  # 1500 words
    again = ct.second_moments(model, [torch.tensor(rows[:8]), torch.tensor(rows[8:15]), torch.tensor(rows[15])])
    assert same(found, again) and found.tokens == sum(map(len, rows))


@pytest.mark.parametrize("given", [[], [""], ["", ""], iter([])])
def test_nothing_to_read(given, tmp_path):
    with pytest.raises(ct.BadInput, match="there are no texts, or no tokens in them"):
        ct.second_moments(*load_model("embedded")[:1], given, load_model("embedded")[1], save=tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_too_few_tokens_are_named():
    model, tokenizer = load_model("embedded")
    with pytest.warns(
        ct.ControllabilityWarning, match=r"of 6 tokens: .*down_proj.* reads \d+ numbers.*give more texts"
    ):
        ct.second_moments(model, [SENTENCES[0]], tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ct.second_moments(model, SENTENCES, tokenizer)


def test_the_condition_number_is_that_of_the_shrunk_moment():
    moments = ct.second_moments(llama(), TEXTS)
    C = moments.metrics["model.layers.1.mlp.down_proj.weight"].second.double().numpy()
    sigma = (1 - SHRINK) * C * len(C) / np.trace(C) + SHRINK * np.eye(len(C))
    found = moments.condition
    assert set(found) == set(moments.metrics)
    assert found["model.layers.1.mlp.down_proj.weight"] == pytest.approx(np.linalg.cond(sigma), rel=1e-9)
    assert all(1 < value <= 1 + 0.9 * 48 / SHRINK for value in found.values())
    assert repr(moments) == "Moments(6 matrices, 120 tokens)"
    for wrong in (float("nan"), -1.0):
        with pytest.raises(ct.BadInput, match="no second moment"):
            _ = Moments({"W": Metric(torch.diag(torch.tensor([1.0, wrong, 2.0])))}, 3).condition


def test_moments_of_a_larger_model_are_refused():
    """Those of a model with one layer more have all the names that the smaller one asks for."""
    model = llama()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 3
    more = ct.second_moments(type(model)(config).eval(), TEXTS)
    ids = TEXTS[0][None]
    with pytest.raises(ct.BadInput, match=r"matrix model\.layers\.2\..*of another model"):
        ct.patch_model(model, {"input_ids": ids}, {"input_ids": ids[:, -3:]}, scope="last", moments=more)


def test_a_corpus_that_holds_the_context_is_refused():
    model, tokenizer = load_model("embedded")
    context = "Mia lives in Oslo . Leo lives in Rome . Ana lives in Paris ."
    for number, text in ((2, f"Tom lives in Lima . {context}"), (1, "Leo lives in Rome . Ana lives in Paris .")):
        with pytest.raises(ct.BadInput, match=f"text {number} has 8 words in a row of the context: leave it out"):
            ct.second_moments(model, [*SENTENCES[: number - 1], text], tokenizer, without=context)
    with pytest.raises(ct.BadInput, match="text 1 has"):
        ct.second_moments(model, ["Mia lives in Oslo ."], tokenizer, without="Mia lives in Oslo .")
    ct.second_moments(model, SENTENCES, tokenizer, without=context)  # each of its facts, but no more of it
