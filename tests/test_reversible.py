"""Nothing is left behind: exceptions, interrupts, nesting, misuse, copies, other models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import error, hook_count, runs, snapshot, tiny_gemma, unchanged

import controllability as ct
from controllability.models.hooks.carried_patches import carried


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
    from controllability.models.patches import merging

    write, calls = merging.write, []

    def interrupted(*args):
        calls.append(1)
        write(*args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(merging, "write", interrupted)
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
