"""The registry as a whole: what a family costs, the generated table, switches, ties between experts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import variants
from catalogued import every_row
from family_models import build, inputs
from helpers import hook_count, snapshot, unchanged
from transformers import FalconConfig, FalconForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

import architectures
import controllability as ct
from controllability.cli import catalogue
from controllability.models.exact_mode import exact_mode

ROOT = Path(__file__).parent.parent


def lines_of_each_family():
    """{family: lines of its own}: its declaration, and the builders that no other declaration uses."""
    costs, uses = {}, {}
    for path in sorted((ROOT / "architectures").glob("*.py")):
        tree = ast.parse(path.read_text())
        length = {n.name: n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, ast.FunctionDef)}
        for statement in tree.body:
            for call in ast.walk(statement):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("family", "without_feed_forward"):
                    named = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)} & set(length)
                    first = call.args[0]
                    names = first.value.split()[0] if isinstance(first, ast.Constant) else ast.unparse(first)
                    costs[names] = (call.end_lineno - call.lineno + 1, named, length)
                    for name in named:
                        uses[path, name] = uses.get((path, name), 0) + 1
    return {
        family: own + sum(length[n] for n in named if sum(v for (_, m), v in uses.items() if m == n) == 1)
        for family, (own, named, length) in costs.items()
    }


def test_a_family_costs_few_lines():
    costs = lines_of_each_family()
    assert len(costs) > 150
    long = {family: lines for family, lines in costs.items() if lines > 15}
    assert len(long) <= 20, long
    assert sorted(costs.values())[len(costs) // 2] <= 3, "most families are a line or two"


def test_the_table_in_the_docs_is_the_generated_one(monkeypatch):
    monkeypatch.setattr(catalogue, "rows", every_row)
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page.partition(variants.HEADING)[0] == catalogue.markdown()


def test_the_catalogue_names_culprits():
    rows = {row["name"]: row for row in every_row()}
    assert rows["mamba"]["verdict"] == "patchable"
    assert rows["mamba"]["places"] == ["mixer"]
    assert rows["llama"]["places"] == ["feed-forward", "mixer"]
    assert rows["mixtral"]["rules"][:3] == ["theorem-1", "T-before", "T-mixture"]
    assert all(row["rules"] or row["culprit"] for row in rows.values())


SWITCHES = {
    "gpt_neox sequential": (GPTNeoXForCausalLM, GPTNeoXConfig, {"use_parallel_residual": False}),
    "opt post-norm": (OPTForCausalLM, OPTConfig, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt without biases": (OPTForCausalLM, OPTConfig, {"enable_bias": False, "word_embed_proj_dim": 32}),
    "falcon sequential": (FalconForCausalLM, FalconConfig, {"parallel_attn": False, "new_decoder_architecture": False}),
    "falcon two norms": (FalconForCausalLM, FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon biases": (FalconForCausalLM, FalconConfig, {"bias": True, "new_decoder_architecture": False}),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_config_switches(name):
    cls, config, switch = SWITCHES[name]
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "max_position_embeddings": 64,
    } | ({"ffn_dim": 48} if config is OPTConfig else {"intermediate_size": 48} if config is GPTNeoXConfig else {})  # fmt: skip
    torch.manual_seed(0)
    model = cls(config(**sizes, **switch)).eval().double()
    ids = torch.randint(5, 95, (2, 12))
    with exact_mode(), torch.no_grad():
        mp = ct.patch_model(model, target={"input_ids": ids}, source={"input_ids": ids[:, 8:]})
        with mp.applied(model):
            patched = model(ids[:, 8:], use_cache=False).logits
    wanted = mp.target_logits
    assert float((patched - wanted).abs().max() / wanted.abs().max()) <= 1e-9


def test_doge_with_its_mixture_is_refused_by_name():
    model = build("doge")
    model.config.is_moe = True
    with pytest.raises(ct.NotControllable, match="reads neighbouring positions"):
        architectures.read(model)


def test_a_near_tie_between_experts_is_named_and_nothing_is_changed():
    model = build("mixtral", torch.float32)
    router = model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        router[1:] = router[0]  # every expert has the same logit
    target, source = inputs("mixtral", model)
    before = snapshot(model)
    with torch.no_grad(), pytest.raises(ct.SideConditionFailed) as failed:
        ct.patch_model(model, target=target, source=source)
    assert "near-tie" in failed.value.statement
    assert "via='output'" in failed.value.hint
    assert failed.value.layer == 1
    assert "sample 0, position 0" in str(failed.value)
    assert unchanged(model, before)
    assert hook_count(model) == 0
    with torch.no_grad():  # the other theorem keeps the source's experts, whatever they are
        mp = ct.patch_model(model, target=target, source=source, via="output")
    assert mp.report.residual < 1e-5


def test_experts_that_are_not_chosen_stay_as_they_are():
    model = build("mixtral", torch.float32)
    target, source = inputs("mixtral", model, batch=1)
    before = snapshot(model)
    with torch.no_grad():
        mp = ct.patch_model(model, target=target, source=source, scope="last")
        mp.merge(model)
    for entry in mp.entries:
        if not hasattr(entry.delta, "experts"):
            continue
        chosen = set(entry.delta.index.reshape(-1).tolist())
        stored, old = model.state_dict()[entry.param.name], before[entry.param.name]
        changed = {e for e in range(stored.shape[0]) if not torch.equal(stored[e], old[e])}
        assert changed == chosen
        assert len(chosen) < stored.shape[0]
    mp.unmerge(model)
    assert unchanged(model, before)
