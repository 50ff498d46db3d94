"""The second half of exact: what a small disturbance does, and what merging says about it."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from test_live_gemma import tiny_gemma

import controllability as ct
from controllability.models.sweep.report import FRAGILE, Sensitivity
from controllability.solvers.right_vector import right_vector


def fragile_gemma(seed=0, layers=4):
    """Norm scales that differ by orders of magnitude, as trained ones do: route uniform is fragile there."""
    model = tiny_gemma(layers=layers, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.post_feedforward_layernorm.weight
            weight.copy_(torch.exp(3 * torch.randn(weight.shape, generator=generator)) - 1)
    return model


def runs():
    ids = torch.randint(3, 50, (1, 14), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}, {"input_ids": ids[:, -4:], "position_ids": torch.arange(10, 14)[None]}


@pytest.mark.parametrize("scope", ["each", "last"])
def test_uniform_is_fragile_where_scales_differ_and_the_default_is_not(scope):
    model, (target, source) = fragile_gemma(), runs()
    found = {r: ct.patch_model(model, target, source, scope=scope, route=r) for r in ("auto", "uniform")}
    assert all(mp.report.residual < 1e-4 for mp in found.values())
    ratio = {route: mp.sensitivity.ratio for route, mp in found.items()}
    assert ratio["auto"] < FRAGILE < ratio["uniform"]
    assert "exact here, fragile elsewhere" in str(found["uniform"].report)


def test_the_ratio_is_what_noise_of_ones_own_does():
    """Against noise in the embeddings alone: the same order, and the same verdict."""
    model, (target, source) = fragile_gemma(), runs()
    grown = {}
    for route in ("auto", "uniform"):
        mp = ct.patch_model(model, target, source, scope="last", route=route)

        def noisy(size):
            states = model.get_input_embeddings()(source["input_ids"])
            noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
            inputs = {"inputs_embeds": states * (1 + size * noise), "position_ids": source["position_ids"]}
            return model(**inputs).logits[:, -1]

        with torch.no_grad(), mp.applied(model):
            clean = noisy(0.0)
            grown[route] = float((noisy(2e-5) - clean).abs().max() / clean.abs().max()) / 2e-5
        assert grown[route] < 10 * mp.sensitivity.patched
    assert grown["uniform"] > 5 * grown["auto"]


def test_a_fragile_patch_is_merged_saved_and_exported_with_a_warning(tmp_path):
    model, (target, source) = fragile_gemma(), runs()
    mp = ct.patch_model(model, target, source, scope="last", route="uniform")
    with pytest.warns(ct.ControllabilityWarning, match="fragile elsewhere"):
        mp.save(tmp_path / "patch")
    with pytest.warns(ct.ControllabilityWarning, match="relative error of about"):
        mp.merge(model)
    mp.unmerge(model)
    calm = ct.patch_model(model, target, source, scope="last")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ct.ControllabilityWarning)
        calm.save(tmp_path / "calm")
        calm.merge(model)
    assert calm.merged.relative_error < 1e-5 < 0.01 < calm.merged.unpatched
    calm.unmerge(model)


def test_a_merge_that_misses_says_so_unless_told_not_to_look():
    model, (target, source) = fragile_gemma().bfloat16(), runs()
    mp = ct.patch_model(model, target, source, scope="last", route="uniform")
    with pytest.warns(ct.ControllabilityWarning, match=r"misses its target.*without a patch"):
        mp.merge(model, corrected=False)
    mp.unmerge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ct.ControllabilityWarning)
        mp.merge(model, corrected=False, measured=False)
    mp.unmerge(model)


def test_a_merged_fit_is_held_against_what_it_gives_unmerged():
    model, (target, source) = fragile_gemma().bfloat16(), runs()
    mp = ct.patch_model(model, target, source, scope="all", rank=100)
    with pytest.warns(ct.ControllabilityWarning, match=r"misses its target.*applied"):
        mp.merge(model, corrected=False)
    assert mp.merged.relative_error > mp.merged.applied
    mp.unmerge(model)


def test_json_and_files_hold_it(tmp_path):
    model, (target, source) = fragile_gemma(), runs()
    mp = ct.patch_model(model, target, source, scope="last")
    told = json.loads(json.dumps(mp.report.to_dict()))["sensitivity"]
    assert set(told) == {"patched", "plain", "ratio"}
    assert told["ratio"] == pytest.approx(told["patched"] / told["plain"])
    mp.save(tmp_path / "patch")
    assert ct.load_patch(tmp_path / "patch").sensitivity == mp.sensitivity


def test_what_cannot_be_measured_says_why():
    model, (target, source) = fragile_gemma(), runs()
    mp = ct.patch_model(model, target, source, scope="last")
    mp.merge(model, measured=False)
    assert mp.sensitivity.patched is None
    assert "on the model already" in mp.sensitivity.note
    mp.unmerge(model)
    assert mp.sensitivity.ratio is not None
    assert str(Sensitivity(None, None, "no reason")) == "sensitivity: not measured (no reason)"


def test_a_corrected_merge_does_not_depend_on_the_callers_gradients():
    model, (target, source) = tiny_gemma(layers=3).bfloat16(), runs()
    mp, merged = ct.patch_model(model, target, source, scope="last"), []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            mp.merge(model)
        merged.append({name: value.detach().clone() for name, value in model.named_parameters()})
        mp.unmerge(model)
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())


def test_other_positions_feel_the_patch_less_than_with_the_plain_right_vector():
    """Σ_j (aᵀk_j)²/‖k_j‖² of every matrix, against a = z/‖z‖²; and exact all the same."""
    model, (target, source) = tiny_gemma(layers=2), runs()
    mp = ct.patch_model(model, target, source, scope="last")
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "mlp" in name:
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: x[0].detach()[0]}))
    with torch.no_grad(), mp.applied(model):
        model(**source)
    for entry in mp.entries:
        if entry.reads is None:
            continue
        z, others = entry.reads, seen[entry.module][:-1]
        a, plain = entry.delta.right.reshape(-1), z / z.dot(z)
        assert float(a.dot(z)) == pytest.approx(1, abs=1e-5)
        unit = others / others.norm(dim=-1, keepdim=True)
        assert float((unit @ a).square().sum()) <= float((unit @ plain).square().sum()) * (1 + 1e-5)


def test_the_right_vector_is_as_exact_as_its_numbers():
    """Four others have the weight 0.4, which float32 rounds."""
    z, others = (
        torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for shape in ((1, 8), (1, 4, 8))
    )
    assert abs(right_vector(z, others).numpy() - right_vector(z.numpy(), others.numpy())).max() < 1e-15
