"""Nothing is left behind: exceptions, interrupts, nesting, misuse, copies, other models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import error, hook_count, runs, snapshot, tiny_gemma, unchanged

import controllability as ct
from controllability.models.hooks import carried
from controllability.models.model_patch import ModelPatch


@pytest.fixture
def patched(gemma):
    target, source = runs(context=9, query=4)
    return gemma, ct.patch_model(gemma, target, source), target, source


def test_an_exception_inside_applied_undoes_everything(patched):
    model, mp, _, _ = patched
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mine"), mp.applied(model):
        raise RuntimeError("mine")
    assert unchanged(model, before)
    assert hook_count(model) == 0
    assert carried(model) == ()


@pytest.mark.parametrize("interrupted_in", ["target run", "source sweep"])
def test_ctrl_c_during_the_sweep_leaves_the_model_alone(gemma, interrupted_in):
    target, source = runs(context=9, query=4)
    before = snapshot(gemma)

    def press(stage, done, total):
        if stage == interrupted_in and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ct.patch_model(gemma, target, source, progress=press)
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


def test_ctrl_c_during_merge_restores(patched, monkeypatch):
    model, _, target, source = patched
    mp = ct.patch_model(model, target, source, scope="last")
    before = snapshot(model)
    from controllability.models import model_patch

    write, calls = model_patch.write, []

    def interrupted(*args):
        calls.append(1)
        write(*args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(model_patch, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mp.merge(model)
    assert unchanged(model, before)
    assert carried(model) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_are_bit_exact(dtype):
    model = tiny_gemma(dtype=dtype)
    target, source = runs(context=9, query=4)
    before = snapshot(model)
    mp = ct.patch_model(model, target, source, scope="last")
    assert unchanged(model, before)
    mp.merge(model)
    assert not unchanged(model, before)
    mp.unmerge(model)
    assert unchanged(model, before)


def test_merging_what_is_not_one_set_of_weights_is_refused(patched):
    model, mp, target, source = patched
    before = snapshot(model)
    with pytest.raises(ct.PatchError, match="scope 'each' holds 4 patches, one a position"):
        mp.merge(model)
    two = {k: v.repeat(2, 1) for k, v in target.items()}, {k: v.repeat(2, 1) for k, v in source.items()}
    with pytest.raises(ct.PatchError, match="scope 'last' holds 2 patches, one a sample"):
        ct.patch_model(model, *two, scope="last").merge(model)
    assert unchanged(model, before)
    one = ct.patch_model(model, target, {k: v[:, -1:] for k, v in source.items()})
    one.merge(model)  # scope "each" with one position is one set of weights
    with pytest.raises(ct.PatchError, match="merged already"):
        one.merge(model)
    one.unmerge(model)
    assert unchanged(model, before)
    with pytest.raises(ct.PatchError, match="not merged into this model"):
        one.unmerge(model)


def test_two_patches_at_once_are_refused_unless_made_on_top(gemma):
    model, (target, source) = gemma, runs(context=9, query=4)
    before = snapshot(model)
    mp = ct.patch_model(model, target, source, scope="last")
    other = ct.patch_model(model, target, source, via="output")
    overlap = (
        r"while it carried 0; both change model.layers.0.mlp.down_proj.weight and 3 more: .* make this patch inside"
    )
    with mp.applied(model):
        installed = hook_count(model)
        with (
            pytest.raises(ct.PatchError, match=rf"carries 1 patch and this one was made {overlap}"),
            other.applied(model),
        ):
            pass
        assert carried(model) == (mp.id,), "the first is left as it was"
        assert hook_count(model) == installed
        with torch.no_grad():
            assert torch.equal(model(**source).logits[:, -1], mp.logits[:, -1])
        on_top = ct.patch_model(model, target, source, via="output")
        with torch.no_grad(), on_top.applied(model):
            assert error(model(**source).logits, on_top.target_logits) < 5e-6
    below = r"carries 0 patches and this one was made while it carried 1: .* apply the patch first"
    with pytest.raises(ct.PatchError, match=below), on_top.applied(model):
        pass
    assert unchanged(model, before)
    assert carried(model) == ()
    assert hook_count(model) == 0


def test_patches_of_disjoint_parameters_are_refused_too(gemma):
    """The layers of one are not those of the other; but each was solved without what the other does."""
    target, source = runs(context=9, query=4)
    first, second = (ct.patch_model(gemma, target, source) for _ in range(2))
    first.entries, second.entries = (
        tuple(e for e in first.entries if e.layer == 0), tuple(e for e in second.entries if e.layer == 1)
    )  # fmt: skip
    refused = pytest.raises(ct.PatchError, match="carried 0: a patch is right only on top of")
    with first.applied(gemma), refused, second.applied(gemma):
        pass


@pytest.mark.parametrize("what", [None, "gemma"])
def test_what_is_no_model_is_refused(patched, what):
    with pytest.raises(ct.BadInput, match="the model must be a torch module, got"), patched[1].applied(what):
        pass


def test_the_same_patch_twice_is_refused(patched):
    model, mp, target, source = patched
    last = ct.patch_model(model, target, source, scope="last")
    with mp.applied(model), pytest.raises(ct.PatchError, match="this patch is on the model already"), mp.applied(model):
        pass
    last.merge(model)
    with pytest.raises(ct.PatchError, match="this patch is on the model already"), last.applied(model):
        pass
    last.unmerge(model)
    assert carried(model) == ()


def test_three_patches_on_top_of_each_other(gemma):
    """Each is made on top of those before it; where one is left, the ones below compute as they did."""
    before, seen = snapshot(gemma), []

    def put_on(seed):
        if seed == 3:
            return
        target, source = runs(context=9, query=1, seed=seed)
        mp = ct.patch_model(gemma, target, source, scope="last")
        with mp.applied(gemma):
            patched = gemma(**source).logits
            assert error(patched[:, -1], mp.target_logits.reshape(1, -1)) < 5e-6
            seen.append(mp.id)
            put_on(seed + 1)
            assert carried(gemma) == tuple(seen)
            assert torch.equal(gemma(**source).logits, patched)
            seen.pop()

    with torch.no_grad():
        put_on(0)
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


def test_a_module_that_is_replaced_is_read_anew(patched):
    """The reading that was checked is of another module then: one without parameters just as well."""
    model, _, target, source = patched
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh().eval()
    with pytest.raises(ct.ReadingError, match=r"layer 1 .*expression and module disagree"):
        ct.patch_model(model, target, source)


# --------------------------------------------------------------------------------------- how it is run


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_mode_of_autograd(gemma, mode, made_in):
    target, source = runs(context=9, query=4)
    before = snapshot(gemma)
    with made_in():
        mp = ct.patch_model(gemma, target, source)
    with mode():
        plain = gemma(**source).logits
        with mp.applied(gemma):
            patched = gemma(**source).logits
        assert error(patched, mp.target_logits) < 5e-6 < error(plain, mp.target_logits)
        assert torch.equal(gemma(**source).logits, plain)
    assert unchanged(gemma, before)


def test_a_whole_generation_with_one_patch(gemma):
    """Scope "last": every token of ``model.generate`` is computed with the patch, from a cache as without one."""
    target, source = runs(context=9, query=4, seed=2)
    before = snapshot(gemma)
    mp = ct.patch_model(gemma, target, {"input_ids": source["input_ids"]}, scope="last")
    ids = source["input_ids"]
    with torch.no_grad():
        plain = gemma.generate(ids, max_new_tokens=6, do_sample=False)
        with mp.applied(gemma):
            cached = gemma.generate(ids, max_new_tokens=6, do_sample=False)
            by_hand = ids
            for _ in range(6):
                by_hand = torch.cat([by_hand, gemma(by_hand, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached, by_hand)
        assert not torch.equal(cached, plain)
        assert int(cached[0, 4]) == int(mp.target_logits.reshape(-1, 60)[-1].argmax())
        assert torch.equal(gemma.generate(ids, max_new_tokens=6, do_sample=False), plain)
    assert unchanged(gemma, before)


def test_generating_with_a_patch_for_each_position_is_refused(patched):
    """After the first step the model gets one token, and the patch has one for each of four."""
    model, mp, _, source = patched
    before = snapshot(model)
    with pytest.raises(ct.PatchError, match=r"\(1, 4\) \(B, T\), the model got \(1, 1\): .* use scope 'last'"):
        generate_with(mp, model, source["input_ids"])
    assert unchanged(model, before)
    assert hook_count(model) == 0


def generate_with(mp, model, ids):
    with mp.applied(model):
        model.generate(ids, max_new_tokens=3, do_sample=False)


def test_gradient_checkpointing_changes_nothing(gemma):
    """It acts in training mode only, and models are patched in evaluation mode."""
    target, source = runs(context=9, query=4)
    gemma.activation_checkpointing_enable()
    mp = ct.patch_model(gemma, target, source)
    with mp.applied(gemma):
        assert error(gemma(**source).logits, mp.target_logits) < 5e-6


# ------------------------------------------------------------------------------------------- copies


def test_copies_of_a_model(patched):
    """A copy is another model with the same weights; one that would keep hooks is not made."""
    model, mp, _, source = patched
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        twin = copied(model)
        with torch.no_grad(), mp.applied(twin):
            assert error(twin(**source).logits, mp.target_logits) < 5e-6
            assert error(model(**source).logits, mp.target_logits) > 0.1, "the original is not patched"
        assert hook_count(twin) == 0
        with (
            mp.applied(model),
            pytest.raises(ct.PatchError, match="would keep its hooks; leave the context before copying"),
        ):
            copied(model)
    assert hook_count(model) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_patches_are_saved_and_not_pickled(patched, copied):
    _, mp, _, _ = patched
    with pytest.raises(ct.PatchError, match=r"neither copied nor pickled: write it with mp.save\(directory\)"):
        copied(mp)


def test_a_patch_of_each_refuses_other_shapes(patched):
    model, mp, target, _ = patched
    with (
        pytest.raises(ct.PatchError, match=r"for inputs of shape \(1, 4\) \(B, T\), the model got \(1, 13\)"),
        mp.applied(model),
    ):
        model(**target)
    assert hook_count(model) == 0


def test_another_model_is_refused(patched):
    _, mp, _, source = patched
    twin = tiny_gemma(layers=2)  # the same seed: the same weights
    with torch.no_grad(), mp.applied(twin):
        assert error(twin(**source).logits, mp.target_logits) < 5e-6
    with pytest.raises(ct.PatchError, match="made for other weights"), mp.applied(tiny_gemma(layers=2, seed=1)):
        pass
    with pytest.raises(ct.PatchError, match="made for other weights"), mp.applied(tiny_gemma(layers=2, d=64)):
        pass


def test_a_patch_whose_model_changed_is_refused(patched):
    model, mp, _, _ = patched
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ct.PatchError, match="changed since this patch was made"), mp.applied(model):
        pass


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.v_proj", "input_layernorm"])
def test_one_changed_entry_anywhere_is_noticed(patched, tmp_path, name):
    """Not only in the patched parameters: attention decides what the patch has to make up for."""
    model, mp, _, _ = patched
    with torch.no_grad():
        model.model.layers[0].get_submodule(name).weight.view(-1)[1] += 1e-3
    with pytest.raises(ct.PatchError, match="changed since this patch was made"), mp.applied(model):
        pass
    with pytest.raises(ct.PatchError, match="changed since this patch was made"):
        mp.save(tmp_path / "patch")


def test_merging_and_unmerging_another_patch_in_between_changes_nothing(patched):
    model, mp, target, source = patched
    other = ct.patch_model(model, target, source, scope="last")
    other.merge(model)
    other.unmerge(model)
    with torch.no_grad(), mp.applied(model):
        assert torch.equal(model(**source).logits, mp.logits)


def test_contexts_left_out_of_order_restore_every_bit(gemma):
    target, source = runs(context=9, query=4)
    before = snapshot(gemma)
    first = ct.patch_model(gemma, target, source, scope="last")
    with first.applied(gemma):
        second = ct.patch_model(gemma, target, source, scope="last")
    outer, inner = first.applied(gemma), second.applied(gemma)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ct.PatchError, match="left out of order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0
    assert carried(gemma) == ()
    assert all(isinstance(p, torch.nn.Parameter) for p in gemma.parameters())


def test_merging_while_a_patch_is_applied_is_refused(gemma):
    target, source = runs(context=9, query=4)
    before = snapshot(gemma)
    first = ct.patch_model(gemma, target, source, scope="last")
    with first.applied(gemma):
        second = ct.patch_model(gemma, target, source, scope="last")
        with pytest.raises(ct.PatchError, match="leave its context before merging"):
            second.merge(gemma)
    assert unchanged(gemma, before)


def test_unmerging_does_not_overwrite_what_was_changed_meanwhile(gemma):
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(gemma, target, source, scope="last")
    mp.merge(gemma)
    weight = gemma.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
    kept = weight.clone()
    with pytest.raises(ct.PatchError, match="changed since the merge: unmerging would overwrite that"):
        mp.unmerge(gemma)
    assert torch.equal(weight, kept)


def test_threads_wait_for_each_other(gemma):
    """Several threads solve and apply on one model: every result is right and every bit comes back."""
    import threading

    before, wrong = snapshot(gemma), []

    def work(seed):
        try:
            target, source = runs(context=9, query=4, seed=seed)
            for _ in range(4):
                mp = ct.patch_model(gemma, target, source)
                with torch.no_grad(), mp.applied(gemma):
                    if error(gemma(**source).logits, mp.target_logits) > 5e-6:
                        wrong.append(seed)
        except Exception as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert unchanged(gemma, before)
    assert carried(gemma) == ()


def test_saving_with_another_model_is_refused(patched, tmp_path):
    _, mp, _, _ = patched
    with pytest.raises(ct.PatchError, match="made for other weights"):
        mp.save(tmp_path / "patch", tiny_gemma(seed=4))
    assert not list(tmp_path.iterdir())


def test_a_patch_made_in_inference_mode_works_with_gradients(gemma):
    target, source = runs(context=9, query=4)
    with torch.inference_mode():
        mp = ct.patch_model(gemma, target, source)
    with mp.applied(gemma):
        gemma(**source).logits.sum().backward()
    assert gemma.model.layers[0].mlp.up_proj.weight.grad is not None


def test_scope_last_serves_longer_inputs(gemma):
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(gemma, target, source, scope="last")
    with torch.no_grad(), mp.applied(gemma):
        longer = gemma(input_ids=torch.randint(3, 60, (3, 7))).logits
    assert torch.isfinite(longer).all()


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
        description.write_text(description.read_text().replace('"version": 3', '"version": 7'))
    elif how == "other format":
        description.write_text("[]")
    elif how == "missing entry":
        description.write_text(description.read_text().replace('"rows_shape"', '"rows_shepe"'))
    elif how == "no json":
        description.unlink()


DAMAGE = {
    "truncated tensors": "corrupt or truncated", "flipped byte": "corrupt or truncated", "no tensors": "cannot read",
    "truncated json": "corrupt or truncated", "other version": "format version 7, this program reads version 3",
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
    from controllability.models import storing

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(storing, "_flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mp.save(tmp_path / "interrupted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_a_patch_of_each_refuses_other_tokens(patched, tmp_path):
    """A saved one too: the token ids it is valid for are in the file.  Scope "last" is one patch for any input."""
    model, mp, target, source = patched
    other = {**source, "input_ids": source["input_ids"].clone()}
    other["input_ids"][0, 2] = (other["input_ids"][0, 2] + 1) % 60
    mp.save(tmp_path / "patch")
    for patch in (mp, ct.load_patch(tmp_path / "patch")):
        with (
            torch.no_grad(),
            patch.applied(model),
            pytest.raises(ct.PatchError, match=r"at sample 0, position 2 it is token \d+, the model got \d+"),
        ):
            model(**other)
    assert hook_count(model) == 0
    last = ct.patch_model(model, target, source, scope="last")
    with torch.no_grad(), last.applied(model):
        assert torch.isfinite(model(**other).logits).all()
