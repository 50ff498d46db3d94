"""Compiling in the metric of ordinary text: one formula from ROME's edit to the exact patch, and what it does off the set."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import build
from helpers import snapshot, unchanged
from plain_tokenizer import Plain, words

import controllability as ct
from controllability.cli.main import main
from controllability.compiling.compile_context import compile_context
from controllability.compiling.metric_sweep import EVEN, FIRST, fit_rows
from controllability.compiling.strengths import STRENGTHS, Strength
from controllability.compiling.token_sets import Context
from controllability.compiling.unrelated_texts import ordinary_moments
from controllability.compiling.yardstick import Yardstick
from controllability.components import Linear
from controllability.components.updates import CHOSEN, expertwise
from controllability.deltas import LowRank
from controllability.interfaces import FitRows, JointOptions, Param
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.loading import load_model
from controllability.models.moments import Metric
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.second_moments import load_moments, save_moments
from controllability.solvers.metric_fit import Drift, metric_fit

load = functools.cache(lambda: load_model("embedded"))
moments = functools.cache(lambda: ordinary_moments(*load(), 96, lambda *_: None, 4096))
NAMES, CITIES = (
    ["Mia", "Leo", "Ana", "Tom", "Eva", "Max", "Ida", "Sam"],
    ["Oslo", "Rome", "Paris", "Lima", "Cairo", "Tokyo", "Delhi", "Quito"],
)
FACTS = " ".join(f"{name} lives in {city} ." for name, city in zip(NAMES, CITIES, strict=True))
ASKED = [f"Where does {name} live ?" for name in NAMES]
OTHERWISE = [f"In which city does {name} stay ?" for name in NAMES]


@functools.cache
def compiled(strength, rank=None):
    given = None if strength == "exact" else moments()
    return compile_context(*load(), FACTS, ASKED, OTHERWISE, strength=strength, moments=given, rank=rank)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_strength_serves_its_queries_and_disturbs_other_text_less_than_the_exact_patch(strength):
    found, exact = compiled(strength), compiled("exact")
    assert exact.exact and not found.exact and found.to_dict()["strength"] == strength
    asked, without = found.results["queries"], found.sets["queries"].unpatched
    assert asked.kl < (0.05 if strength == "gentle" else 0.02) * without.kl
    assert asked.top1_agreement > 0.95 > 0.6 > without.top1_agreement
    assert found.results["heldout"].kl < 0.6 * found.sets["heldout"].unpatched.kl
    assert found.results["unrelated"].kl < 0.25 * exact.results["unrelated"].kl


def test_stronger_is_nearer_and_drifts_more():
    gentle, balanced = compiled("gentle"), compiled("balanced")
    assert balanced.results["queries"].kl < gentle.results["queries"].kl
    assert max(gentle.drift.values()) < max(balanced.drift.values())


def test_the_metric_is_what_keeps_the_drift_low():
    model, tokenizer = load()
    second = moments()
    plain = replace(second, metrics={n: replace(m, second=torch.eye(len(m.second))) for n, m in second.metrics.items()})
    isotropic = compile_context(model, tokenizer, FACTS, ASKED, moments=plain)
    assert isotropic.results["unrelated"].kl > 2 * compiled("balanced").results["unrelated"].kl


def test_the_drift_that_is_reported_is_the_mean_over_the_texts():
    """tr(ΔW C ΔWᵀ) is a mean over the tokens that C was made of: here they are run again, one by one."""
    model, tokenizer = load()
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in (FACTS, ASKED[0], OTHERWISE[1])]
    found = compile_context(model, tokenizer, FACTS, ASKED[:2], moments=ct.second_moments(model, rows))
    reads: dict[str, list[torch.Tensor]] = {name: [] for name in found.drift}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, x, name=name: reads[name].append(x[0].flatten(0, 1).double())
        )
        for name in found.drift
    ]
    with torch.no_grad():
        for ids in rows:
            model(ids)
    for hook in hooks:
        hook.remove()
    for entry in found.patch.entries:
        assert type(entry.delta) is LowRank
        x = torch.nn.functional.normalize(torch.cat(reads[entry.param.name]), dim=-1)
        W = model.get_parameter(entry.param.name).detach().double()
        change = x @ entry.delta.right.double().mT @ entry.delta.left.double()
        wanted = (change.pow(2).sum() / (x @ W.mT).pow(2).sum()).sqrt()
        assert found.drift[entry.param.name] == pytest.approx(float(wanted), rel=1e-3)


def test_a_rank_bounds_every_matrix():
    found = compiled("balanced", 4)
    assert found.to_dict()["rank"] == 4
    assert compiled("balanced").results["queries"].kl < found.results["queries"].kl < found.sets["queries"].unpatched.kl


def test_only_the_layers_of_the_strength_move_and_no_scale_does():
    found = compile_context(*load(), FACTS, ASKED, strength=Strength(10.0, 0.1, first=0.3, last=0.6), moments=moments())
    assert [layer.index for layer in found] == [1]
    assert {entry.param.name for entry in found.patch.entries} == {"model.layers.1.mlp.down_proj.weight"}
    assert found.to_dict()["strength"] == "by hand"


def test_the_first_token_stays_where_it_is():
    model, tokenizer = load()
    first = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        before = model(first, output_hidden_states=True).hidden_states[-1]
        with compiled("balanced").patch.applied(model):
            after = model(first, output_hidden_states=True).hidden_states[-1]
            asked = model(tokenizer(ASKED[0], return_tensors="pt").input_ids, output_hidden_states=True).hidden_states[
                -1
            ]
        plain = model(tokenizer(ASKED[0], return_tensors="pt").input_ids, output_hidden_states=True).hidden_states[-1]
    moved = float((asked - plain)[0, -1].norm() / plain[0, -1].norm())
    assert float((after - before).norm() / before.norm()) < 0.1 * moved


def test_every_token_counts_once_by_its_weight_and_by_what_the_context_changes_there():
    model, tokenizer = load()
    before = Context.of(tokenizer, FACTS)
    samples = [before.sample(ASKED[0]), replace(before.sample(ASKED[1], 3), hard=True)]
    queries = Yardstick.of(model, samples)
    rows, length = fit_rows(queries, STRENGTHS["gentle"]), len(samples[0].source)
    gaps = [[0.0, *logit_kl(x, y).tolist()] for x, y in zip(queries.without, queries.wanted, strict=True)]
    mean = sum(gaps[0] + gaps[1]) / (2 * length - 2)
    assert rows.weights[0] == FIRST * (1 + EVEN) and rows.weights[length] == 0.0  # <bos>, once
    wanted = [(gaps[0][i] / mean + EVEN) for i in range(1, length)]
    assert np.allclose(rows.weights[1:length], wanted, rtol=1e-5)
    assert rows.weights[length + 1] == rows.weights[length + 2] == 0.0  # Where does
    assert np.isclose(rows.weights[-1], 3 * (gaps[1][-1] / mean + EVEN), rtol=1e-5)
    assert rows.stay == tuple(i in (0, length) for i in range(2 * length))
    assert rows.hard is not None  # what both begin with is as hard as the query that asks for it
    assert [i for i in range(length) if rows.hard[i]] == [1, 2] and all(rows.hard[length + 1 :])
    assert fit_rows(Yardstick.of(model, samples[:1]), STRENGTHS["gentle"]).hard is None
    assert all(fit_rows(Yardstick.of(model, samples[:1]), STRENGTHS["balanced"]).hard[1:])


def logit_kl(found, wanted):
    p, q = (x.double().log_softmax(-1) for x in (wanted, found))
    return (p.exp() * (p - q)).sum(-1)


def test_the_model_is_left_as_it_was_and_the_patch_saves_merges_and_loads(tmp_path):
    model, _ = load()
    before, patch = snapshot(model), compiled("gentle").patch
    patch.save(tmp_path / "patch", model)
    again = ct.load_patch(tmp_path / "patch")
    assert again.joint == patch.joint and again.joint is not None and again.joint.layers
    ids = load()[1](ASKED[3], return_tensors="pt").input_ids
    with torch.no_grad():
        with patch.applied(model):
            wanted = model(ids).logits
        with again.applied(model):
            assert torch.equal(model(ids).logits, wanted)
        for one in (patch, again):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a fit promises no target that a merge could miss
                one.merge(model)
            assert float((model(ids).logits - wanted).abs().max()) < 1e-3
            one.unmerge(model)
    assert patch.merged is not None and patch.merged.relative_error > 1e-3  # which an exact one would be warned of
    assert unchanged(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "mixtral", "gptj", "qwen2_moe"])
def test_families_without_a_norm_behind_the_map_with_one_and_with_experts(family):
    model = build(family, torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(5, 40, (1, 30))
    second = ct.second_moments(model, [torch.randint(5, 40, (8, 40))])

    texts = [words(torch.randint(5, 40, (5,)).tolist()) for _ in range(3)]
    strength = Strength(0.1, 0.01, first=0.0, last=1.0)
    found = compile_context(model, Plain(), words(ids[0].tolist()), texts, strength=strength, moments=second)
    assert found.results["queries"].kl < 0.8 * found.sets["queries"].unpatched.kl


def test_moments_are_written_once_and_belong_to_their_model(tmp_path, gemma):
    model, _ = load()
    path = save_moments(moments(), tmp_path / "moments.safetensors", model)
    again = load_moments(path, model)
    assert again.tokens == moments().tokens
    assert all(torch.equal(again.metrics[n].second, m.second) for n, m in moments().metrics.items())
    with pytest.raises(ct.PatchError, match="of other weights"):
        load_moments(path, gemma)
    with pytest.raises(ct.PatchError, match="exists already"):
        save_moments(moments(), path, model)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ct.PatchError, match="corrupt or truncated"):
        load_moments(tmp_path / "cut", model)
    compiled("gentle").patch.save(tmp_path / "patch", model)
    with pytest.raises(ct.PatchError, match="holds no second moments"):
        load_moments(tmp_path / "patch" / "patch.safetensors", model)


BAD = [
    ({"strength": "mighty"}, "unknown strength 'mighty': choose gentle, balanced, strong or exact"),
    ({"strength": "gentle", "ridge": 0.1}, "ridge belongs to the strength 'exact'"),
    ({"strength": "gentle", "keep_rms": True}, "keep_rms belongs to the strength 'exact'"),
    ({"strength": "strong", "via": "output"}, "via belongs to the strength 'exact'"),
    ({"moments": 3}, "moments must be what second_moments gave"),
    ({"controls": 3}, "controls must be True or False, got 3"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ct.BadInput, match=message):
        compile_context(*load(), FACTS, ASKED, **options)


@pytest.mark.parametrize(
    "given", [(-1, 0.1), (float("nan"), 0.1), (True, 0.1), (1, "a"), (1, 1, 0.5, 0.5), (1, 1, 0, 2), (1, 1, 0, 1, -1)]
)
def test_strengths_that_make_no_sense(given):
    with pytest.raises(ct.BadInput):
        Strength(*given)


def test_moments_of_another_model_are_refused(gemma):
    other = ct.second_moments(gemma, [torch.arange(40)])
    with pytest.raises(ct.BadInput, match="they are of another model"):
        compile_context(*load(), FACTS, ASKED, moments=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda C: C[:, :5], "they are of another model"),
        (lambda C: C * float("nan"), "zero or not finite"),
        (lambda C: C.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(float("inf"))), "zero or not finite"),
        (lambda C: C - 10 * C.diagonal().mean() * (1 - torch.eye(len(C))), "it is no second moment"),
    ],
)
def test_moments_that_are_none_are_refused_and_nothing_is_changed(change, message):
    model, tokenizer = load()
    before = snapshot(model)
    wrong = replace(moments(), metrics={n: Metric(change(m.second)) for n, m in moments().metrics.items()})
    with pytest.raises(ct.BadInput, match=message):
        compile_context(model, tokenizer, FACTS, ASKED, moments=wrong)
    ids = tokenizer(f"{FACTS} {ASKED[0]}", return_tensors="pt").input_ids
    with pytest.raises(ct.BadInput, match=message):
        ct.patch_model(model, {"input_ids": ids}, {"input_ids": ids[:, -5:]}, scope="last", moments=wrong)
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_fitted_and_merged_like_float32(dtype):
    model, tokenizer = load_model("embedded", dtype)
    before = snapshot(model)
    found = compile_context(model, tokenizer, FACTS, ASKED, OTHERWISE, moments=moments())
    wanted = compiled("balanced")
    for name in ("queries", "heldout", "unrelated"):
        assert found.results[name].kl == pytest.approx(wanted.results[name].kl, rel=0.2)
    found.patch.merge(model, measured=False)
    ids = tokenizer(ASKED[2], return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == CITIES[2]
    found.patch.unmerge(model)
    assert unchanged(model, before)


def test_tokens_that_one_expert_serves_have_their_own_weights():
    rng = np.random.default_rng(0)
    x, delta, index = rng.normal(size=(6, 1, 8)), rng.normal(size=(6, 2, 3)), np.array([[0, 1], [1, 2], [0, 2]] * 2)
    share = rng.uniform(0.5, 2, 6)
    update = expertwise(Linear(Param("w")), Param("w"), False, lambda _: 3)
    joint = JointOptions(0.1, damping=0.0, rows=FitRows(tuple(share)))
    change = update.jointly.solve(joint, {CHOSEN: index}, x, delta, 0 * delta, None).delta
    at, slot = (index == 1).nonzero()
    alone = metric_fit(x[at, 0], delta[at, slot], share[at] / share[at].sum(), Drift(None), 0.1)
    place = change.index.tolist().index(1)
    assert np.allclose(change.left[place].T @ change.right[place], alone[0].T @ alone[1])


def test_the_command_makes_moments_once_reports_and_advises(tmp_path, capsys):
    (tmp_path / "queries").write_text("\n".join(ASKED))
    given = [
        "compile",
        "embedded",
        "--context",
        FACTS,
        "--queries",
        str(tmp_path / "queries"),
        "--moments",
        str(tmp_path / "m"),
    ]
    assert main([*given, "--out", str(tmp_path / "a"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    written = (tmp_path / "m").stat().st_mtime_ns
    assert data["strength"] == "balanced" and data["drift"] and data["moments_tokens"] > 10_000 and not data["exact"]
    assert main([*given, "--out", str(tmp_path / "b")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "m").stat().st_mtime_ns == written
    assert "fitted, strength balanced" in text and "Held-out queries (--heldout) would tell what generalises." in text
    assert main([*given, "--strength", "exact", "--out", str(tmp_path / "c")]) == 2
    assert "--moments: an exact patch is made without" in capsys.readouterr().err


def test_layers_that_do_not_move_are_not_watched():
    """The plan leaves them out, so nothing of them is kept or solved."""
    model, _ = load()
    seen = []
    original = LayerHooks.run

    def run(self, listeners, inputs):
        seen.append([listener is not None for listener in listeners])
        return original(self, listeners, inputs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerHooks, "run", run)
        compile_context(*load(), FACTS, ASKED[:2], strength=Strength(10.0, 0.1, first=0.3, last=0.6), moments=moments())
    assert [False, True, False] in seen and len(checked_reading(model).reading.layers) == 3
