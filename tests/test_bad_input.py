"""Every bad input gives one clear error and changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers import hook_count, runs, snapshot, tiny_gemma, unchanged

import architectures
import controllability as ct
from controllability.components import residual


def ids(*shape):
    return torch.randint(3, 60, shape)


BAD_RUNS = {
    "query longer than target": (
        {"input_ids": ids(1, 3)}, {"input_ids": ids(1, 5)},
        "sample 0: the query has 5 tokens and its target only 3; the target must be the context followed by the query",
    ),
    "empty source": ({"input_ids": ids(1, 3)}, {"input_ids": ids(1, 0)}, r"source: the input is empty \(shape \(1, 0\)\)"),
    "empty target": ({"input_ids": ids(0, 3)}, {"input_ids": ids(1, 3)}, r"target: the input is empty"),
    "no ids": ({}, {"input_ids": ids(1, 3)}, "target: give input_ids"),
    "list": ({"input_ids": [[1, 2]]}, {"input_ids": ids(1, 1)}, "target: give input_ids"),
    "wrong rank": ({"input_ids": ids(3)}, {"input_ids": ids(1, 3)}, r"target: input_ids must be integers of shape \(B, T\)"),
    "float ids": ({"input_ids": ids(1, 3).float()}, {"input_ids": ids(1, 3)}, "must be integers"),
    "batches differ": ({"input_ids": ids(2, 5)}, {"input_ids": ids(1, 3)}, "source has 1 samples, target 2"),
    "id out of range": ({"input_ids": torch.tensor([[1, 999]])}, {"input_ids": ids(1, 1)}, r"token ids must lie in 0 … 59, got 1 … 999"),
    "beyond the position limit": ({"input_ids": ids(1, 130)}, {"input_ids": ids(1, 3)}, "target: position 129 lies beyond the model's limit of 128"),
    "positions beyond the limit": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "position_ids": torch.tensor([[126, 127, 128]])},
        "source: position 128 lies beyond the model's limit of 128",
    ),
    "mask of another shape": (
        {"input_ids": ids(1, 9), "attention_mask": torch.ones(1, 8)}, {"input_ids": ids(1, 3)},
        r"target: attention_mask must have the shape of the input, \(1, 9\)",
    ),
    "mask with NaN": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "attention_mask": torch.tensor([[1.0, float("nan"), 1.0]])},
        "source: attention_mask has NaN in it",
    ),
    "only padding": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "attention_mask": torch.zeros(1, 3)},
        "source: sample 0 has no token that is not padding",
    ),
    "not a mapping": (ids(1, 9), {"input_ids": ids(1, 3)}, "target: give the model's keyword arguments as a mapping, got Tensor"),
    "a cache": ({"input_ids": ids(1, 9), "past_key_values": object()}, {"input_ids": ids(1, 3)}, "both runs begin with an empty cache"),
    "tuples asked for": ({"input_ids": ids(1, 9), "return_dict": False}, {"input_ids": ids(1, 3)}, "return_dict=False"),
    "listed positions": ({"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "position_ids": [[1, 2, 3]]}, "position_ids"),
    "negative positions": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "position_ids": torch.tensor([[-1, 0, 1]])},
        r"source: position_ids must be integers from 0 on, got torch.int64 from -1",
    ),
    "fractional positions": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "position_ids": torch.tensor([[0.0, 1.0, 2.0]])},
        r"source: position_ids must be integers from 0 on, got torch.float32",
    ),
    "too few positions": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "position_ids": torch.tensor([[1, 2]])},
        r"source: position_ids must be a tensor of shape \(1, 3\)",
    ),
    "other embeddings": (
        {"input_ids": ids(1, 9)}, {"inputs_embeds": torch.zeros(1, 3, 7)},
        r"inputs_embeds must be torch.float32 of width 32, got torch.float32 of shape \(1, 3, 7\)",
    ),
    "ids and embeddings": ({"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}, "not both"),
    "a sparse mask": (
        {"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3), "attention_mask": torch.ones(1, 3).to_sparse()},
        "source: attention_mask must be a dense tensor",
    ),
    "ids without numbers": ({"input_ids": ids(1, 9)}, {"input_ids": ids(1, 3).to("meta")}, "source: input_ids must be a dense tensor"),
    "an argument without a name": ({"input_ids": ids(1, 9), 1: 2}, {"input_ids": ids(1, 3)}, "keyword arguments by name, got 1"),
    "boolean ids": ({"input_ids": ids(1, 9) > 4}, {"input_ids": ids(1, 3)}, "must be integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_runs(gemma, name):
    target, source, message = BAD_RUNS[name]
    before = snapshot(gemma)
    with pytest.raises(ct.BadInput, match=message):
        ct.patch_model(gemma, target, source)
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "some"}, "unknown scope 'some'"),
        ({"scope": "some"}, "unknown scope 'some': choose each, last or all"),
        ({"scope": "all", "ridge": -1.0}, "ridge must be a finite number from 0 on, got -1.0"),
        ({"scope": "all", "rank": 0}, "rank must be a whole number from 1 on, or None, got 0"),
        (
            {"scope": "last", "keep_rms": True},
            r"keep_rms belong to scope 'all' \(one patch for many tokens\), not to 'last'",
        ),
        ({"via": "x"}, "unknown theorem"),
        ({"route": "x"}, "unknown route 'x'"),
        ({"positions": ([0], [0, 1])}, r"positions: \(1, 1\) source positions"),
        ({"positions": ([1, 1], [5, 9])}, "a source position is named twice"),
        ({"positions": ([], [])}, r"positions: \(1, 0\) source positions"),
        ({"positions": ([0.5], [1.5])}, "give as many integers of each"),
        ({"positions": "ab"}, "positions must be"),
        ({"progress": 3}, "progress must be a function"),
        ({"route": []}, "route must be a name, got list"),
        ({"positions": (torch.tensor([9]), torch.tensor([0]))}, r"source positions must lie in 0 … 3"),
    ],
)
def test_bad_options(gemma, options, message):
    target, source = runs(context=9, query=4)
    with pytest.raises(ct.BadInput, match=message):
        ct.patch_model(gemma, target, source, **options)
    assert hook_count(gemma) == 0


def test_non_finite_attention_weights_are_named(gemma):
    with torch.no_grad():
        gemma.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ct.BadInput, match=r"parameter model.layers.0.self_attn.q_proj.weight holds NaN"):
        ct.patch_model(gemma, *runs(context=9, query=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(gemma, value):
    with torch.no_grad():
        gemma.model.layers[1].mlp.down_proj.weight[3, 3] = value
    with pytest.raises(
        ct.BadInput, match=r"parameter model.layers.1.mlp.down_proj.weight holds NaN or infinite values"
    ):
        ct.patch_model(gemma, *runs(context=9, query=4))


def test_weights_spoiled_after_a_good_patch_are_noticed(gemma):
    ct.patch_model(gemma, *runs(context=9, query=4))
    with torch.no_grad():
        gemma.model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(ct.BadInput, match="gate_proj"):
        ct.patch_model(gemma, *runs(context=9, query=4))


@pytest.mark.parametrize("where", ["target", "source"])
def test_a_state_that_overflows_at_any_position_is_named(where):
    model = tiny_gemma()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 1e38
    target, source = runs(context=9, query=4)
    source["input_ids"] = source["input_ids"].clone()
    chosen = target if where == "target" else source
    for inputs in (target, source):
        inputs["input_ids"][inputs["input_ids"] == 7] = 8
    chosen["input_ids"][0, 1] = 7
    before = snapshot(model)
    with pytest.raises(ct.BadInput, match=rf"{where} run: the state .* layer 0 is not finite at sample 0, position \d"):
        ct.patch_model(model, target, source)
    assert unchanged(model, before)
    assert hook_count(model) == 0


def test_zero_activation_is_named_with_layer_position_and_component(gemma):
    with torch.no_grad():
        gemma.model.layers[1].mlp.up_proj.weight.zero_()
    before = snapshot(gemma)
    with pytest.raises(ct.SideConditionFailed) as failed:
        ct.patch_model(gemma, *runs(context=9, query=4))
    text = str(failed.value)
    assert text.startswith(
        "side condition failed at layer 1, linear model.layers.1.mlp.down_proj.weight, sample 0, position 0: "
        "the input of model.layers.1.mlp.down_proj.weight is not zero (margin 0)"
    )
    assert "tried:" in text
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


def test_another_derivation_is_tried_when_a_condition_fails(gemma):
    """Zero gate and up weights in one layer: z' is irrelevant, nothing can be steered inside but nothing has to be."""
    target, source = runs(context=9, query=4)
    with torch.no_grad():  # dead channels in the norm's input: route scale fails, auto does not
        gemma.model.layers[0].mlp.down_proj.weight[5].zero_()
    with pytest.raises(ct.SideConditionFailed, match=r"no input coordinate of .* is zero where its output must change"):
        ct.patch_model(gemma, target, source, route="scale")
    mp = ct.patch_model(gemma, target, source, route="auto")
    assert mp.report.residual < 5e-6


