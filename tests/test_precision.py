"""Rounding: solved in float32 from what the model computed, made good from layer to layer, and foretold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_models import build, inputs
from helpers import error, runs, snapshot, tiny_gemma, unchanged

import controllability as ct
from controllability.deltas import Shift
from controllability.models.patches import merging
from controllability.models.patches.merging import wider

HALF = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # largest relative rounding error


def outputs_of(model, names, run):
    """What the named modules give while ``run()`` runs, hooks of a patch included."""
    seen, handles = {}, []
    for name in names:
        tell = lambda module, args, output, name=name: seen.__setitem__(name, output.detach().clone())  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(tell))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


# ------------------------------------------------------------------------------------------------ solving


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_solved_in_float32_and_rounded_once(dtype):
    """raw + gap is the target's output to the last bit; with the gap rounded to half precision it is not."""
    model = tiny_gemma(layers=2, dtype=dtype)
    target, source = runs(context=9, query=4)
    names = [f"model.layers.{i}.mlp.{part}" for i in range(2) for part in ("gate_proj", "up_proj")]
    mp = ct.patch_model(model, target, source)
    assert {t.dtype for e in mp.entries for t in vars(e.delta).values() if torch.is_tensor(t)} == {torch.float32}
    wanted = outputs_of(model, names, lambda: model(**target))
    with mp.applied(model):
        found = outputs_of(model, names, lambda: model(**source))
    rounded = 0
    for entry in mp.entries:
        if entry.module in names:
            goal = wanted[entry.module][:, -4:]
            assert torch.equal(found[entry.module], goal)
            raw = (goal.float() - entry.delta.left[None, :, 0]).to(dtype)
            rounded += int((raw + entry.delta.left[None, :, 0].to(dtype) != goal).sum())
    assert rounded > 0, "the negative control: a gap in half precision would miss some entries"


def disturbed(model, module, size, only=4):
    """Rounding in disguise: the states that enter ``module``, of ``only`` positions, are off by up to ``size`` (relative)."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0)).sign()

    def hook(_, args):
        x = args[0]
        return (x + size * x.abs().max() * noise[: x.shape[-1]], *args[1:]) if x.shape[1] == only else None

    return model.get_submodule(module).register_forward_pre_hook(hook)


def test_an_error_at_one_layer_is_made_good_by_the_next():
    """Patches solved from what the model really computed do not contain the error; patches solved without it do."""
    model = tiny_gemma(layers=3)
    target, source = runs(context=9, query=4)
    blind = ct.patch_model(model, target, source)
    handle = disturbed(model, "model.layers.1", 1e-2)
    mp = ct.patch_model(model, target, source)
    with torch.no_grad():
        with mp.applied(model):
            made_good = error(model(**source).logits, blind.target_logits)
        with blind.applied(model):
            carried_on = error(model(**source).logits, blind.target_logits)
    handle.remove()
    assert made_good < 5e-6
    assert carried_on > 1e-3
    handle = disturbed(model, "model.norm", 1e-3)  # after the last layer nothing makes it good
    mp = ct.patch_model(model, target, source)
    handle.remove()
    assert 1e-4 < error(mp.logits, mp.target_logits) < 1e-2


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_does_not_add_up_over_layers(dtype):
    """Eight layers are as exact as two: what is left is the last layer's rounding, and that of norm and head."""
    model = tiny_gemma(layers=8, dtype=dtype)
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(model, target, source)
    assert error(mp.logits, mp.target_logits) < 6 * UNIT[dtype]
    assert max(x.residual for x in mp.report.layers) < 6 * UNIT[dtype]
    with torch.no_grad():
        assert error(model(**source).logits, mp.target_logits) > 0.1


# ------------------------------------------------------------------------------------------------ amplification


