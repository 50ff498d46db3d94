"""Several residual streams and convolutions behind the half: what is exact, at which level, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from family_models import RECIPES, build, inputs, logits_of
from helpers import snapshot, unchanged
from mutations import COLLAPSED, CONVOLVED, CORRECTED

import architectures
import controllability as ct
from controllability.cli import catalogue
from controllability.cli.main import main
from controllability.components import Activation, Correction, Linear, Select
from controllability.execution.trace import Trace
from controllability.interfaces import Param
from controllability.models.exact_mode import exact_mode
from controllability.models.sweep.report import Report
from controllability.rendering.text import proof_text

COLLAPSING = ("hy_v4", "deepseek_v4", "gemma3n_text", "qwen4_exp_text")
CONVOLVING = ("inkling_text", "inkling2_text")


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def variant(monkeypatch, name, **changes):
    """The tiny config with other settings."""
    recipe = RECIPES[name]
    monkeypatch.setitem(RECIPES, name, recipe | {"overrides": recipe["overrides"] | changes})


def misses(name, change=lambda model: None, batch=2, **options):
    """(patched, unpatched): how far the logits of the paired positions are from the target run's."""
    with torch.no_grad(), exact_mode():
        model = build(name)
        change(model)
        target, source = inputs(name, model, batch)
        mp = ct.patch_model(model, target=target, source=source, **options)
        wanted, unpatched = logits_of(model, target)[:, -4:], logits_of(model, source)
        with mp.applied(model):
            patched = logits_of(model, source)
    last = slice(-1, None) if options.get("scope") in ("last",) else slice(None)
    return relative(patched[:, last], wanted[:, last]), relative(unpatched[:, last], wanted[:, last])


# ------------------------------------------------------------------------------------------ the level of the claim
@pytest.mark.parametrize("name", COLLAPSING)
def test_the_level_is_said_wherever_the_claim_is_made(name, capsys):
    assert architectures.find(name).level == "logits"
    assert "exact at the logits" in proof_text(ct.prove(architectures.block(name)))
    (row,) = [r for r in catalogue.rows(name) if name in r["model_types"]]
    assert (row["verdict"], row["level"]) == ("patchable", "logits")
    assert main(["list", name]) == 0
    assert "patchable, exact at the logits" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "level"), [("hy_v4", "logits"), ("inkling_text", "every layer")])
def test_reports_say_the_level_and_older_ones_load(name, level):
    model = build(name, torch.float32)
    target, source = inputs(name, model, batch=1)
    report = ct.patch_model(model, target=target, source=source, scope="last").report
    assert report.level == level
    assert ("exact at the logits" in str(report)) == (level == "logits")
    written = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(written).level == level
    del written["level"]
    assert Report.from_dict(written).level == "every layer"


def test_the_streams_themselves_stay_apart():
    """Why the level is no higher: one vector is written into n streams, and only what the head reads is the target's."""
    model = build("hy_v4")
    target, source = inputs("hy_v4", model)
    seen = []
    hook = model.model.hc_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[:, -4:]))
    with torch.no_grad(), exact_mode():
        mp = ct.patch_model(model, target=target, source=source)
        seen.clear()
        wanted = logits_of(model, target)[:, -4:]
        with mp.applied(model):
            patched = logits_of(model, source)
    hook.remove()
    assert relative(patched, wanted) <= 1e-9
    assert relative(seen[1], seen[0]) > 1e-3
    # d numbers move n·d: the Jacobian of the streams in what the half writes has rank d, whatever its write weights
    b, d = torch.rand(4, dtype=torch.float64), 32
    assert int(torch.linalg.matrix_rank(torch.kron(b[:, None], torch.eye(d, dtype=torch.float64)))) == d < 4 * d


# --------------------------------------------------------------------------------------- settings that change the shape
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hy_v4", {"hc_mult": 2}),
        ("hy_v4", {"mlp_layer_types": ["sparse", "sparse", "dense"]}),
        ("deepseek_v4", {"hc_mult": 3}),
        ("deepseek_v4", {"scoring_func": "sigmoid"}),
        ("qwen4_exp_text", {"hc_count": 2}),
        ("gemma3n_text", {"altup_num_inputs": 2}),
        ("gemma3n_text", {"activation_sparsity_pattern": [0.0, 0.95, 0.0, 0.8]}),
        ("gemma3n_text", {"altup_correct_scale": False}),
        ("inkling_text", {"conv_kernel_size": 2}),
        ("inkling2_text", {"n_layers_per_attn_res_block": 1}),
    ],
)
def test_other_settings_are_read_from_the_model(monkeypatch, name, changes):
    variant(monkeypatch, name, **changes)
    patched, unpatched = misses(name)
    assert patched <= 1e-9
    assert unpatched > 1e-3


def test_a_model_cut_short_has_another_last_layer():
    def cut(model):
        del model.model.layers[2:]

    patched, unpatched = misses("hy_v4", cut)
    assert patched <= 1e-9
    assert unpatched > 1e-3