def test_training_mode_meta_and_quantised_parameters_are_refused():
    target, source = runs(context=9, query=4)
    with pytest.raises(ct.BadInput, match=r"call model.eval\(\) first"):
        ct.patch_model(tiny_gemma().train(), target, source)
    model = tiny_gemma()
    ct.patch_model(model, target, source)
    with pytest.raises(ct.BadInput, match="training mode"):
        ct.patch_model(model.train(), target, source)
    with pytest.raises(ct.BadInput, match="must be a torch module, got str"):
        ct.patch_model("gemma3", target, source)
    with pytest.raises(ct.BadInput, match="on the meta device"):
        ct.patch_model(tiny_gemma().to("meta"), target, source)
    model = tiny_gemma()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ct.BadInput, match=r"up_proj.weight is torch.int8: quantised parameters cannot be patched"):
        ct.patch_model(model, target, source)


def test_unregistered_models_are_refused_by_name():
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    llama.config.model_type = "lama"
    with pytest.raises(ct.BadInput, match="unknown architecture or model type 'lama'; close to it: llama"):
        ct.patch_model(llama, *runs(context=9, query=4))
    with pytest.raises(ct.BadInput, match=r"Linear has no config.model_type"):
        architectures.read(torch.nn.Linear(2, 2))
    with pytest.raises(ct.BadInput, match="unknown architecture or model type 'nonsense'"):
        architectures.block("nonsense")


