"""Everything a patch does, for one patch of many tokens: applied, merged, saved, exported, compared, from the command line."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import error, exactly, hook_count, snapshot, tiny_gemma, unchanged

import controllability as ct
from controllability.cli.main import main
from controllability.deltas import ExpertLowRank, LowRank, Shift
from controllability.models.hooks.carried_patches import carried

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from scope_all import CONTEXT, MODELS, random_model, task

EXACT, ROUNDING = 1e-9, 1e-5
TOKENS = 9


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(name="llama", dtype=torch.float64, **options):
    """(model, patch, source, target's logits at the pairs, unpatched logits)."""
    model = random_model(name, 32, 48, 2).to(dtype)
    target, source, positions = task(TOKENS)
    with exactly(dtype):
        mp = ct.patch_model(model, target, source, scope="all", positions=positions, **options)
        wanted, unpatched = model(**target).logits[:, CONTEXT:], model(**source).logits
    return model, mp, source, wanted, unpatched


def run(model, inputs):
    with exactly(model.dtype):
        return model(**inputs).logits


# ------------------------------------------------------------------------------- applied, merged


@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_applied_to_other_batches(name):
    """One set of weights: any batch, any length; causal models give the beginnings of the query the same."""
    model, mp, source, wanted, unpatched = made(name)
    ids = source["input_ids"]
    with mp.applied(model):
        batch, half = run(model, {"input_ids": ids.repeat(3, 1)}), run(model, {"input_ids": ids[:, :4]})
        longer = run(model, {"input_ids": torch.cat([ids, ids], 1)})
    assert error(batch, wanted.repeat(3, 1, 1)) <= EXACT < 0.1 < error(unpatched, wanted)
    assert error(half, wanted[:, :4]) <= EXACT
    assert error(longer[:, :TOKENS], wanted) <= EXACT
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", MODELS)
def test_merged_and_unmerged_to_the_last_bit(name):
    model, mp, source, wanted, unpatched = made(name)
    before = snapshot(model)
    for corrected in (False, True):
        with ct.exact_mode():
            size = mp.merge(model, corrected=corrected)
            told = mp.merged_error(model)
        assert size > 0
        assert error(run(model, source), wanted) <= EXACT < 0.1 < error(unpatched, wanted)
        assert told.relative_error <= EXACT
        assert told.top1 == 1
        assert {r.parameter for r in mp.report.rounding} == {str(e.param) for e in mp.entries}
        mp.unmerge(model)
        assert unchanged(model, before)
        assert carried(model) == ()


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_a_corrected_merge_makes_good_what_half_precision_rounds(name):
    """bfloat16 weights: rounding adds up from layer to layer, unless each layer is solved on top of it."""
    model, mp, _, wanted, unpatched = made(name, torch.bfloat16)
    mp.merge(model, corrected=False)
    plain = mp.merged_error(model).relative_error
    mp.unmerge(model)
    mp.merge(model)
    corrected = mp.merged_error(model).relative_error
    mp.unmerge(model)
    assert corrected < 0.02 < 0.5 < error(unpatched, wanted)
    assert corrected < plain


def test_a_merged_model_generates_what_it_would_with_the_context():
    """The first new token follows from the last query position; afterwards merged and applied go on alike."""
    model, mp, source, wanted, _ = made("llama", torch.float32)
    mark = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(**source, **mark)[0, TOKENS:]
    with mp.applied(model):
        applied = model.generate(**source, **mark)[0, TOKENS:]
    mp.merge(model)
    merged = model.generate(**source, **mark)[0, TOKENS:]
    mp.unmerge(model)
    assert applied.tolist() == merged.tolist()
    assert int(merged[0]) == int(wanted[0, -1].argmax()) != int(plain[0])


def test_one_on_top_of_the_other():
    """A second set of weights is made while the first is applied, and holds only there."""
    model, mp, source, wanted, _ = made()
    target, other, positions = task(5, seed=2)
    with ct.exact_mode(), mp.applied(model):
        second = ct.patch_model(model, target, other, scope="all", positions=positions)
        goal, without = model(**target).logits[:, CONTEXT:], model(**other).logits
        with second.applied(model):
            assert error(model(**other).logits, goal) <= EXACT < 0.1 < error(without, goal)
        assert error(model(**source).logits, wanted) <= EXACT
    with pytest.raises(ct.PatchError, match="made"), second.applied(model):
        pass
    assert hook_count(model) == 0


def test_a_quantised_model_is_patched_beside_its_integers():
    bnb = pytest.importorskip("bitsandbytes")
    model = random_model("llama", 64, 96, 2).float()
    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.clone(), requires_grad=False, has_fp16_weights=False)
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new.to("cpu").eval())
    target, source, positions = task(TOKENS)
    wanted, unpatched = model(**target).logits[:, CONTEXT:], model(**source).logits
    mp = ct.patch_model(model, target, source, scope="all", positions=positions)
    with mp.applied(model):
        assert error(model(**source).logits, wanted) < ROUNDING < 0.1 < error(unpatched, wanted)
    with pytest.raises(ct.PatchError, match="is quantised"):
        mp.merge(model)


