"""The map behind what mixes positions takes the patch: attention's output projection, a scan's, RWKV's.  (theory 8)

One family on demand: ``pytest -m "slow or not slow" tests/test_mixer_place.py -k rwkv``.
"""

import pytest
import torch
from family_models import RECIPES, build, default_dtype, inputs, logits_of
from helpers import hook_count, snapshot, unchanged
from test_families import SEVERAL, STREAMS, quiet, relative

import architectures
import controllability as ct
from architectures.registry import StatePoint
from controllability.components import Mixed
from controllability.interfaces import leaves
from controllability.models.exact_mode import exact_mode
from controllability.models.loading import load_model

# the mixing does not end in one linear map that reads a vector a token: what it ends in
WITHOUT = {
    "jetmoe": "a mixture of experts", "prophetnet": "one map, run for each kind of stream", "xlnet": "a tensor of three axes",
}  # fmt: skip
THERE = sorted(n for n in RECIPES if "mixer" in architectures.find(n).places)
ONLY = sorted(n for n in THERE if architectures.find(n).places == ("mixer",))
# one of each shape of the half, and those that have no other place
FAST = (
    "llama", "gemma2", "bert", "falcon", "qwen3_next", "falcon_h1", "longcat_flash", "minimax", "zaya", "gpt2", "xlm",
    "mllama", "mamba", "mamba2", "rwkv", "zamba", "reformer",
)  # fmt: skip


def marked(names):
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names]


def test_which_families_have_the_place():
    assert {n for n in RECIPES if architectures.find(n).places == ("feed-forward",)} >= set(WITHOUT)
    assert len(THERE) >= 178
    assert set(ONLY) == {"mamba", "mamba2", "falcon_mamba", "rwkv", "zamba", "zamba2", "reformer"}


@pytest.mark.parametrize("name", marked(THERE))
def test_patched_exactly(name):
    """As in test_families, at the mixer: exact float64, every position its own patch."""
    with quiet(), default_dtype(name), exact_mode():
        model = build(name)
        target, source = inputs(name, model)
        unpatched = logits_of(model, source)
        before = snapshot(model)
        mp = ct.patch_model(model, target, source, place="mixer")
        with mp.applied(model):
            patched = logits_of(model, source)
    assert relative(patched, mp.target_logits) <= 1e-9
    assert relative(unpatched, mp.target_logits) > 1e-3
    assert mp.report.residual <= 1e-9
    assert unchanged(model, before)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", marked(THERE))
def test_merged_in_float32(name):
    """One patch for all positions, exact at the last, as hooks and in the weights, and taken out again."""
    with quiet():
        model = build(name, torch.float32)
        target, source = inputs(name, model, batch=1)
        unpatched = logits_of(model, source)[:, -1]
        before = snapshot(model)
        if name in STREAMS:
            return
        mp = ct.patch_model(model, target, source, scope="last", place="mixer")
        wanted = mp.target_logits[:, -1] if mp.target_logits.ndim == 3 else mp.target_logits
        with mp.applied(model):
            patched = logits_of(model, source)[:, -1]
        if name not in SEVERAL:  # a patch a call: no one set of weights holds them
            mp.merge(model)
            merged = logits_of(model, source)[:, -1]
            mp.unmerge(model)
            assert relative(merged, wanted) <= 1e-5
    assert relative(patched, wanted) <= 1e-5
    assert relative(unpatched, wanted) > 1e-3
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["llama", "mamba", "qwen3_next", "gpt2"])
def test_nothing_but_the_maps_behind_the_mixing_moves(name):
    """And the feed-forward half behind them then reads the target's state: it needs no patch."""
    with quiet():
        model = build(name, torch.float32)
        target, source = inputs(name, model)
        mp = ct.patch_model(model, target, source, place="mixer")
    behind = "out_proj.weight", "o_proj.weight", "attn.c_proj.weight"
    assert all(e.param.name.endswith(behind) for e in mp.entries)
    assert len(mp.entries) == len(architectures.read(model, "mixer").layers)
    assert (mp.report.place, mp.report.via) == ("mixer", "output")


