"""Patches as PEFT adapters: the real peft loads what is exported, and what peft saves comes back as a patch."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import warnings

import pytest
import torch
from family_models import build, default_dtype, inputs, logits_of
from helpers import error, hook_count, runs, snapshot, tiny_gemma, unchanged
from safetensors.torch import load_file
from torch import nn

import controllability as ct
from controllability.cli.main import main
from controllability.deltas import ExpertLowRank, LowRank, Shift
from controllability.interfaces import Param
from controllability.models.files import peft_export as exporting
from controllability.models.files.peft_forms import forms_of, lora_factors, lora_tensors
from controllability.models.hooks.carried_patches import carried
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form

peft = pytest.importorskip("peft")

# families of every form: scales saved whole, plain and transposed matrices, stacked experts of two layouts, routers
FAST = {
    "gemma3_text": "post_feedforward_layernorm", "llama": "", "gpt2": "", "gptj": "", "phi3": "",
    "olmo2": "post_feedforward_layernorm", "mixtral": "", "llama4_text": "", "qwen2_moe": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def patched(name="llama", dtype=torch.float32, scope="last", **options):
    """(model, patch, source) of one sample."""
    with default_dtype(name):
        model = build(name, dtype)
        target, source = inputs(name, model, batch=1)
        return model, ct.patch_model(model, target=target, source=source, scope=scope, **options), source


def loaded(model, directory):
    return peft.PeftModel.from_pretrained(model, str(directory)).eval()


# ------------------------------------------------------------------------------------- exporting


def round_trip(name, directory):
    """Export, load with peft onto another copy of the model, compare with the merged weights; import back."""
    model, mp, source = patched(name)
    before, unpatched = snapshot(model), logits_of(model, source)
    done = mp.export_peft(directory)
    assert unchanged(model, before)
    assert hook_count(model) == 0
    with mp.applied(model):
        wanted = logits_of(model, source)
    with default_dtype(name):
        adapted = logits_of(loaded(build(name, torch.float32), directory), source)
    assert error(adapted, wanted) <= 1e-5 < 1e-3 < error(unpatched, wanted)
    assert done.verified
    assert done.check.error <= 1e-5 < 1e-3 < done.check.unpatched
    back = ct.import_peft(directory, model)
    assert {(str(e.param), e.layer) for e in back.entries} == {(str(e.param), e.layer) for e in mp.entries}
    with back.applied(model):
        assert error(logits_of(model, source), wanted) <= 1e-5
    return done


@pytest.mark.parametrize("name", FAST)
def test_peft_gives_the_patched_models_output(name, tmp_path):
    done = round_trip(name, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == sorted(done.files)
    assert [module.rpartition(".")[2] for module in done.dense] == [FAST[name]] * (len(done.dense) if FAST[name] else 0)
    assert bool(done.dense) == bool(FAST[name])


# not one set of weights, or out of PEFT's reach
REFUSED = {
    "hrm_text": "runs several times",
    "prophetnet": "keeps 3 states a position",
    "dbrx": "reads weights past the module that PEFT wraps",
    **dict.fromkeys(("inkling_text", "inkling2_text"), "No modules were targeted"),  # a convolution's taps alone
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba"), "incompatible with Mamba-based models"
    ),  # by PEFT, whatever is moved
    "laguna": "PEFT does not find all of the adapter",  # PEFT 0.21 renames shared_experts in the file as in old checkpoints
}


@pytest.mark.slow
def test_every_family_is_exported_or_refused_by_its_reason(tmp_path):
    from test_families import PATCHED

    for name in PATCHED:
        if name in REFUSED:
            with pytest.raises(ct.ControllabilityError, match=REFUSED[name]):
                round_trip(name, tmp_path / name)
            assert not (tmp_path / name).exists()
        else:
            round_trip(name, tmp_path / name)
    assert len(set(PATCHED) - set(REFUSED)) >= 170


@pytest.mark.parametrize(("name", "dtype"), [("gemma3_text", torch.float64), ("mixtral", torch.bfloat16)])
def test_other_dtypes(name, dtype, tmp_path):
    model, mp, _ = patched(name, dtype)
    done = mp.export_peft(tmp_path / "adapter", model)
    assert done.check.error <= exporting.VERIFIED[dtype] < 0.5 < done.check.unpatched


def test_scope_each_with_one_position(gemma, tmp_path):
    target, source = runs(context=9, query=1)
    mp = ct.patch_model(gemma, target, source)
    assert mp.export_peft(tmp_path / "adapter").verified
    assert error(loaded(tiny_gemma(layers=2), tmp_path / "adapter")(**source).logits, mp.target_logits) < 5e-6


def test_a_bias_is_saved_with_its_whole_module(tmp_path):
    model, mp, source = patched("gpt2")
    shift = Entry(Param("transformer.h.0.mlp.c_fc.bias"), Shift(torch.randn(1, model.transformer.h[0].mlp.c_fc.nf)))
    mp = dataclasses.replace(mp, entries=(*mp.entries, shift))
    done = mp.export_peft(tmp_path / "adapter")
    assert done.dense == ["transformer.h.0.mlp.c_fc"]
    assert done.verified
    back = ct.import_peft(tmp_path / "adapter", model)
    assert {str(e.param) for e in back.entries} == {str(e.param) for e in mp.entries}
    with mp.applied(model):
        wanted = logits_of(model, source)
    with back.applied(model):
        assert error(logits_of(model, source), wanted) < 1e-5


class Holder(nn.Module):
    """Parameters of every shape, and a plain map that does not reach them."""

    def __init__(self, **parameters):
        super().__init__()
        self.inner = nn.Module()
        for name, value in parameters.items():
            setattr(self.inner, name, nn.Parameter(value))


def low_rank(rank, out, into, transposed=False):
    return LowRank(torch.randn(1, rank, out), torch.randn(1, rank, into), transposed)


def experts(index, rank, out, into, count, transposed=False):
    left, right = torch.randn(1, len(index), rank, out), torch.randn(1, len(index), rank, into)
    return ExpertLowRank(left, right, transposed, torch.tensor([index]), count)


MATRICES = {
    "rank 1": ((5, 3), False, [((), low_rank(1, 5, 3))]),
    "rank 4": ((5, 3), False, [((), low_rank(4, 5, 3))]),
    "stored transposed": ((3, 5), False, [((), low_rank(2, 5, 3, True))]),
    "two halves of one matrix": (
        (6, 3), False, [((slice(0, 2),), low_rank(1, 2, 3)), ((slice(2, 6),), low_rank(3, 4, 3))],
    ),
    "columns": ((3, 6), False, [((slice(0, 3), slice(1, 5)), low_rank(2, 3, 4))]),
    "experts": ((4, 5, 3), False, [((), experts([2, 0], 1, 5, 3, 4))]),
    "experts of rank 2": ((4, 5, 3), False, [((), experts([3, 1], 2, 5, 3, 4))]),
    "experts stored transposed, said": ((4, 3, 5), True, [((), experts([1, 2], 2, 5, 3, 4, True))]),
    "experts stored transposed, not said": ((4, 3, 5), False, [((), experts([1, 2], 2, 5, 3, 4, True))]),
    "experts as blocks of rows": ((12, 5), False, [((), experts([2, 0], 1, 3, 5, 4))]),
    "halves of experts": ((4, 6, 3), False, [
        ((slice(None), slice(0, 2)), experts([2, 0], 1, 2, 3, 4)), ((slice(None), slice(2, 6)), experts([2, 1], 2, 4, 3, 4)),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", MATRICES)
def test_pefts_own_delta_is_ours(case):
    """What PEFT makes of the tensors, W + ΔW written by PEFT itself, against the dense deltas; and read back."""
    shape, said, deltas = MATRICES[case]
    torch.manual_seed(0)
    model = Holder(weight=torch.zeros(shape))
    model.inner.is_transposed = said
    entries = [Entry(Param("inner.weight", index=index), delta) for index, delta in deltas]
    form = forms_of(model, entries)["inner.weight"]
    a, b = lora_tensors(entries, form)
    rank = a.shape[0] // (shape[0] if len(shape) == 3 else 1)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=["inner.weight"])
    wrapped = peft.get_peft_model(model, config).base_model.model.inner
    wrapped.lora_A["default"].weight.data, wrapped.lora_B["default"].weight.data = a, b
    wrapped.merge()
    wanted = torch.zeros(shape)
    for index, delta in deltas:
        wanted[index] += delta.dense()[0].reshape(wanted[index].shape)
    assert torch.allclose(wrapped.get_param(), wanted, atol=1e-5)
    rows, columns = lora_factors(a, b, form)
    assert torch.allclose(rows.transpose(-1, -2) @ columns, wanted, atol=1e-5)
    assert not torch.allclose(columns.transpose(-1, -2) @ rows, wanted.transpose(-1, -2) * 2, atol=1e-5)


def test_a_loaded_patch_of_matrices_needs_no_model(tmp_path):
    model, mp, _ = patched("llama")
    mp.save(tmp_path / "patch")
    again = ct.load_patch(tmp_path / "patch")
    done = again.export_peft(tmp_path / "adapter")
    assert (done.verified, done.dense) == (None, [])
    assert done.check.note == "not verified: no model was given"
    mp.export_peft(tmp_path / "with model")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "with model"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert again.export_peft(tmp_path / "verified", model).verified


def test_without_peft_the_adapter_is_written_and_called_unverified(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model, mp, _ = patched()
    done = mp.export_peft(tmp_path / "adapter", model)
    assert done.verified is None
    assert "peft is not installed" in done.check.note


# ------------------------------------------------------------------------------ exports refused


def test_several_sets_of_weights_are_refused(gemma, tmp_path):
    mp = ct.patch_model(gemma, *runs(context=9, query=4))
    with pytest.raises(
        ct.PatchError, match="scope 'each' holds 4 patches, one a position: they cannot be held by one ad"
    ):
        mp.export_peft(tmp_path / "adapter")
    two = ct.patch_model(gemma, *runs(context=9, query=4, batch=2), scope="last")
    with pytest.raises(ct.PatchError, match="scope 'last' holds 2 patches, one a sample"):
        two.export_peft(tmp_path / "adapter")
    one = ct.patch_model(gemma, *runs(context=9, query=4), positions=([3], [12]))
    for refused in (lambda: one.export_peft(tmp_path / "adapter"), lambda: one.merge(gemma)):
        with pytest.raises(ct.PatchError, match="a patch for one of 4 positions and leaves the others as they are"):
            refused()
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused(gemma, tmp_path):
    mp = ct.patch_model(gemma, *runs(context=9, query=4), scope="last")
    with pytest.raises(ct.BadInput, match="must be a torch module, got str"):
        mp.export_peft(tmp_path / "adapter", "gemma")
    with pytest.raises(ct.BadInput, match="must be a torch module, got str"):
        ct.import_peft(tmp_path / "adapter", "gemma")


def test_an_occupied_directory_is_left_alone(tmp_path):
    model, mp, _ = patched()
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ct.PatchError, match="exists already and is not an empty directory"):
        mp.export_peft(tmp_path, model)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_other_weights_and_patches_on_the_model_are_refused(gemma, tmp_path):
    mp = ct.patch_model(gemma, *runs(context=9, query=4), scope="last")
    with pytest.raises(ct.PatchError, match="made for other weights"):
        mp.export_peft(tmp_path / "adapter", tiny_gemma(seed=1))
    with mp.applied(gemma), pytest.raises(ct.PatchError, match="patches are on the model"):
        mp.export_peft(tmp_path / "adapter")
    mp.merge(gemma)
    with pytest.raises(ct.PatchError, match="patches are on the model"):
        mp.export_peft(tmp_path / "adapter")
    mp.unmerge(gemma)
    assert not list(tmp_path.iterdir())


def test_a_loaded_patch_with_scales_needs_the_model(gemma, tmp_path):
    ct.patch_model(gemma, *runs(context=9, query=4), scope="last").save(tmp_path / "patch")
    again = ct.load_patch(tmp_path / "patch")
    with pytest.raises(ct.PatchError, match=r"post_feedforward_layernorm.weight has no LoRA form.*give the model"):
        again.export_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert again.export_peft(tmp_path / "adapter", gemma).verified


def test_an_adapter_that_does_something_else_is_not_written(tmp_path, monkeypatch):
    model, mp, _ = patched()
    before = snapshot(model)
    right = exporting.lora_tensors
    monkeypatch.setattr(exporting, "lora_tensors", lambda *args: (right(*args)[0], 1.01 * right(*args)[1]))
    with pytest.raises(ct.NotVerified, match=r"output misses the patched model's by .*nothing was written"):
        mp.export_peft(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    assert unchanged(model, before)
    assert carried(model) == ()


def test_interrupted_exports_leave_nothing(tmp_path, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    model, mp, _ = patched()
    monkeypatch.setattr(exporting, "check_adapter", press)
    with pytest.raises(KeyboardInterrupt):
        mp.export_peft(tmp_path / "adapter", model)
    assert not list(tmp_path.iterdir())


def test_parameters_out_of_pefts_reach_are_named():
    def why(model, name, delta):
        return forms_of(model, [Entry(Param(name), delta)])[name].why

    shared = nn.ModuleDict({"a": nn.Linear(3, 3)})
    shared["b"] = shared["a"]
    assert why(shared, "a.weight", low_rank(1, 3, 3)) == "module a is also b, and PEFT would reach one of them only"
    twice = nn.ModuleDict({"up": nn.Linear(3, 3), "other": nn.ModuleDict({"up": nn.Linear(3, 3)})})
    assert "would also reach module other.up" in why(twice, "up.weight", low_rank(1, 3, 3))
    owner = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(3, 3)})})
    owner["block"].gain = nn.Parameter(torch.ones(3))
    assert "a vector in module block, which holds others (up, …)" in why(owner, "block.gain", Shift(torch.ones(1, 3)))
    assert "in the model itself" in why(nn.Linear(3, 3), "weight", low_rank(1, 3, 3))


# ---------------------------------------------------------------------------------- the command


def command(capsys, *arguments):
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err


@pytest.fixture
def saved_patch(capsys, saved_gemma, tmp_path):
    texts = ("--context", "Mia lives in Oslo .", "--query", "Where does Mia live ?")
    assert command(capsys, "patch", saved_gemma, *texts, "--scope", "last", "--out", tmp_path / "patch")[0] == 0
    return tmp_path / "patch"


def test_export_finds_the_model_that_the_patch_remembers(capsys, saved_gemma, saved_patch, tmp_path):
    status, data, err = command(capsys, "export", saved_patch, "--peft", tmp_path / "adapter", "--json")
    assert (status, err) == (0, "")
    assert data["verified"] is True
    assert data["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    assert data["dense"] == [f"model.layers.{i}.post_feedforward_layernorm" for i in range(2)]
    assert data["model"] == str(saved_gemma)
    assert data["error"] < 1e-4 < 0.1 < data["unpatched"]
    status, shown, _ = command(capsys, "export", saved_patch, "--peft", tmp_path / "again")
    assert status == 0
    for words in ("saved whole, because PEFT has no LoRA for vectors", "verified: peft loads it", "6 matrices"):
        assert words in shown


def test_export_says_what_it_lacks(capsys, saved_gemma, saved_patch, tmp_path):
    away = tmp_path / "elsewhere"
    shutil.copytree(saved_gemma, away)
    mp = ct.load_patch(saved_patch)
    mp.model_name = str(tmp_path / "gone")
    mp.save(tmp_path / "orphan")
    status, _, err = command(capsys, "export", tmp_path / "orphan", "--peft", tmp_path / "adapter")
    assert status == 2
    assert "has no LoRA form" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "adapter").exists()
    status, data, _ = command(
        capsys, "export", tmp_path / "orphan", "--peft", tmp_path / "adapter", "--model", away, "--json"
    )
    assert (status, data["verified"]) == (0, True)
    status, _, err = command(capsys, "export", saved_patch, "--peft", tmp_path / "adapter")
    assert status == 2
    assert "exists already" in err


def test_a_form_survives_its_json():
    form = Form("parameter", (2, 3, 4), True, "a.base_layer", "")
    assert Form.from_dict(json.loads(json.dumps(form.to_dict()))) == form