# ------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_saved_and_loaded(name, tmp_path):
    _, mp, source, wanted, unpatched = made(name)
    mp.save(tmp_path / "patch")
    described = json.loads((tmp_path / "patch" / "patch.json").read_text())
    assert described["scope"] == "all"
    assert described["together"] == {"ridge": 0.0, "rank": None, "keep_rms": False}
    loaded = ct.load_patch(tmp_path / "patch")
    for one, other in zip(mp.entries, loaded.entries, strict=True):
        assert type(one.delta) is type(other.delta)
        kept = {n: v for n, v in vars(one.delta).items() if isinstance(v, torch.Tensor)}
        assert all(torch.equal(v, getattr(other.delta, n)) for n, v in kept.items())
        dims = 3 if isinstance(one.delta, ExpertLowRank) else 2 if isinstance(one.delta, LowRank) else 1
        assert next(iter(kept.values())).ndim == dims, "one patch: no axis of tokens"
    assert loaded.report.to_dict() == json.loads(json.dumps(mp.report.to_dict()))
    assert str(loaded.report) == str(mp.report)
    twin = random_model(name, 32, 48, 2)
    with ct.exact_mode(), loaded.applied(twin):
        assert error(twin(**source).logits, wanted) <= EXACT < 0.1 < error(unpatched, wanted)
    before = snapshot(twin)
    with ct.exact_mode():
        loaded.merge(twin, corrected=True)
    assert error(run(twin, source), wanted) <= EXACT
    loaded.unmerge(twin)
    assert unchanged(twin, before)


