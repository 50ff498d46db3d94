"""Adapters that servers accept: by second readers of their rules, by plain checkpoints, and by the real peft."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from compiled_facts import facts, load
from family_models import build, default_dtype, inputs
from helpers import hook_count, runs, snapshot, tiny_gemma, unchanged
from safetensors.torch import load_file, save_file
from server_readers import as_sglang, as_vllm, checkpoint, served
from small_models import llama

import controllability as ct
from controllability.cli.main import main
from controllability.compiling import servable
from controllability.models.files.server_rules import verdict
from controllability.models.reading import heads

peft = pytest.importorskip("peft")

EXACT = ("llama", "qwen3", "mistral")  # no norm behind the map
MIXTURES = {
    "mixtral": "block_sparse_moe.experts.0.w2",
    "qwen3_moe": "mlp.experts.0.down_proj",
    "qwen2_moe": "mlp.experts.0.down_proj",
}
BOTH = {"vllm": as_vllm, "sglang": as_sglang}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def patched(name, **options):
    """(model, patch of two queries and all their tokens)."""
    with default_dtype(name):
        model = build(name, torch.float32)
        target, source = inputs(name, model, batch=2)
        return model, ct.patch_model(model, target, source, scope="all", via="output", **options)


def kl_by_hand(model, patch):
    """Each query alone: the largest KL of a position from the contextual model ``patch`` was made of, in float64."""
    worst, source = 0.0, patch.inputs["source"]
    for one in range(len(source["input_ids"])):
        part = {name: value[one : one + 1] for name, value in source.items()}
        found = model(**part).logits.double().log_softmax(-1)
        wanted = patch.wanted[one].double().log_softmax(-1)
        worst = max(worst, float((wanted.exp() * (wanted - found[0])).sum(-1).max()))
    return worst


def with_wanted(model, patch):
    """The contextual model's logits at the queries' tokens, each query alone."""
    target, length = patch.inputs["target"], patch.inputs["source"]["input_ids"].shape[1]
    patch.wanted = [
        model(**{name: value[i : i + 1] for name, value in target.items()}).logits[0, -length:]
        for i in range(len(target["input_ids"]))
    ]
    return patch


# ------------------------------------------------------------------------------------------- what is exact


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_patch_is_served_exactly(name, tmp_path):
    model, patch = patched(name)
    with_wanted(model, patch)
    before, unpatched = snapshot(model), kl_by_hand(model, patch)
    base = checkpoint(model, tmp_path / "base")
    for server, read in BOTH.items():
        done = ct.export_servable(patch, tmp_path / server, server, 8, model)
        assert done["rank"] == done["needed"] == 8 and not done["refitted"]
        assert done["verdicts"][server] == {"accepted": True, "reasons": [], "flags": "--enable-lora --max-lora-rank 8"}
        assert done["kl"]["adapter"]["worst_query"] <= 1e-6 < 0.05 < done["kl"]["unpatched"]["mean"]
        there = served(model, read(tmp_path / server, base, 8), base, tmp_path / f"{server}-merged")
        assert kl_by_hand(there, patch) <= 1e-6 < 0.05 < unpatched
        adapted = peft.PeftModel.from_pretrained(build(name, torch.float32), str(tmp_path / server)).eval()
        assert kl_by_hand(adapted, patch) <= 1e-6
        half = served(model, read(tmp_path / server, base, 8), base, tmp_path / f"{server}-half", torch.bfloat16)
        rounding = done["kl"]["adapter, bfloat16"]["worst_query"]
        assert kl_by_hand(half, patch) < 0.01 and 0 < rounding < 0.01
    assert unchanged(model, before) and not hook_count(model)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_have_the_keys_that_servers_read(name, tmp_path):
    model, patch = patched(name)
    with_wanted(model, patch)
    base = checkpoint(model, tmp_path / "base")
    for server, read in BOTH.items():
        done = ct.export_servable(patch, tmp_path / server, server, None, model)
        assert done["verdicts"]["vllm"]["accepted"] and done["verdicts"]["sglang"]["accepted"]
        keys = load_file(tmp_path / server / "adapter_model.safetensors")
        assert any(MIXTURES[name] in key for key in keys) and not any("base_layer" in key for key in keys)
        there = served(model, read(tmp_path / server, base, 32), base, tmp_path / f"{server}-merged")
        assert kl_by_hand(there, patch) <= 1e-6
    found = ct.export_servable(patch, tmp_path / "peft", "peft", None, model)["verdicts"]
    assert found["peft"]["accepted"] and not found["vllm"]["accepted"]
    assert "received" in found["vllm"]["reasons"][0]
    with pytest.raises(ValueError, match="received"):
        as_vllm(tmp_path / "peft", base, 32)


def test_mixtrals_adapter_for_vllm_is_one_for_peft_too(tmp_path):
    model, patch = patched("mixtral")
    with_wanted(model, patch)
    assert ct.export_servable(patch, tmp_path / "a", "vllm", None, model)["verdicts"]["peft"]["accepted"]
    adapted = peft.PeftModel.from_pretrained(build("mixtral", torch.float32), str(tmp_path / "a")).eval()
    assert kl_by_hand(adapted, patch) <= 1e-6
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):  # as docs/serving.md says
        adapted(**patch.inputs["source"], adapter_names=["default", "default"])


def test_experts_that_checkpoints_stack_are_refused_by_name(tmp_path):
    model, patch = patched("gpt_oss")
    with pytest.raises(ct.PatchError, match=r"vllm would not take this adapter: .* received .*experts\.") as failed:
        ct.export_servable(patch, tmp_path / "a", "vllm", None, model)
    assert "nothing was written" in str(failed.value) and not [*tmp_path.iterdir()]
    assert ct.export_servable(patch, tmp_path / "a", "peft", None, model)["verdicts"]["peft"]["accepted"]


def test_a_model_whose_buffers_do_not_follow_its_parameters_is_compared_in_its_own_dtype(tmp_path):
    model, patch = patched("minimax")
    kl = ct.export_servable(patch, tmp_path / "a", "vllm", None, model)["kl"]
    assert kl["adapter"]["worst_query"] <= 1e-6 and "adapter, bfloat16" not in kl
    assert not {p.dtype for p in model.parameters()} - {torch.float32}


def test_a_long_contexts_own_logits_are_never_made(tmp_path, monkeypatch):
    model, patch = patched("llama")
    plain = ct.export_servable(patch, tmp_path / "a", "vllm", None, model)["kl"]
    monkeypatch.setattr(heads, "FEW", 0)
    sizes, width = [], model.config.vocab_size
    hook = model.lm_head.register_forward_hook(lambda _, x, y: sizes.append(y.numel() // width))
    lean = ct.export_servable(patch, tmp_path / "b", "vllm", None, model)["kl"]
    hook.remove()
    assert {*sizes} and max(sizes) < patch.inputs["target"]["input_ids"].numel()
    for name, found in lean.items():
        assert abs(found["worst_query"] - plain[name]["worst_query"]) <= 1e-6


# ------------------------------------------------------------------------------------------- norms, and rank


def test_norms_stay_and_the_adapter_of_before_is_refused(tmp_path):
    model = tiny_gemma()
    patch = ct.patch_model(model, *runs(context=9, query=4, batch=2), scope="all", via="output")
    base = checkpoint(model, tmp_path / "base")
    patch.export_peft(tmp_path / "before", model)
    with pytest.raises(ValueError, match="modules_to_save being None"):
        as_vllm(tmp_path / "before", base)
    with pytest.raises(ValueError, match="Cannot find target module name"):
        as_sglang(tmp_path / "before", base, 64)
    assert (
        "vLLM only supports modules_to_save being None." in verdict(tmp_path / "before", "vllm", model, 64)["reasons"]
    )
    done = ct.export_servable(patch, tmp_path / "a", "vllm", None, model)
    assert done["refitted"] and done["verdicts"]["vllm"]["accepted"]
    assert all(name.endswith("down_proj.weight") for name in as_vllm(tmp_path / "a", base, 8))
    kl = {name: found["mean"] for name, found in done["kl"].items()}
    assert kl["patch"] < 1e-6 < kl["adapter"] < 0.5 * kl["unpatched"]  # what serving without norms costs is said


def test_a_higher_rank_is_cut_where_the_tokens_feel_it_least(tmp_path):
    model, patch = patched("llama")
    cost = []
    for most in (1, 2, 4, 8):
        done = ct.export_servable(patch, tmp_path / str(most), "sglang", most, model)
        assert (done["rank"], done["needed"]) == (most, 8)
        cost.append(done["kl"]["adapter"]["mean"])
    assert cost[0] > cost[1] > cost[2] > 100 * cost[3] and cost[3] < 1e-6 < cost[2]
    read, hooks = {}, []
    for entry in patch.entries:
        hook = lambda _, x, name=entry.param.name: read.update({name: x[0]})  # noqa: E731
        hooks.append(model.get_submodule(entry.module).register_forward_pre_hook(hook))
    with patch.applied(model):
        model(**patch.inputs["source"])
    for hook in hooks:
        hook.remove()
    cut = as_sglang(tmp_path / "4", checkpoint(model, tmp_path / "base"), 4)
    for entry in patch.entries:
        whole = entry.delta.dense()
        x = torch.nn.functional.normalize(read[entry.param.name].flatten(0, 1), dim=-1)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        plain = u[:, :4] * s[:4] @ v[:4]
        felt = [float(((whole - other) @ x.mT).square().sum()) for other in (cut[entry.param.name], plain)]
        best = torch.linalg.svdvals(whole @ x.mT)[4:].square().sum()  # Eckart-Young: no rank 4 does better
        assert felt[0] < felt[1] and felt[0] <= 1.05 * float(best) + 1e-9


def test_moments_weigh_what_ordinary_text_feels_of_the_cut(tmp_path):
    model, patch = patched("llama")
    texts = [
        torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(i)) % model.config.vocab_size
        for i in range(9)
    ]
    moments = ct.second_moments(model, texts)
    base = checkpoint(model, tmp_path / "base")
    lost = []
    for name, metric in (("without", None), ("with", moments)):
        ct.export_servable(patch, tmp_path / name, "vllm", 1, model, metric)
        cut = as_vllm(tmp_path / name, base, 1)
        rest = {e.param.name: e.delta.dense() - cut[e.param.name] for e in patch.entries}
        lost.append(sum(float((d @ moments.metrics[n].second @ d.mT).trace()) for n, d in rest.items()))
    assert lost[1] < lost[0]
    with pytest.raises(ct.BadInput, match="moments"):
        ct.export_servable(patch, tmp_path / "other", "vllm", 1, model, ct.second_moments(llama(), texts[:1]))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("most", [4, 16])
def test_of_a_cut_and_a_fit_of_that_rank_the_better_is_taken(most, tmp_path):
    model, tokenizer = load()
    context, asked, _ = facts(3, 4)
    moments = ct.second_moments(model, [*asked, *facts(9, 30)[1]], tokenizer)
    patch = ct.compile_context(model, tokenizer, context, asked, strength="gentle", moments=moments).patch
    joint = dataclasses.replace(patch.joint, rank=most)
    ways = servable._cut(patch, model, most, moments), servable._solved(patch, model, moments, joint)
    both = [servable._lost(one, model) for one in ways]
    done = ct.export_servable(patch, tmp_path / "a", "sglang", most, model)
    assert done["needed"] > done["rank"] == most
    assert done["kl"]["adapter"]["mean"] == pytest.approx(min(both), rel=1e-3) and max(both) > min(both)


# ------------------------------------------------------------------------------------------- the rules


def changed(directory, to, tensors=lambda held: held, **config):
    shutil.copytree(directory, to)
    own = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(own | config))
    save_file(
        tensors(load_file(to / "adapter_model.safetensors")),
        to / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return to


def without(part):
    return lambda held: {key: value for key, value in held.items() if part not in key}


def renamed(old, new):
    return lambda held: {key.replace(old, new): value for key, value in held.items()}


BREACHES = {  # name -> (server, what is changed, the words)
    "dora": ("vllm", {"use_dora": True}, "vLLM does not yet support DoRA."),
    "bias": ("vllm", {"bias": "all"}, "Adapter bias is not supported."),
    "saved": ("vllm", {"modules_to_save": ["lm_head"]}, "vLLM only supports modules_to_save being None."),
    "rank": ("vllm", {"r": 33, "lora_alpha": 33}, "LoRA rank 33 is greater than max_lora_rank 32."),
    "key": ("vllm", {"tensors": renamed("lora_A", "lora_magnitude")}, "is unsupported LoRA weight"),
    "module": ("vllm", {"tensors": renamed("layers.0", "layers.9")}, "expected target modules"),
    "expert": ("vllm", {"tensors": without("experts.3.w1")}, "experts.3.w1 has none"),
    "dora, sglang": ("sglang", {"use_dora": True}, "LoRA serving currently doesn't support DoRA adapters"),
    "rank, sglang": (
        "sglang",
        {"r": 33, "lora_alpha": 33},
        "rank 33 is incompatible with the current LoRA memory pool",
    ),
    "map, sglang": ("sglang", {"target_modules": ["c_proj"]}, "get_hidden_dim not implemented for c_proj"),
    "key, sglang": ("sglang", {"tensors": renamed("lora_A", "lora_magnitude")}, "Cannot find target module name for"),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    with torch.no_grad():
        model, patch = patched("mixtral")
        ct.export_servable(patch, folder / "a", "vllm", 32, model)
    return model, folder / "a", checkpoint(model, folder / "base")


@pytest.mark.parametrize("breach", BREACHES)
def test_each_rule_is_one_that_the_second_reader_has_too(breach, mixture, tmp_path):
    model, directory, base = mixture
    server, change, words = BREACHES[breach]
    assert verdict(directory, server, model, 32)["accepted"] and BOTH[server](directory, base, 32)
    broken = changed(directory, tmp_path / "b", **change)
    assert any(words in reason for reason in verdict(broken, server, model, 32)["reasons"])
    with pytest.raises(ValueError):
        BOTH[server](broken, base, 32)


def test_an_adapter_for_a_base_of_another_size_is_refused(mixture, tmp_path):
    model = llama()
    patch = ct.patch_model(model, *runs(context=9, query=4, batch=2), scope="all", via="output")
    ct.export_servable(patch, tmp_path / "a", "vllm", None, model)
    wider = llama(hidden_size=64)
    for server in BOTH:
        (reason,) = verdict(tmp_path / "a", server, wider, 512)["reasons"]
        assert "of the base model is (64, 48)" in reason and "(32, 8)" in reason
    with pytest.raises(ct.PatchError, match="made for other weights or settings"):
        ct.export_servable(patch, tmp_path / "b", "vllm", None, wider)
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_error_and_leaves_nothing(tmp_path):
    model = llama()
    patch = ct.patch_model(model, *runs(context=9, query=4, batch=2), scope="all", via="output")
    before = snapshot(model)
    for server, rank, words in (
        ("tgi", None, "unknown server 'tgi': choose vllm, sglang, peft"),
        ("vllm", 20, "one of 1, 8, 16, 32, 64, 128, 256, 320, 512; got 20"),
        ("vllm", 0, "whole number from 1 on, got 0"), ("sglang", True, "got True"), ("peft", 2.5, "got 2.5"),
    ):  # fmt: skip
        with pytest.raises(ct.BadInput, match=words):
            ct.export_servable(patch, tmp_path / "a", server, rank, model)
    with pytest.raises(ct.BadInput, match="moments must be what second_moments gave, got str"):
        ct.export_servable(patch, tmp_path / "a", "peft", None, model, moments="C.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "own").write_text("mine")
    with pytest.raises(ct.PatchError, match="exists already"):
        ct.export_servable(patch, tmp_path / "full", "vllm", None, model)
    several = ct.patch_model(model, *runs(context=9, query=4), scope="each")
    with pytest.raises(ct.PatchError, match="cannot be held by one adapter"):
        ct.export_servable(several, tmp_path / "a", "vllm", None, model)
    patch.export_peft(tmp_path / "b", model)
    with pytest.raises(ct.PatchError, match="no queries to compare on"):
        ct.export_servable(ct.import_peft(tmp_path / "b", model), tmp_path / "a", "vllm", None, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["own"]
    assert unchanged(model, before) and not hook_count(model)


def test_the_command_prints_each_servers_verdict(capsys, saved_gemma, tmp_path):
    model, _ = ct.load_model(str(saved_gemma))
    patch = ct.patch_model(model, *runs(context=9, query=4, batch=2), scope="all", via="output")
    patch.save(tmp_path / "patch", model)
    export = ("export", str(tmp_path / "patch"), "--model", str(saved_gemma))

    def said(*more):
        status = main([*export, *map(str, more)])
        return status, *capsys.readouterr()

    status, out, _ = said("--servable", "vllm", "--max-rank", 1, "--out", tmp_path / "a")
    assert status == 0
    for words in (
        "vllm: yes --enable-lora --max-lora-rank 1", "sglang: yes --enable-lora --max-lora-rank 1", "peft: yes",
        "It needs rank", "and was cut to 1: ", "moves norms, which servers refuse", str(saved_gemma),
    ):  # fmt: skip
        assert words in out
    status, out, _ = said("--servable", "sglang", "--out", tmp_path / "b", "--json")
    found = json.loads(out)
    assert status == 0 and found["refitted"] and found["verdicts"]["vllm"]["reasons"] == []
    assert found["kl"]["patch"]["mean"] < found["kl"]["adapter"]["mean"] < found["kl"]["unpatched"]["mean"]
    for more, words in (
        (("--servable", "tgi"), "invalid choice: 'tgi'"), (("--servable", "vllm", "--max-rank", 20), "got 20"),
        (("--max-rank", 8), "belong to --servable"), (("--moments", "m"), "belong to --servable"),
    ):  # fmt: skip
        try:
            status, _, err = said(*more, "--out", tmp_path / "c")
        except SystemExit as stopped:
            status, err = stopped.code, capsys.readouterr().err
        assert status == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------- many at once


def test_eight_compiled_contexts_in_one_batch_are_each_as_alone(tmp_path):
    """One base, chosen per sample by ``adapter_names``: what a server does with many adapters."""
    tokenizer = load()[1]
    model = llama(vocab_size=len(tokenizer))
    adapted, asked = None, "Where does Mia live ?"
    for i in range(8):
        context = facts(i, 3)[0]
        patch = ct.compile_context(model, tokenizer, context, [asked], strength="exact").patch
        assert ct.export_servable(patch, tmp_path / f"c{i}", "vllm", 8, model)["kl"]["adapter"]["worst_query"] <= 1e-6
        if adapted is None:
            adapted = peft.PeftModel.from_pretrained(
                llama(vocab_size=len(tokenizer)), str(tmp_path / "c0"), adapter_name="c0"
            )
        else:
            adapted.load_adapter(str(tmp_path / f"c{i}"), adapter_name=f"c{i}")
    adapted.eval()
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    together = adapted(input_ids=ids.expand(8, -1), adapter_names=[f"c{i}" for i in range(8)]).logits
    alone = []
    for i in range(8):
        adapted.set_adapter(f"c{i}")
        alone.append(adapted(input_ids=ids).logits[0])
    size = torch.stack(alone).abs().max()
    assert float((together - torch.stack(alone)).abs().max() / size) < 2e-6
    assert min(float((alone[i] - alone[j]).abs().max() / size) for i in range(8) for j in range(i)) > 1e-2