@pytest.mark.parametrize("route", ["uniform", "secular", "scale"])
def test_the_amplification_foretells_what_a_rounding_error_becomes(route):
    """An error of the last map at the norm's most sensitive channel comes out as large as predicted, and never larger."""
    model = tiny_gemma(layers=1)
    target, source = runs(context=9, query=1)
    mp = ct.patch_model(model, target, source, route=route)
    scale = 1 + model.model.layers[0].post_feedforward_layernorm.weight.detach()
    delta = next(e.delta for e in mp.entries if isinstance(e.delta, Shift)).value[0]
    channel, size = int((scale + delta).abs().argmax()), 1e-5

    def run(shaken):
        names = ["model.layers.0.mlp.down_proj", "model.layers.0.post_feedforward_layernorm"]
        with mp.applied(model):

            def shake(_, args, y):
                y = y.clone()
                y[..., channel] += shaken * y.abs().max()
                return y

            handle = model.get_submodule(names[0]).register_forward_hook(shake)
            seen = outputs_of(model, names, lambda: model(**source))
            handle.remove()
        return [seen[name].double() for name in names]

    (y, exact), (_, shaken) = run(0.0), run(size)
    measured = float((shaken - exact).abs().max() / exact.abs().max()) / size
    amplification = mp.report.layers[0].tokens.amplification[0]
    assert 0.2 * amplification < measured < 1.1 * amplification
    assert float(y.abs().max()) > 0


# ------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gemma3", torch.bfloat16), ("gemma3", torch.float32), ("gpt2", torch.bfloat16), ("mixtral", torch.bfloat16)],
)
def test_what_merging_rounded_against_dense_matrices(name, dtype):
    """‖E‖/‖ΔW‖ and max |E x| / max |(W + ΔW) x| from dense float64 matrices; gpt2 stores them transposed."""
    model = tiny_gemma(dtype=dtype) if name == "gemma3" else build(name, dtype)
    target, source = runs(context=9, query=4) if name == "gemma3" else inputs(name, model, batch=1)
    before = snapshot(model)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.merge(model, corrected=False)
    told = {r.parameter: r for r in mp.report.rounding}
    assert list(told) == [str(e.param) for e in mp.entries]
    for entry in mp.entries:
        stored, delta = model.get_parameter(entry.param.name).detach().double(), entry.delta
        factors = {n: t.double() for n, t in vars(delta).items() if torch.is_tensor(t) and t.is_floating_point()}
        dense = replace(delta, **factors).dense()[0]
        exact = before[entry.param.name].double() + dense
        lost, size = stored - exact, float(dense.norm())
        if isinstance(delta, Shift):
            assert told[str(entry.param)].missed is None
        else:
            experts = getattr(delta, "index", None)
            read = delta.right if entry.reads is None else entry.reads
            pairs = [(lost, exact)] if experts is None else [(lost[e], exact[e]) for e in experts[0].tolist()]
            missed = [
                float((a @ x).abs().max() / (b @ x).abs().max())
                for (e, w), x in zip(pairs, read.double().reshape(len(pairs), -1), strict=True)
                for a, b in [(e.T, w.T) if delta.transposed else (e, w)]
            ]
            assert told[str(entry.param)].missed == pytest.approx(max(missed), rel=1e-2)
            assert UNIT[dtype] / 50 < told[str(entry.param)].missed < 10 * UNIT[dtype]
        assert told[str(entry.param)].relative == pytest.approx(float(lost.norm()) / size, rel=1e-2, abs=1e-9)
    mp.unmerge(model)
    assert unchanged(model, before)


def test_float64_has_nothing_wider_to_compare_with():
    assert wider(torch.float64) == torch.float64
    model = tiny_gemma(dtype=torch.float64)
    mp = ct.patch_model(model, *runs(context=9, query=1))
    mp.merge(model)
    assert all(r.relative == 0 for r in mp.report.rounding)
    mp.unmerge(model)