def test_a_loaded_fit_is_still_a_fit(tmp_path):
    """Its corrected merge solves the same least squares again, not the exact patch."""
    model, mp, source, wanted, _ = made(ridge=0.1, rank=4)
    with ct.exact_mode(), mp.applied(model):
        fitted = model(**source).logits
    mp.save(tmp_path / "patch")
    loaded = ct.load_patch(tmp_path / "patch")
    assert loaded.report.fit == {"ridge": 0.1, "rank": 4}
    assert "a fit by least squares" in str(loaded.report)
    with ct.exact_mode():
        loaded.merge(model, corrected=True)
        merged = model(**source).logits
    assert error(merged, fitted) <= EXACT < 1e-3 < error(fitted, wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gptj", "olmo2"])
def test_an_adapter_of_the_patch_s_rank_that_peft_loads(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, mp, source, wanted, unpatched = made(name, torch.float32)
    before = snapshot(model)
    done = mp.export_peft(tmp_path / "adapter")
    assert done.verified
    assert done.rank == max(e.delta.left.shape[-2] for e in mp.entries if isinstance(e.delta, LowRank)) == TOKENS
    assert unchanged(model, before)
    assert bool(done.dense) == any(isinstance(e.delta, Shift) for e in mp.entries)
    twin = random_model(name, 32, 48, 2).float()
    adapted = peft.PeftModel.from_pretrained(twin, str(tmp_path / "adapter")).eval()
    with mp.applied(model):
        applied = model(**source).logits
    assert error(adapted(**source).logits, applied) < ROUNDING < 0.1 < error(unpatched, wanted)
    back = ct.import_peft(tmp_path / "adapter", model)
    with back.applied(model):
        assert error(model(**source).logits, applied) < ROUNDING
    assert {str(e.param) for e in back.entries} == {str(e.param) for e in mp.entries}
    assert max(p.relative for p in ct.diff(mp, back).parameters) < 1e-4


def test_two_of_them_compared():
    """Row by row would be one patch against another's tokens: it is one set of weights against one."""
    model, mp, _, _, _ = made("gemma3")
    target, source, positions = task(5)
    with ct.exact_mode():
        again, other = (
            ct.patch_model(model, *inputs[:2], scope="all", positions=inputs[2])
            for inputs in (task(TOKENS), (target, source, positions))
        )
    same, found = ct.diff(mp, again), ct.diff(mp, other)
    assert same.compared == "each"
    assert max(p.relative for p in same.parameters) < 1e-9
    assert found.compared == "each", "though they were solved for other tokens"
    dense = {str(e.param): [e.delta.dense()] for e in mp.entries}
    for entry in other.entries:
        dense[str(entry.param)].append(entry.delta.dense())
    for p in found.parameters:
        one, two = dense[p.parameter]
        assert p.difference == pytest.approx([float((one - two).norm())])
        assert p.norm_a == pytest.approx([float(one.norm())])
    assert "scope 'all'" in found.about
    with ct.exact_mode():
        each = ct.patch_model(model, *task(TOKENS)[:2], positions=task(TOKENS)[2])
    spread = ct.diff(mp, each)
    assert spread.compared == "one"
    assert {len(p.difference) for p in spread.parameters} == {TOKENS}
    whole = {str(e.param): e.delta.dense() for e in each.entries}
    for p in spread.parameters:
        apart = (dense[p.parameter][0] - whole[p.parameter]).reshape(TOKENS, -1).norm(dim=-1)
        assert p.difference == pytest.approx(apart.tolist())


def test_experts_compared():
    model, mp, _, _, _ = made("mixtral")
    target, source, positions = task(3, seed=4)
    with ct.exact_mode():
        other = ct.patch_model(model, target, source, scope="all", positions=positions, via="output")
    found = ct.diff(mp, other)
    assert len(found.only_a) == 4
    for p in found.parameters:
        one, two = (next(e.delta.dense() for e in x.entries if str(e.param) == p.parameter) for x in (mp, other))
        assert p.difference == pytest.approx([float((one - two).norm())])
        assert p.cosine == pytest.approx([float((one * two).sum() / one.norm() / two.norm())])


# --------------------------------------------------------------------------------- command line


def command(capsys, *args):
    status = main([*args, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_from_the_command_line(saved_gemma, tmp_path, capsys):
    """patch, verify and export; the query's tokens are distinct and keep the positions they had."""
    texts = ("--context", "Mia has a cat . Leo lives in Oslo .", "--query", "Which pet does Mia have ?")
    status, found = command(
        capsys, "patch", str(saved_gemma), *texts, "--scope", "all", "--out", str(tmp_path / "patch")
    )
    assert status == 0
    assert found["relative_error"] < 1e-4 < found["max_logit_error_unpatched"]
    assert all(layer["route"] for layer in found["layers"])
    status, checked = command(capsys, "verify", str(saved_gemma), str(tmp_path / "patch"))
    assert status == 0
    assert checked["valid"]
    assert checked["relative_error"] < 1e-4
    pytest.importorskip("peft")
    status, written = command(
        capsys, "export", str(tmp_path / "patch"), "--peft", str(tmp_path / "adapter"), "--model", str(saved_gemma)
    )
    assert status == 0
    assert written["verified"]


def test_a_refusal_on_the_command_line_names_the_tokens(tmp_path, capsys):
    """More tokens than the width: exit 1, the certificate in the JSON object and in words."""
    from train_embedded import make_tokenizer

    tokenizer = make_tokenizer()
    tiny_gemma(layers=2, d=8, h=12, vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = (
        "--context",
        "Mia has a cat .",
        "--query",
        "Leo lives in Oslo . Ana works as baker . Which pet does Eva have ?",
    )
    status, found = command(capsys, "patch", str(tmp_path / "model"), *texts, "--scope", "all")
    assert status == 1
    assert found["certificate"]["kind"] == "dependent tokens"
    assert all(name.startswith("sample 0, position ") for name in found["certificate"]["names"])
    assert main(["patch", str(tmp_path / "model"), *texts, "--scope", "all"]) == 1
    assert "sample 0, position" in capsys.readouterr().err
