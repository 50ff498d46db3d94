"""Saved and loaded: the same patch again; what is damaged, or in the way, is refused and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from helpers import runs, tiny_gemma

import controllability as ct
from controllability.models.model_patch import ModelPatch


def test_saving_with_another_model_is_refused(patched, tmp_path):
    _, mp, _, _ = patched
    with pytest.raises(ct.PatchError, match="made for other weights"):
        mp.save(tmp_path / "patch", tiny_gemma(seed=4))
    assert not list(tmp_path.iterdir())


def test_save_and_load_round_trip(patched, tmp_path):
    model, mp, _, source = patched
    mp.save(tmp_path / "patch")
    loaded = ct.load_patch(tmp_path / "patch")
    assert isinstance(loaded, ModelPatch)
    with torch.no_grad(), loaded.applied(model):
        assert torch.equal(model(**source).logits, mp.logits)
    assert loaded.report.to_dict() == mp.report.to_dict()
    assert torch.equal(loaded.inputs["target"]["input_ids"], mp.inputs["target"]["input_ids"])
    assert not list(tmp_path.glob(".*")), "no temporary files are left"
    with pytest.raises(ct.PatchError, match="made for other weights"), loaded.applied(tiny_gemma(seed=1)):
        pass


def test_saving_a_merged_patch_keeps_the_fingerprint_of_the_original_weights(gemma, tmp_path):
    target, source = runs(context=9, query=1)
    mp = ct.patch_model(gemma, target, source)
    mp.save(tmp_path / "a")
    mp.merge(gemma)
    mp.save(tmp_path / "b")
    mp.unmerge(gemma)
    marks = [ct.load_patch(tmp_path / name).fingerprint for name in "ab"]
    assert marks[0] == marks[1]


def test_saving_while_applied_is_refused(patched, tmp_path):
    model, mp, _, _ = patched
    with mp.applied(model), pytest.raises(ct.PatchError, match="patches are on the model"):
        mp.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def corrupt(directory, how):
    tensors, description = directory / "patch.safetensors", directory / "patch.json"
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif how == "flipped byte":
        raw = bytearray(tensors.read_bytes())
        raw[-1] ^= 1
        tensors.write_bytes(raw)
    elif how == "no tensors":
        tensors.unlink()
    elif how == "truncated json":
        description.write_text(description.read_text()[:100])
    elif how == "other version":
        description.write_text(description.read_text().replace('"version": 4', '"version": 7'))
    elif how == "other format":
        description.write_text("[]")
    elif how == "missing entry":
        description.write_text(description.read_text().replace('"rows_shape"', '"rows_shepe"'))
    elif how == "no json":
        description.unlink()


DAMAGE = {
    "truncated tensors": "corrupt or truncated", "flipped byte": "corrupt or truncated", "no tensors": "cannot read",
    "truncated json": "corrupt or truncated", "other version": "format version 7, this program reads version 4",
    "other format": "not a description of a patch", "missing entry": "is corrupt: it is not what was saved", "no json": "not a saved patch",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_patches_are_refused(patched, tmp_path, how):
    patched[1].save(tmp_path / "patch")
    corrupt(tmp_path / "patch", how)
    with pytest.raises(ct.PatchError, match=DAMAGE[how]):
        ct.load_patch(tmp_path / "patch")


def test_saving_is_atomic_and_never_overwrites(patched, tmp_path, monkeypatch):
    _, mp, _, _ = patched
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(ct.PatchError, match="exists already and is not an empty directory"):
        mp.save(tmp_path / "full")
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ct.PatchError, match="exists already"):
        mp.save(tmp_path / "file")
    with pytest.raises(ct.PatchError, match="cannot write to"):
        mp.save(tmp_path / "file" / "below")
    from controllability.models.files import folders

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "_flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mp.save(tmp_path / "interrupted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