@pytest.mark.parametrize("route", ["uniform", "secular"])
@pytest.mark.parametrize("spread", [1, 3])
def test_the_merged_error_is_explained_by_the_reported_rounding(spread, route):
    """One layer, only its last map rounds: its branch misses at most amplification · (what was missed + its own rounding)."""
    norm, unit, found, bounds = "model.layers.0.post_feedforward_layernorm", UNIT[torch.bfloat16], [], []
    for seed in range(6):
        model = tiny_gemma(layers=1, d=64, dtype=torch.bfloat16, seed=seed)
        with torch.no_grad():
            model.get_submodule(norm).weight.mul_(spread)
        target, source = runs(context=9, query=1, seed=seed)
        mp = ct.patch_model(model, target, source, via="output", route=route)
        state = outputs_of(model, ["model.layers.0"], lambda m=model, t=target: m(**t))["model.layers.0"][
            0, -1
        ].double()
        mp.merge(model)
        seen = outputs_of(
            model, ["model.layers.0.post_attention_layernorm", norm, "model.layers.0"], lambda m=model, s=source: m(**s)
        )
        branch, out = seen[norm][0, -1].double(), seen["model.layers.0"][0, -1].double()
        missed = max(r.missed for r in mp.report.rounding if r.missed is not None)
        rounding = mp.report.layers[0].amplification * (missed + unit) + unit
        found.append(float((out - state).abs().max() / state.abs().max()))
        bounds.append(float(rounding * branch.abs().max() / state.abs().max()) + unit)
        mp.unmerge(model)
    assert all(f <= b for f, b in zip(found, bounds, strict=True))
    assert max(f / b for f, b in zip(found, bounds, strict=True)) > 0.1, "a bound that says something"


@pytest.mark.parametrize(
    ("dtype", "route"), [(torch.bfloat16, "auto"), (torch.float16, "auto"), (torch.bfloat16, "scale")]
)
def test_a_corrected_merge_does_not_add_rounding_up(dtype, route):
    plain, corrected, applied = [], [], []
    for seed in range(2):
        model = tiny_gemma(layers=4, dtype=dtype, seed=seed)
        target, source = runs(context=30, query=2, seed=seed)
        before = snapshot(model)
        mp = ct.patch_model(model, target, source, scope="last", route=route)
        for errors, options in ((plain, {"corrected": False}), (corrected, {})):
            mp.merge(model, **options)
            errors.append(mp.merged_error(model).relative_error)
            with torch.no_grad():
                assert errors[-1] == pytest.approx(error(model(**source).logits[:, -1:], mp.target_logits), rel=1e-6)
            mp.unmerge(model)
            assert unchanged(model, before)
        applied.append(error(mp.logits[:, -1:], mp.target_logits))
    assert sum(corrected) < sum(plain) / 2
    assert sum(applied) < sum(plain) / 2


def test_a_corrected_merge_that_fails_halfway_restores_every_bit(monkeypatch):
    model = tiny_gemma(layers=3, dtype=torch.bfloat16)
    before = snapshot(model)
    mp = ct.patch_model(model, *runs(context=9, query=2), scope="last")
    write, written = merging.write, []

    def interrupted(*args):
        written.append(args)
        if len(written) == 6:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(merging, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mp.merge(model, corrected=True)
    assert unchanged(model, before)
    assert not mp.report.rounding
    monkeypatch.undo()
    mp.merge(model, corrected=True)
    mp.unmerge(model)
    assert unchanged(model, before)


def test_a_loaded_patch_can_be_merged_with_correction(tmp_path):
    model = tiny_gemma(layers=3, dtype=torch.bfloat16)
    target, source = runs(context=9, query=2)
    mp = ct.patch_model(model, target, source, scope="last")
    mp.save(tmp_path / "patch")
    loaded = ct.load_patch(tmp_path / "patch")
    with pytest.raises(ct.PatchError, match="not merged into this model: merge it first"):
        loaded.merged_error(model)
    loaded.merge(model, corrected=True)
    with torch.no_grad():
        assert error(model(**source).logits[:, -1:], mp.target_logits) < 0.03
    with pytest.raises(ct.PatchError, match="does not hold the target's logits"):
        loaded.merged_error(model)
    loaded.unmerge(model)
