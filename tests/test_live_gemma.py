"""Theorem 2 on live Gemma 3 models: the patched run equals the target run, the weights do the work."""

from __future__ import annotations

import pytest
import torch
from helpers import error, exactly, hook_count, runs, snapshot, tiny_gemma, unchanged
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

import architectures
import controllability as ct
from controllability.models.hooks.carried_patches import carried

LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.02}


@torch.no_grad()
def check(model, target, source, limit, scope="each", **options):
    """Patch, apply, compare at the paired positions; returns the patch."""
    wanted = model(**target).logits
    unpatched = model(**source).logits
    mp = ct.patch_model(model, target, source, scope=scope, **options)
    with mp.applied(model):
        patched = model(**source).logits
    count = 1 if scope == "last" else source["input_ids"].shape[1]
    assert error(patched[:, -count:], wanted[:, -count:]) <= limit
    assert error(mp.logits[:, -count:], wanted[:, -count:]) <= limit
    assert torch.equal(mp.logits, patched), "the sweep's logits are those of the model with the patch applied"
    assert error(unpatched[:, -count:], wanted[:, -count:]) > 0.1
    assert torch.equal(model(**source).logits, unpatched), "undone on exit"
    return mp


@pytest.mark.parametrize("route", ["auto", "balanced", "uniform", "scale", "secular"])
@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("scope", ["each", "last"])
def test_every_route_theorem_and_scope_in_exact_mode(scope, via, route):
    model = tiny_gemma(layers=3, dtype=torch.float64)
    target, source = runs(context=9, query=5, batch=2)
    with exactly(torch.float64):
        check(model, target, source, 1e-11 if route == "scale" else 1e-12, scope, via=via, route=route)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("route", ["auto", "uniform"])
def test_eight_layers_at_the_precision_promised(dtype, route):
    model = tiny_gemma(layers=8, d=256, h=768, vocab=512, dtype=dtype, sliding_window=32)
    target, source = runs(context=64, query=8, vocab=512)
    with exactly(dtype):
        mp = check(model, target, source, LIMITS[dtype], route=route)
        naive = ct.patch_model(model, target, source, route="scale")
    largest = [
        max(v for x in p.report.layers for k, v in x.relative_changes.items() if "norm" in k) for p in (mp, naive)
    ]
    assert largest[1] >= 100 * largest[0]
    assert all(layer.residual <= 4 * LIMITS[dtype] for layer in mp.report.layers)
    assert len(mp.report.layers) == 8


def test_the_patch_is_weights_merged_into_a_plain_model_it_does_the_same(gemma, tmp_path):
    """No hook, no context: W + ΔW and the new scale in the parameters of a plain transformers model."""
    target, source = runs(context=9, query=4)
    before = snapshot(gemma)
    mp = ct.patch_model(gemma, target, source, scope="last")
    with torch.no_grad():
        wanted, unpatched = gemma(**target).logits[:, -1], gemma(**source).logits[:, -1]
        kept = mp.merge(gemma)
        assert hook_count(gemma) == 0
        assert kept == sum(before[e.param.name].numel() * 4 for e in mp.entries)
        gemma.save_pretrained(tmp_path / "merged")
        fresh = type(gemma).from_pretrained(tmp_path / "merged").eval()
        assert error(fresh(**source).logits[:, -1], wanted) < 5e-6 < error(unpatched, wanted)
    mp.unmerge(gemma)
    assert unchanged(gemma, before)


def test_only_the_feed_forward_parameters_move(gemma):
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(gemma, target, source)
    kinds = {e.param.name.split(".", 3)[3] for e in mp.entries}
    assert kinds == {
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "post_feedforward_layernorm.weight",
    }
    output = ct.patch_model(gemma, target, source, via="output")
    assert {e.param.name.split(".", 3)[3] for e in output.entries} == {
        "mlp.down_proj.weight",
        "post_feedforward_layernorm.weight",
    }
    assert output.numbers < mp.numbers < mp.dense_numbers / 4


def test_hidden_states_are_not_overwritten(gemma):
    """With the patch applied, each module's output is its own patched weights times its own input."""
    target, source = runs(context=9, query=1)
    mp = ct.patch_model(gemma, target, source)
    seen = {}
    layer = gemma.model.layers[1]
    with torch.no_grad(), mp.applied(gemma):
        handles = [
            m.register_forward_hook(lambda mod, args, out, n=n: seen.__setitem__(n, (args[0].clone(), out.clone())))
            for n, m in (
                ("gate_proj", layer.mlp.gate_proj),
                ("down_proj", layer.mlp.down_proj),
                ("norm", layer.post_feedforward_layernorm),
            )
        ]
        gemma(**source)
        for handle in handles:
            handle.remove()
    deltas = {e.param.name.removeprefix("model.layers.1."): e.delta for e in mp.entries}
    for name in ("gate_proj", "down_proj"):
        x, y = seen[name]
        dense = getattr(layer.mlp, name).weight + deltas[f"mlp.{name}.weight"].dense()[0]
        assert error(y[0, 0], dense @ x[0, 0]) < 1e-5
    x, y = seen["norm"]
    scale = 1 + layer.post_feedforward_layernorm.weight + deltas["post_feedforward_layernorm.weight"].value[0]
    assert error(y[0, 0], scale * x[0, 0] / (x[0, 0].pow(2).mean() + 1e-6).sqrt()) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["each", "last"])