def test_a_family_that_changed_is_noticed_before_any_patch(gemma):
    """A module with another activation, a doubled norm, a renamed parameter: the reading is never trusted."""
    gemma.model.layers[1].mlp.act_fn = torch.nn.ReLU().eval()
    with pytest.raises(
        ct.ReadingError, match=r"layer 1 .* disagree at model.layers.1.mlp.down_proj: relative difference"
    ):
        ct.patch_model(gemma, *runs(context=9, query=4))
    other = tiny_gemma()
    other.model.layers[0].pre_feedforward_layernorm.forward = lambda x: 2 * x
    with pytest.raises(ct.ReadingError, match=r"disagree at model.layers.0.pre_feedforward_layernorm"):
        ct.patch_model(other, *runs(context=9, query=4))
    third = tiny_gemma()
    del third.model.layers[0].mlp.gate_proj
    with pytest.raises(ct.ReadingError, match=r"the model has no parameter model.layers.0.mlp.gate_proj.weight"):
        ct.patch_model(third, *runs(context=9, query=4))


def test_two_registrations_of_one_name_are_refused():
    options = {"layer_class": "X", "topology": "t", "feed_forward": "f", "settings": lambda c: {}, "defaults": {}}
    with pytest.raises(ct.BadInput, match="architecture 'gemma3' is registered already"):
        architectures.register("gemma3", model_types=("new",), **options)
    with pytest.raises(ct.BadInput, match="model type 'gemma3_text' is registered already, by architecture 'gemma3'"):
        architectures.register("mine", model_types=("gemma3_text",), **options)


def test_sums_and_products_need_two_parts():
    from controllability.components import Identity, Product, Sum

    for kind in (Sum, Product):
        with pytest.raises(ct.BadInput, match="at least two"):
            kind((Identity(),))
    with pytest.raises(ct.BadInput, match="sample takes a component, got str"):
        ct.sample("gemma3")
    with pytest.raises(ct.BadInput, match="the width of the block's input is not known"):
        ct.sample(residual(Identity()))
