"""Merging loses nothing: what overflows or cannot be written is refused and put back; a merge can be made final."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from family_models import build, inputs
from helpers import error, runs, snapshot, tiny_gemma, unchanged
from torch import nn

import controllability as ct
from controllability.deltas import ExpertLowRank, LowRank, Shift
from controllability.models.hooks.carried_patches import carried
from controllability.models.patches import merging

# ------------------------------------------------------------------------------------------------ overflow


def enlarged(mp, kind, times):
    """The patch, the last delta of this kind so large that the layers before it are written first."""
    at = max(i for i, entry in enumerate(mp.entries) if type(entry.delta) is kind)
    delta = mp.entries[at].delta
    part = "value" if kind is Shift else "left"
    wrong = replace(mp.entries[at], delta=replace(delta, **{part: getattr(delta, part) * times}))
    mp.entries = (*mp.entries[:at], wrong, *mp.entries[at + 1 :])
    return mp, wrong.param


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "times", "most"),
    [
        ("gemma3_text", LowRank, torch.float16, 1e9, r"6\.6e\+04"),
        ("gemma3_text", LowRank, torch.float32, 1e41, r"3\.4e\+38"),
        ("gemma3_text", Shift, torch.float16, 1e9, r"6\.6e\+04"),
        ("gemma3_text", LowRank, torch.bfloat16, float("nan"), r"3\.4e\+38"),
        ("mixtral", ExpertLowRank, torch.float16, 1e9, r"6\.6e\+04"),
    ],
)
def test_a_merge_that_overflows_is_refused_by_name_and_every_bit_is_back(name, kind, dtype, times, most):
    model = build(name, dtype)
    target, source = inputs(name, model, batch=1)[:2]
    mp = ct.patch_model(model, target, source, scope="last")
    before = snapshot(model)
    assert mp.merge(model, corrected=False, measured=False) > 0, "the twin that fits"
    mp.unmerge(model)
    mp, param = enlarged(mp, kind, times)
    with pytest.raises(
        ct.PatchError, match=rf"parameter \S+ would not be finite: .* \(up to {most}\); use applied\(\)"
    ) as said:
        mp.merge(model, corrected=False, measured=False)
    assert str(param).partition("[")[0] in str(said.value)
    assert unchanged(model, before)
    assert carried(model) == ()
    with pytest.raises(ct.PatchError, match="not merged into this model"):
        mp.unmerge(model)
    ct.patch_model(model, target, source, scope="last").merge(model, measured=False)


def test_an_imported_adapter_is_merged_into_half_precision_without_correction(tmp_path):
    """It was solved for no target: by default nothing is corrected, and asked for, it is refused by its reason."""
    model = tiny_gemma(dtype=torch.bfloat16)
    ct.patch_model(model, *runs(context=9, query=2), scope="last").export_peft(tmp_path / "adapter")
    mp = ct.import_peft(tmp_path / "adapter", model)
    before = snapshot(model)
    with pytest.raises(ct.PatchError, match="imported has no target to be corrected for: use corrected=False"):
        mp.merge(model, corrected=True)
    assert unchanged(model, before)
    assert mp.merge(model) > 0
    assert not unchanged(model, before)
    mp.unmerge(model)
    assert unchanged(model, before)


# ------------------------------------------------------------------------------ what cannot be written to


@pytest.mark.parametrize("merged_in", ["plain", "no_grad"])
def test_inference_tensors_are_refused_by_name_outside_of_inference_mode(merged_in):
    with torch.inference_mode():
        model = tiny_gemma()
    before = snapshot(model)
    mp = ct.patch_model(model, *runs(context=9, query=2), scope="last")
    with (
        torch.set_grad_enabled(merged_in == "plain"),
        pytest.raises(
            ct.PatchError, match=r"parameter model.layers.0.mlp.\S+ was made inside of torch.inference_mode\(\)"
        ),
    ):
        mp.merge(model)
    assert unchanged(model, before)
    assert carried(model) == ()
    with torch.inference_mode():
        mp.merge(model)
        merged = model(**runs(context=9, query=2)[1]).logits[:, -1:]
    assert error(merged.clone(), mp.target_logits) < 1e-5
    mp.unmerge(model)  # undoing works everywhere
    assert unchanged(model, before)


EXPANDED = {
    "of one number": lambda w: torch.full((1, 1), 0.1).expand(w.shape),
    "of one row": lambda w: w[:1].expand(w.shape),
    "of one column": lambda w: w[:, :1].expand(w.shape),
    "rows that overlap": lambda w: torch.randn(sum(w.shape)).as_strided(w.shape, (1, 1)),
}


@pytest.mark.parametrize("how", EXPANDED)
def test_entries_that_are_one_number_in_memory_are_refused_by_name(how):
    """Written to, each of them would get the changes of all; torch itself notices some of them, halfway."""
    model = tiny_gemma()
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(EXPANDED[how](down.weight.detach()), requires_grad=False)
    before = snapshot(model)
    mp = ct.patch_model(model, *runs(context=9, query=2), scope="last")
    with pytest.raises(ct.PatchError, match=r"parameter model.layers.1.mlp.down_proj.weight is expanded: "):
        mp.merge(model)
    assert unchanged(model, before)
    assert carried(model) == ()


def test_transposed_and_sliced_weights_are_merged():
    model = tiny_gemma()
    up, down = (getattr(model.model.layers[1].mlp, name) for name in ("up_proj", "down_proj"))
    down.weight = nn.Parameter(down.weight.detach().T.contiguous().T, requires_grad=False)
    wide = torch.zeros(up.weight.shape[0], 3 * up.weight.shape[1])
    wide[:, ::3] = up.weight.detach()
    up.weight = nn.Parameter(wide[:, ::3], requires_grad=False)
    before = snapshot(model)
    mp = ct.patch_model(model, *runs(context=9, query=2), scope="last")
    mp.merge(model)
    assert mp.merged.relative_error < 1e-5
    mp.unmerge(model)
    assert unchanged(model, before)


def test_a_write_that_fails_in_the_middle_is_named_and_the_layers_before_are_put_back(monkeypatch):
    """Out of memory, a device that is gone: not the fault of the patch, and not lost while the rest is restored."""
    model, written = tiny_gemma(), []

    def fails(*args):
        if len(written) == 4:
            raise RuntimeError("the device is gone\nand more")
        written.append(args)
        return usual(*args)

    usual = merging.write
    monkeypatch.setattr(merging, "write", fails)
    mp, before = ct.patch_model(model, *runs(context=9, query=2), scope="last"), snapshot(model)
    with pytest.raises(
        ct.PatchError, match=r"parameter \S+ cannot be written to: the device is gone; nothing was changed"
    ):
        mp.merge(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("undone_by", ["unmerge", "a merge that fails"])
def test_ctrl_c_while_the_originals_are_put_back_leaves_none_out(monkeypatch, undone_by):
    model = tiny_gemma()
    mp, before = ct.patch_model(model, *runs(context=9, query=2), scope="last"), snapshot(model)
    parameters, calls = model.get_parameter, []

    def interrupted(name):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return parameters(name)

    if undone_by == "unmerge":
        mp.merge(model)
        monkeypatch.setattr(model, "get_parameter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mp.unmerge(model)
    else:
        mp, _ = enlarged(mp, LowRank, 1e42)
        usual = merging.restore
        monkeypatch.setattr(
            merging, "restore", lambda *args: (monkeypatch.setattr(model, "get_parameter", interrupted), usual(*args))
        )
        with pytest.raises(KeyboardInterrupt):
            mp.merge(model, measured=False)
    monkeypatch.undo()
    assert len(calls) > 3
    assert unchanged(model, before)


# -------------------------------------------------------------------------------------- merges that are to stay


def merged_and_dropped(directory, count=1):
    """A model into which loaded patches were merged whose objects are gone."""
    target, source = runs(context=9, query=2)
    model = tiny_gemma()
    mp = ct.patch_model(model, target, source, scope="last")
    mp.save(directory / "patch")
    loaded = ct.load_patch(directory / "patch")
    loaded.merge(model)
    for _ in range(count - 1):
        above = ct.patch_model(model, *runs(context=7, query=2, seed=1), scope="last")
        above.merge(model)
        del above
    del loaded, mp
    gc.collect()
    return model, target, source


def test_every_refusal_of_a_model_that_carries_a_merge_says_how_to_let_it_stay(tmp_path):
    model, target, source = merged_and_dropped(tmp_path)
    plain = tiny_gemma()
    ct.patch_model(plain, target, source, scope="last").export_peft(tmp_path / "adapter")
    above = ct.patch_model(model, target, source, scope="last")
    refused = {
        "unmerge": lambda: ct.load_patch(tmp_path / "patch").unmerge(model),
        "generate": lambda: ct.generate(model, source["input_ids"], max_new_tokens=1),
        "save": lambda: above.save(tmp_path / "above"),
        "export": lambda: above.export_peft(tmp_path / "above"),
        "import": lambda: ct.import_peft(tmp_path / "adapter", model),
        "merge": lambda: ct.load_patch(tmp_path / "patch").merge(model),
    }
    for ask in refused.values():
        with pytest.raises(
            ct.PatchError, match=r"ct\.finalize_merges\(model\) makes the weights of a merge that is to stay"
        ):
            ask()
    with ct.patch_model(plain, target, source).applied(plain):
        with pytest.raises(ct.PatchError) as said:
            ct.generate(plain, source["input_ids"], max_new_tokens=1)
        assert "finalize" not in str(said.value), "nothing is merged there"


@pytest.mark.parametrize("count", [1, 2])
def test_a_final_merge_is_the_models_own(tmp_path, count):
    """Bits stay; what was refused works, exactly; the originals are let go."""
    model, target, source = merged_and_dropped(tmp_path, count)
    before = snapshot(model)
    assert ct.finalize_merges(model) == count
    assert unchanged(model, before)
    assert carried(model) == ()
    assert ct.generate(model, target["input_ids"], max_new_tokens=2).max_logit_error < 1e-4
    mp = ct.patch_model(model, target, source, scope="last")
    mp.save(tmp_path / "new")
    with torch.no_grad(), ct.load_patch(tmp_path / "new").applied(model):
        assert error(model(**source).logits[:, -1:], mp.target_logits) < 1e-5
    mp.merge(model)
    mp.unmerge(model)
    assert unchanged(model, before)
    assert ct.finalize_merges(model) == 0


def test_a_live_patch_lets_its_originals_go_and_is_not_taken_for_one_of_the_new_weights():
    model = tiny_gemma()
    target, source = runs(context=9, query=2)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.merge(model)
    ct.finalize_merges(model)
    assert mp._originals == {}
    before = snapshot(model)
    with pytest.raises(ct.PatchError, match="not merged into this model"):
        mp.unmerge(model)
    with pytest.raises(ct.PatchError, match="changed since this patch was made: make it again"):
        mp.merge(model)
    assert unchanged(model, before)


def test_no_merge_is_made_final_under_a_patch_that_is_applied():
    model = tiny_gemma()
    mp = ct.patch_model(model, *runs(context=9, query=2), scope="last")
    mp.merge(model)
    above = ct.patch_model(model, *runs(context=7, query=2, seed=1))
    with above.applied(model), pytest.raises(ct.PatchError, match="a patch is applied at the moment"):
        ct.finalize_merges(model)
    mp.unmerge(model)