@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_windows_whose_squares_leave_the_range_of_float32(size):
    params, v, v_target = ct.sample(CONVOLVED, "torch", tokens=(3,), d=3)
    v, v_target = ((x[0], x[1] * size) for x in (v, v_target))
    patch = ct.prove(CONVOLVED).construct(params, v, v_target)
    assert ct.verify(CONVOLVED, params, patch, v, v_target).residual < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("deepseek_v4", {"mlp_layer_types": ["moe", "moe", "hash_moe"]}, "hash_moe"),
        ("deepseek_v4", {"scoring_func": "tanh"}, "scoring_func 'tanh' is none of"),
        ("gemma3n_text", {"altup_active_idx": 1}, "altup_active_idx"),
    ],
)
def test_what_is_not_declared_is_refused_by_name(monkeypatch, name, changes, reason):
    variant(monkeypatch, name, **changes)
    model = build(name)
    before = snapshot(model)
    target, source = inputs(name, model)
    with pytest.raises(ct.NotControllable, match=reason):
        ct.patch_model(model, target=target, source=source)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", [*COLLAPSING, "inkling_text"])
def test_a_model_without_a_head_is_read_as_well(name):
    with torch.no_grad(), exact_mode():
        whole = build(name)
        target, source = inputs(name, whole)
        model = whole.model
        mp = ct.patch_model(model, target=target, source=source)
        wanted, unpatched = logits_of(model, target)[:, -4:], logits_of(model, source)
        with mp.applied(model):
            assert relative(logits_of(model, source), wanted) <= 1e-9
    assert relative(unpatched, wanted) > 1e-3


@pytest.mark.parametrize("name", [*COLLAPSING, *CONVOLVING])
@pytest.mark.parametrize("options", [{"scope": "last"}, {"via": "output"}])
def test_other_scopes_and_theorems(name, options):
    patched, unpatched = misses(name, **options)
    assert patched <= 1e-9
    assert unpatched > 1e-3


@pytest.mark.parametrize(("name", "batch"), [("hy_v4", 2), ("deepseek_v4", 2), ("gemma3n_text", 1)])
def test_one_patch_for_all_tokens(name, batch):
    patched, unpatched = misses(name, batch=batch, scope="all")
    assert patched <= 1e-8
    assert unpatched > 1e-3


# AltUp's gain reads 4 numbers, so 8 tokens are too many; and no layer behind makes that good
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("gemma3n_text", "altup.correction_coefs"),
        ("inkling_text", "no one change of it many"),
        ("qwen4_exp_text", "all tokens ask for the same change"),
    ],
)
def test_what_serves_one_token_is_refused_for_many(name, error):
    model = build(name)
    target, source = inputs(name, model)
    before = snapshot(model)
    with torch.no_grad(), exact_mode(), pytest.raises(ct.ControllabilityError, match=error):
        ct.patch_model(model, target=target, source=source, scope="all")
    assert unchanged(model, before)


# ------------------------------------------------------------------------------------------------------- side conditions
def drawn(block):
    return ct.sample(block, tokens=(3,), d=3, h=4)


def test_write_weights_that_cancel_are_refused():
    params, v, v_target = drawn(COLLAPSED)
    patch = ct.prove(COLLAPSED).construct(params, v, v_target)
    (margin,) = [m.tokens for m in patch.journal.margins if "cancel" in str(m.condition)]
    weights = Trace(COLLAPSED, params, v_target).output((1,)) + COLLAPSED.least
    assert np.allclose(margin[:, 0], abs((weights * v[1]).sum(-1)))
    params["P"] = params["P"] * 0  # every weight is σ(0) + 1/2
    against = np.array([[1.0, -1.0, 2.0, -2.0]]).repeat(3, 0)
    with pytest.raises(ct.SideConditionFailed, match="the weights of what is written do not cancel"):
        ct.prove(COLLAPSED).construct(params, (v[0], against, v[2]), v_target)


def test_a_gain_of_zero_is_refused():
    params, v, v_target = drawn(CORRECTED)
    assert (
        ct.verify(CORRECTED, params, ct.prove(CORRECTED).construct(params, v, v_target), v, v_target).residual < 1e-12
    )
    # tanh(g a) is −1 to the last bit where g a is large and negative: nothing of a comes out
    params["g"] = -np.sign(Trace(CORRECTED, params, v_target).output((1,))).mean(0)[None].repeat(3, 0) * 1e9
    with pytest.raises(ct.SideConditionFailed, match="the gain of the correction is not 0"):
        ct.prove(CORRECTED).construct(params, v, v_target)