def test_padding_is_respected_per_sample(side, scope):
    model = tiny_gemma(layers=2, dtype=torch.float64)
    contexts, queries = [7, 4], [3, 5]
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 60, (c + q,), generator=generator) for c, q in zip(contexts, queries, strict=True)]

    def batch(rows, starts):
        length = max(len(r) for r in rows)
        out = {
            k: torch.zeros(len(rows), length, dtype=torch.long) for k in ("input_ids", "attention_mask", "position_ids")
        }
        for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            out["input_ids"][b, where], out["attention_mask"][b, where] = row, 1
            out["position_ids"][b, where] = torch.arange(start, start + len(row))
        return out

    target = batch(ids, [0, 0])
    source = batch([r[c:] for r, c in zip(ids, contexts, strict=True)], contexts)
    with exactly(torch.float64), torch.no_grad():
        mp = ct.patch_model(model, target, source, scope=scope)
        with mp.applied(model):
            patched = model(**source).logits
        for b, (row, c) in enumerate(zip(ids, contexts, strict=True)):
            alone = model(row[None]).logits[0, c:]
            mine = patched[b][source["attention_mask"][b].bool()]
            count = 1 if scope == "last" else len(mine)
            assert error(mine[-count:], alone[-count:]) < 1e-12


def test_explicit_positions_pair_what_the_caller_says():
    model = tiny_gemma(layers=2, dtype=torch.float64)
    target, _ = runs(context=9, query=3)
    source = {"input_ids": target["input_ids"][:, 2:5]}
    with exactly(torch.float64), torch.no_grad():
        mp = ct.patch_model(model, target, source, positions=(torch.tensor([0, 2]), torch.tensor([11, 4])))
        with mp.applied(model):
            patched = model(**source).logits[0]
        wanted = model(**target).logits[0]
        assert error(patched[[0, 2]], wanted[[11, 4]]) < 1e-12
        assert error(patched[1], wanted[3]) > 1e-3


def test_any_pair_of_runs_will_do():
    """Another context instead of none: "with" and "without" are only names (theory 1)."""
    model = tiny_gemma(layers=2, dtype=torch.float64)
    target, _ = runs(context=9, query=3)
    other, _ = runs(context=4, query=3, seed=5)
    with exactly(torch.float64):
        check(
            model, target, {"input_ids": torch.cat([other["input_ids"][:, :4], target["input_ids"][:, -3:]], 1)}, 1e-12
        )


def test_logits_to_keep_and_embeddings_pass_through():
    model = tiny_gemma(layers=2)
    target, source = runs(context=9, query=3)
    with torch.no_grad():
        mp = ct.patch_model(model, {**target, "logits_to_keep": 1}, {**source, "logits_to_keep": 1})
        assert mp.logits.shape == mp.target_logits.shape == (1, 1, 60)
        assert error(mp.logits, model(**target).logits[:, -1:]) < 5e-6
        embedded = {
            "inputs_embeds": model.get_input_embeddings()(source["input_ids"]),
            "position_ids": source["position_ids"],
        }
        assert error(ct.patch_model(model, target, embedded).logits, model(**target).logits[:, -3:]) < 5e-6


def test_the_text_model_inside_the_multimodal_class():
    text = tiny_gemma().config.to_dict()
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    reading = architectures.read(model)
    assert [layer.name for layer in reading.layers] == [f"model.language_model.layers.{i}" for i in range(2)]
    target, source = runs(context=9, query=4, vocab=50)
    with exactly(torch.float64):
        check(model, target, source, 1e-12)


def test_reading_binds_parameters_without_copying(gemma):
    layer = architectures.read(gemma).layers[1]
    for name, value in layer.params.items():
        assert value.data_ptr() == gemma.get_parameter(name).data_ptr()
    assert set(layer.params) <= set(gemma.state_dict())


def test_report_holds_what_the_issue_asks_for(gemma):
    target, source = runs(context=9, query=4)
    report = ct.patch_model(gemma, target, source).report.to_dict()
    assert report["residual"] == max(layer["residual"] for layer in report["layers"]) < 5e-6
    for layer in report["layers"]:
        assert layer["route"] == "balanced"
        assert "amplification" in layer["why"]
        assert 0 < layer["amplification"] < 100
        assert all(m["margin"] is None or m["margin"] > 0 for m in layer["margins"])
        assert len(layer["margins"]) >= 3
        assert len(layer["relative_changes"]) == 4
        assert all(value >= 0 for value in layer["relative_changes"].values())


def test_a_second_patch_made_on_top_of_the_first_composes():
    model = tiny_gemma(layers=2, dtype=torch.float64)
    target, source = runs(context=9, query=3)
    with exactly(torch.float64), torch.no_grad():
        first = ct.patch_model(model, target, source, scope="last")
        with first.applied(model):
            wanted = model(**target).logits
            second = ct.patch_model(model, target, source, scope="last")
            with second.applied(model):
                assert carried(model) == (first.id, second.id)
                assert error(model(**source).logits[:, -1], wanted[:, -1]) < 1e-12
        with pytest.raises(ct.PatchError, match="made while it carried 1"), second.applied(model):
            pass


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad])
def test_works_under_inference_mode(gemma, inference):
    target, source = runs(context=9, query=4)
    with inference():
        mp = ct.patch_model(gemma, target, source)
        with mp.applied(gemma):
            assert error(gemma(**source).logits, mp.target_logits) < 5e-6


def test_zero_norm_scales_in_a_live_model():
    model = tiny_gemma(layers=2, dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].post_feedforward_layernorm.weight[:5] = -1.0  # effective scale 0
    target, source = runs(context=9, query=4)
    with exactly(torch.float64):
        check(model, target, source, 1e-12)