@pytest.mark.parametrize("name", ["llama", "mamba", "rwkv"])
def test_one_patch_for_all_positions_saved_loaded_and_extended(name, tmp_path):
    with quiet():
        model = build(name, torch.float32)
        target, source = inputs(name, model)
        mp = ct.patch_model(model, target, source, scope="all", place="mixer")
        unpatched = logits_of(model, source)
        mp.save(tmp_path / "patch", model)
        loaded = ct.load_patch(tmp_path / "patch")
        with loaded.applied(model):
            assert relative(logits_of(model, source), mp.target_logits) <= 1e-5
        assert loaded.report.place == "mixer"
        assert relative(unpatched, mp.target_logits) > 1e-3
        again = torch.arange(6, 16)[None]
        mp.extend(model, {"input_ids": again}, {"input_ids": again[:, -3:]})
        wanted, without = (logits_of(model, {"input_ids": ids})[:, -1] for ids in (again, again[:, -3:]))
        with mp.applied(model):
            assert relative(logits_of(model, {"input_ids": again[:, -3:]})[:, -1], wanted) <= 1e-5
            assert relative(logits_of(model, source), mp.output.held if mp.output else logits_of(model, source)) <= 1e-5
        assert relative(without, wanted) > 1e-3


@pytest.mark.parametrize("name", ["mamba", "rwkv", "llama"])
def test_generation_without_the_context(name):
    """Twenty tokens; the recurrent state of Mamba and RWKV is the context, and the patched model has none."""
    with quiet():
        model = build(name, torch.float32)
        ids = inputs(name, model, batch=1)[0]["input_ids"]
        done = ct.generate(model, ids, max_new_tokens=20, place="mixer", eos_token_id=None)
        wanted = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(done.sequences, wanted)
    assert done.agreement == 1.0


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next", "rwkv"])
def test_an_adapter_of_the_mixers_maps_comes_back(name, tmp_path):
    """Exported, read back as a patch, applied, and merged; it knows its place."""
    with quiet():
        model = build(name, torch.float32)
        target, source = inputs(name, model, batch=1)
        unpatched = logits_of(model, source)[:, -1]
        mp = ct.patch_model(model, target, source, scope="last", place="mixer")
        before = snapshot(model)
        mp.export_peft(tmp_path / "adapter", model)
        back = ct.import_peft(tmp_path / "adapter", model)
        wanted = mp.target_logits[:, -1]
        with back.applied(model):
            assert relative(logits_of(model, source)[:, -1], wanted) <= 1e-5
        back.merge(model)
        assert relative(logits_of(model, source)[:, -1], wanted) <= 1e-5
        back.unmerge(model)
    assert back.report.place == "mixer"
    assert {str(e.param) for e in back.entries} == {str(e.param) for e in mp.entries}
    assert relative(unpatched, wanted) > 1e-3
    assert unchanged(model, before)


def test_a_context_compiled_into_attentions_own_map():
    model, tokenizer = load_model("embedded")
    context, asked = "Mia lives in Oslo . Leo lives in Rome .", ["Where does Mia live ?", "Where does Leo live ?"]
    compiled = ct.compile_context(model, tokenizer, context, asked, place="mixer")
    assert [row["patched"] for row in compiled.answers()] == ["Oslo", "Rome"]
    assert compiled.solution.patch.report.place == "mixer"
    assert all("o_proj" in e.param.name or "norm" in e.param.name for e in compiled.solution.patch.entries)