def test_a_channel_that_reads_only_zeros_is_refused_and_one_that_need_not_move_is_not():
    params, v, v_target = drawn(CONVOLVED)
    r, u = (x.copy() for x in v)
    u[:, 1] = 0.0
    with pytest.raises(ct.SideConditionFailed, match="no channel of c reads only zeros"):
        ct.prove(CONVOLVED).construct(params, (r, u), v_target)
    wanted = (r, v_target[1].copy())  # nothing of this channel has to change
    wanted[1][:, 1] = 0.0
    patch = ct.prove(CONVOLVED).construct(params, (r, u), wanted)
    assert ct.verify(CONVOLVED, params, patch, (r, u), wanted).residual < 1e-12


def test_a_first_tap_of_zero_is_no_obstacle():
    """The taps are the outer map: nothing is substituted, so c_0 = 0 and positions left out do no harm."""

    def closed(model):
        for layer in model.model.layers:
            layer.mlp_sconv.conv1d.weight[:, 0, -1] = -1.0  # with the skip beside it: 0

    patched, unpatched = misses("inkling_text", closed)
    assert patched <= 1e-9
    assert unpatched > 1e-3
    model = build("inkling_text")
    target, source = inputs("inkling_text", model)
    with torch.no_grad(), exact_mode():
        mp = ct.patch_model(model, target=target, source=source, positions=([1, 3], [9, 11]))
        with mp.applied(model):
            found = logits_of(model, source)[:, [1, 3]]
        assert relative(found, logits_of(model, target)[:, [9, 11]]) <= 1e-9


@pytest.mark.parametrize("name", ["hy_v4", "gemma3n"])
def test_weights_that_may_not_move_are_the_culprit(name):
    frozen = {"hy_v4": "hc_head.hc_fn", "gemma3n": "altup.correction_coefs.weight"}[name]
    with pytest.raises(ct.NotControllable) as refused:
        ct.prove(architectures.block(name), frozen=frozen)
    assert frozen in refused.value.reason
    assert refused.value.hint


def test_weights_that_share_a_parameter_with_what_they_weigh_are_refused():
    W = Param("W", ("d", "d"))
    tied = Correction(Select(0, "p"), Select(1, "x") >> Linear(W), Linear(W) >> Activation("tanh"))
    with pytest.raises(ct.NotControllable, match="W is used twice"):
        ct.prove(tied)


def test_inputs_of_a_block_have_their_own_widths():
    params, v, _ = ct.sample(COLLAPSED, tokens=(3,), d=3, h=4)
    assert [x.shape for x in v] == [(3, 12), (3, 4), (3, 3)]
    assert params["P"].shape == (4, 12)
    with pytest.raises(ct.BadInput, match="source 1 has width 5, the block takes 4"):
        ct.prove(COLLAPSED).construct(params, (v[0], np.ones((3, 5)), v[2]), (v[0], np.ones((3, 5)), v[2]))


# ---------------------------------------------------------------------------------------------------- decoding, files
@pytest.mark.parametrize("name", ["hy_v4", *CONVOLVING])
def test_a_patch_beside_a_cache_gives_what_the_weights_give(name, tmp_path):
    """A convolution's window goes back into the cache; and a saved patch is the same patch."""
    model = build(name, torch.float32)
    target, source = inputs(name, model, batch=1)
    before = snapshot(model)
    mp = ct.patch_model(model, target=target, source=source, scope="last")
    mp.save(tmp_path / "patch.safetensors")
    ids = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        plain = model.generate(source["input_ids"], **ids)
        with ct.load_patch(tmp_path / "patch.safetensors").applied(model):
            first = model(**source, use_cache=True)
            token = first.logits[:, -1:].argmax(-1)
            found = model(input_ids=token, past_key_values=first.past_key_values).logits[:, -1]
            hooked = model.generate(source["input_ids"], **ids)
        with mp.applied(model, as_weights=True):
            longer = torch.cat([source["input_ids"], token], 1)
            wanted = model(input_ids=longer, use_cache=False).logits[:, -1]
            written = model.generate(source["input_ids"], **ids)
        unpatched = model(input_ids=longer, use_cache=False).logits[:, -1]
    assert relative(found, wanted) <= 1e-5
    assert relative(unpatched, wanted) > 1e-3
    assert torch.equal(hooked, written)
    assert not torch.equal(hooked, plain) or name == "inkling2_text"
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["hy_v4", *CONVOLVING])
def test_generation_without_the_context_follows_it(name):
    model = build(name, torch.float32)
    target, _ = inputs(name, model)
    done = ct.generate(model, target["input_ids"], max_new_tokens=3, eos_token_id=None)
    assert done.agreement == 1.0


@pytest.mark.parametrize("block", [COLLAPSED, CONVOLVED, CORRECTED], ids=["collapsed", "convolved", "corrected"])
def test_the_blocks_as_proofs(block):
    proof = ct.prove(block)
    assert ct.Proof.from_dict(json.loads(json.dumps(proof.to_dict()))).rules == proof.rules
    for level in ("symbolic", "exact", "numeric"):
        assert {row["status"] for row in proof.check(level)} == {"passed"}, level
