"""What the caller hands over is copied; one lock for a model and its base."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from helpers import error, runs, tiny_gemma
from small_models import llama, logits

import controllability as ct
from controllability.models.hooks.carried_patches import carried


@pytest.mark.parametrize("scope", ["each", "last", "all"])
def test_the_callers_buffers_are_copied(scope, tmp_path):
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    pairs = torch.arange(3), torch.arange(9, 12)
    held = {"target": target["input_ids"].clone(), "source": source["input_ids"].clone()}
    mp = ct.patch_model(model, target, source, scope=scope, positions=pairs)
    for buffer in (target["input_ids"], source["input_ids"], source["position_ids"], *pairs):
        buffer.fill_(1)
    mp.save(tmp_path / "patch")
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        for role, ids in held.items():
            assert torch.equal(patch.inputs[role]["input_ids"], ids)
        assert torch.equal(patch.inputs["positions"][1], torch.arange(9, 12))
    right = {"input_ids": held["source"], "position_ids": torch.arange(9, 12)[None]}
    row = slice(-1, None) if scope == "last" else slice(None)
    with mp.applied(model):
        assert error(logits(model, right)[:, row], mp.target_logits) < 2e-5


def test_what_extends_a_patch_is_copied():
    model = llama(hidden_size=128, intermediate_size=256)
    ids = [runs(9, 3, seed=seed)[0]["input_ids"] for seed in range(2)]
    mp = ct.patch_model(model, {"input_ids": ids[0]}, {"input_ids": ids[0][:, -3:]}, scope="all")
    buffer = ids[1].clone()
    mp.extend(model, {"input_ids": buffer}, {"input_ids": buffer[:, -3:]})
    buffer.fill_(1)
    assert torch.equal(mp.stream.sequences[1].target, ids[1][0])


@pytest.mark.parametrize("objects", [1, 2])
def test_extensions_from_several_threads_are_all_there(objects):
    """Also on two model objects of the same weights, whose locks are two."""
    model = llama(hidden_size=128, intermediate_size=256)
    used = [model, copy.deepcopy(model)] if objects == 2 else [model, model]
    ids = [runs(9, 3, seed=seed)[0]["input_ids"] for seed in (0, 1, 3, 4)]
    plain = [({"input_ids": x}, {"input_ids": x[:, -3:]}) for x in ids]
    mp = ct.patch_model(model, *plain[0], scope="all")
    threads = [threading.Thread(target=mp.extend, args=(used[i % 2], *each)) for i, each in enumerate(plain[1:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mp.extensions) == 3
    wanted = [logits(model, target)[:, -3:] for target, _ in plain]
    with mp.applied(model):
        assert max(error(logits(model, s), w) for (_, s), w in zip(plain, wanted, strict=True)) < 1e-4


def wrapped(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), adapter_name="a").eval()


@pytest.mark.parametrize("base_first", [True, False])
@pytest.mark.parametrize("pair", ["base", "peft"])
def test_a_model_and_its_base_are_one(pair, base_first):
    (outer, inner), (target, source) = halves(pair), runs(context=9, query=3)
    first, second = (inner, outer) if base_first else (outer, inner)
    a, b = (ct.patch_model(each, target, source, scope="last") for each in (first, second))
    with a.applied(first):
        with (
            pytest.raises(ct.PatchError, match="the model carries 1 patch and this one was made while it carried 0"),
            b.applied(second),
        ):
            pass
        on_top = ct.patch_model(second, target, source, via="output")
        assert on_top.made_under == (a.id,)
    with b.applied(second):
        pass


def halves(pair: str) -> tuple[Any, Any]:
    model = llama()
    return (wrapped(model), model) if pair == "peft" else (model, model.model)


def test_a_merge_that_was_undone_is_none_for_the_base_either():
    model, (target, source) = llama(), runs(context=9, query=3)
    inner = ct.patch_model(model.model, target, source, scope="last")
    outer = ct.patch_model(model, target, source, scope="last")
    outer.merge(model)
    with pytest.raises(ct.PatchError, match="carries 1 patch"), inner.applied(model.model):
        pass
    outer.unmerge(model)
    with inner.applied(model.model):
        pass


def test_a_model_and_its_base_wait_for_each_other():
    model, failed = llama(), []

    def work(part: Any) -> None:
        for seed in range(3):
            try:
                ct.patch_model(part, *runs(9, 3, seed=seed))
            except ct.ControllabilityError as refused:
                failed.append(refused)

    threads = [threading.Thread(target=work, args=(part,)) for part in (model, model.model)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_models_that_share_an_embedding_alone_do_not_wait():
    a, b = llama(), llama()
    b.model.embed_tokens = a.model.embed_tokens
    target, source = runs(context=9, query=3)
    one, two = ct.patch_model(a, target, source), ct.patch_model(b, target, source)
    with one.applied(a), two.applied(b):
        assert error(logits(b, source), two.target_logits) < 2e-5


def test_a_context_may_be_left_by_another_thread():
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    plain, context, seen = logits(model, source), mp.applied(model), []
    worker = threading.Thread(target=context.__enter__)
    worker.start()
    worker.join()
    assert error(logits(model, source), mp.target_logits) < 2e-5
    waiting = threading.Thread(target=lambda: seen.append(ct.patch_model(model, target, source)), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert not seen and waiting.is_alive(), "the model is in use"
    context.__exit__(None, None, None)
    waiting.join(60)
    assert len(seen) == 1 and carried(model) == ()
    assert torch.equal(logits(model, source), plain)
    with mp.applied(model):
        pass


def test_weights_for_a_while_may_be_taken_out_by_another_thread():
    model, (target, source) = tiny_gemma(), runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    plain, context = logits(model, source), mp.applied(model, as_weights=True)
    threads = [
        threading.Thread(target=context.__enter__),
        threading.Thread(target=context.__exit__, args=(None, None, None), daemon=True),
    ]
    for thread in threads:
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert torch.equal(logits(model, source), plain) and carried(model) == ()