@pytest.mark.parametrize("name", sorted({architectures.find(n).name for n in FAST}))
def test_the_half_is_proved_and_checked_symbolically(name):
    block = architectures.block(name, place="mixer")
    proof = ct.prove(block)
    assert any(isinstance(leaf, Mixed) for _, leaf in leaves(block)) or name == "reformer"
    assert {check["status"] for check in proof.check("symbolic")} == {"passed"}
    params, source, target = ct.sample(block)
    patch = proof.construct(params, source, target)
    assert ct.verify(block, params, patch, source, target).residual < 1e-9


def test_what_mixes_positions_is_never_steered():
    """Theorem 1 asks the inner function to move: here it is opaque, and Theorem 1b is taken whatever is asked."""
    block = architectures.block("llama", place="mixer")
    proof = ct.prove(block, via="input-output")
    assert (proof.via, proof.root.rule.name) == ("output", "theorem-1b")
    with pytest.raises(ct.NotControllable) as refused:
        ct.prove(block, frozen=["self_attn.o_proj.weight"])
    assert "self_attn.o_proj.weight" in str(refused.value)


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_such_a_map_say_so(name):
    with pytest.raises(ct.NotControllable, match="no map behind it is declared") as refused:
        architectures.block(name, place="mixer")
    assert "feed-forward" in refused.value.hint


def test_a_feed_forward_half_that_is_not_there_is_refused_with_its_reason():
    for name in ONLY:
        with pytest.raises(ct.NotControllable) as refused:
            architectures.block(name, place="feed-forward")
        assert "place='mixer'" in refused.value.hint
        assert ct.prove(architectures.block(name)).root  # by default the place that it has


def test_an_unknown_place_is_refused():
    with quiet():
        model = build("llama", torch.float32)
        target, source = inputs("llama", model)
        for place in ("attention", "", "feed-forward mixer"):
            with pytest.raises(ct.BadInput, match="unknown place"):
                ct.patch_model(model, target, source, place=place)
    with pytest.raises(ct.BadInput, match="unknown place"):
        architectures.block("llama", place="o_proj")


def test_a_wrong_declaration_is_noticed(monkeypatch):
    """The norm after attention left out: expression and modules disagree on random input."""
    from dataclasses import replace

    from architectures import registry
    from architectures.mixers import Mixer

    wrong = replace(architectures.find("gemma3"), mixer=(Mixer(output=StatePoint("pre_feedforward_layernorm")),))
    monkeypatch.setitem(registry._REGISTERED, "gemma3", wrong)
    with quiet():
        model = build("gemma3_text", torch.float32)
        target, source = inputs("gemma3_text", model)
        with pytest.raises(ct.ReadingError, match="disagree"):
            ct.patch_model(model, target, source, place="mixer")


@pytest.mark.parametrize(("name", "key"), [("mamba", "cache_params"), ("rwkv", "state")])
def test_a_state_that_is_handed_on_is_no_input(name, key):
    """It is the context, and the model writes into it."""
    with quiet():
        model = build(name, torch.float32)
        target, source = inputs(name, model, batch=1)
        held = getattr(model(target["input_ids"], use_cache=True), key)
        for one, other in ((target, source | {key: held}), (target | {key: held}, source)):
            with pytest.raises(ct.BadInput, match="both runs begin with an empty cache"):
                ct.patch_model(model, one, other)


def test_moments_of_the_other_place_are_named():
    with quiet():
        model = build("llama", torch.float32)
        target, source = inputs("llama", model, batch=1)
        before = snapshot(model)
        moments = ct.second_moments(model, [torch.arange(5, 40)])
        with pytest.raises(ct.BadInput, match=r"none that fit .*o_proj\.weight: they are of another model, or place"):
            ct.patch_model(model, target, source, scope="last", place="mixer", moments=moments)
        assert unchanged(model, before)
        here = ct.second_moments(model, [torch.arange(5, 40)], place="mixer")
        mp = ct.patch_model(model, target, source, scope="last", place="mixer", moments=here)
        with mp.applied(model):
            assert relative(logits_of(model, source)[:, -1], mp.target_logits[:, -1]) <= 1e-5
