"""``controllability protocol``: rows are what the parts measure, refusals are rows, a rescaled copy computes the same."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from commands import outcome
from helpers import error, hook_count, runs, snapshot, tiny_gemma, unchanged
from transformers import Glm4Config, Glm4ForCausalLM, LlamaConfig, LlamaForCausalLM

import controllability as ct
from controllability.cli import protocol as command
from controllability.models.generation.steps import GeneratedToken, Generation
from controllability.models.loading import load_model
from controllability.models.protocol.rescale import rescaled
from controllability.models.protocol.run import EVERY, Row, run_protocol
from controllability.models.reading import tolerances
from controllability.models.reading.logits import compare_logits

FIELDS = ["dtype", "route", "tokens", "agreement", "explained", "kl_max", "tv_max", "max_logit_error", "sensitivity"]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(command, "load_model", cached)


cached = functools.cache(load_model)


def batch():
    ids = runs(context=9, query=1, batch=2)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


# ----------------------------------------------------------------------------------------------------------- rows


def test_a_row_is_what_the_generation_measured(gemma):
    ids, mask = batch()
    before = snapshot(gemma)
    (row,) = (row.to_dict() for row in run_protocol(gemma, ids, mask, 4))
    done = ct.generate(gemma, ids, mask, 4)
    assert set(FIELDS) < set(row)
    assert (row["dtype"], row["route"], row["tokens"], row["agreement"], row["refused"]) == (
        "float32",
        "auto",
        8,
        1,
        None,
    )
    for name in ("kl_max", "tv_max", "max_logit_error", "relative_error"):
        assert row[name] == getattr(done, name)
    assert row["kl_max"] == max(row["kl_by_token"])
    assert row["tv_max"] <= (row["kl_max"] / 2) ** 0.5 + 1e-12  # Pinsker
    # negative control: the token alone
    assert row["agreement_unpatched"] < 0.5
    assert row["max_logit_error"] < 1e-4 < 0.1 < row["max_logit_error_unpatched"]
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


def test_total_variation_is_half_the_sum_of_differences():
    generator = torch.Generator().manual_seed(1)
    found, wanted = (3 * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(-1, keepdims=True) for x in (wanted, found))
    assert np.allclose(compare_logits(found, wanted).tv.numpy(), np.maximum(p - q, 0).sum(-1), atol=1e-14)
    assert float(compare_logits(wanted, wanted).tv.max()) == 0


def test_the_sensitivity_is_that_of_the_tokens_own_patches(gemma):
    ids = runs(context=9, query=1)[0]["input_ids"]
    (row,) = run_protocol(gemma, ids, max_new_tokens=EVERY + 1, routes=["scale"])
    ratios = []
    for t in (0, EVERY):
        history = row.generation.sequences[:, : 10 + t]
        source = {"input_ids": history[:, -1:], "position_ids": torch.tensor([[9 + t]])}
        ratios.append(ct.patch_model(gemma, {"input_ids": history}, source, route="scale").sensitivity.ratio)
    assert row.ratios == tuple(ratios)
    assert row.to_dict()["sensitivity"] == max(ratios)
    (calm,) = run_protocol(gemma, ids, max_new_tokens=1)
    assert calm.to_dict()["sensitivity"] < row.to_dict()["sensitivity"]


def made(target, patched, near_tie, relative_error):
    """A generation of one step."""
    n = len(target)
    numbers = {
        name: torch.zeros(n) for name in ("max_logit_error", "max_logit_error_unpatched", "kl", "tv", "top1_gap")
    }
    step = GeneratedToken(
        torch.tensor(target), torch.tensor(patched), torch.zeros(n), torch.tensor(relative_error), near_tie=torch.tensor(near_tie),
        active=torch.ones(n, dtype=torch.bool), position=torch.arange(n), seconds={"target": 0.0, "patched": 0.0}, **numbers,
    )  # fmt: skip
    return Generation(torch.zeros(n, 2), torch.ones(n), (step,), "auto", "bfloat16")


def test_a_tie_explains_a_mismatch_only_where_rounding_explains_the_error():
    """Tokens that differ are closer than twice the error whatever the error: a wrong patch must not be excused by its own error."""
    done = made([1, 2, 3, 4], [1, 5, 6, 7], [True, True, True, False], [0.01, 0.01, 0.3, 0.01])
    row = Row("bfloat16", "auto", done).to_dict()
    assert (row["tokens"], row["mismatches"], row["explained"]) == (4, 3, 1)


@pytest.mark.parametrize("tokens, differ", [(100, 0), (100, 1), (20, 3)])
def test_the_interval_is_the_exact_one(tokens, differ):
    from scipy.stats import binom

    done = made([1] * tokens, [2] * differ + [1] * (tokens - differ), [True] * tokens, [0.0] * tokens)
    low, high = Row("float32", "auto", done).to_dict()["agreement_interval"]
    assert binom.sf(tokens - differ - 1, tokens, low) == pytest.approx(0.025)
    assert high == 1 if differ == 0 else binom.cdf(tokens - differ, tokens, high) == pytest.approx(0.025)


def test_a_route_that_does_not_exist_is_a_row_with_the_reason(gemma):
    ids, mask = batch()
    refused, done = (row.to_dict() for row in run_protocol(gemma, ids, mask, 2, ["ball", "auto"]))
    assert refused["refused"].startswith("side condition failed at layer 0")
    assert set(refused) == set(done)
    assert (refused["tokens"], refused["agreement"], refused["sensitivity"]) == (0, None, None)
    assert (done["tokens"], done["refused"]) == (4, None)


def test_prompts_that_cannot_be_run_are_an_error_and_no_row(gemma):
    with pytest.raises(ct.BadInput, match="positions, the model has 128"):
        [*run_protocol(gemma, batch()[0], max_new_tokens=200)]


# ------------------------------------------------------------------------------------------------------ rescaling


def large(model, factor=3e4, names=("post_attention_layernorm", "post_feedforward_layernorm"), offset=1.0):
    """The model with states beyond float16."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(f"{n}.weight" in name for n in names):
                p.copy_((p + offset) * factor - offset)
    return model


def sandwich_of_another_family(tied):
    """GLM 4: norms before and after each half, no scale in the embedding, scales stored as they are."""
    torch.manual_seed(0)
    config = Glm4Config(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return large(Glm4ForCausalLM(config).eval(), 3e4, ("post_self_attn_layernorm", "post_mlp_layernorm"), 0.0)


@pytest.mark.parametrize("make", [
    lambda: large(tiny_gemma(layers=2)), lambda: sandwich_of_another_family(True), lambda: sandwich_of_another_family(False),
], ids=["gemma3", "glm4 tied", "glm4"])  # fmt: skip
def test_a_rescaled_copy_computes_the_same_within_float16(make):
    model, (ids, mask) = make(), batch()
    before = snapshot(model)
    with torch.no_grad():
        wanted = model(ids).logits
        plain = make().half()(ids).logits
    (overflown,) = run_protocol(make().half(), ids, mask, 2)
    assert "is not finite" in overflown.refused
    assert "overflow" in overflown.refused
    assert not torch.isfinite(plain).all()
    half, s = rescaled(model, {"input_ids": ids})
    assert s >= 4
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    with torch.no_grad():
        assert error(half(ids).logits, wanted) < 0.02
    (row,) = (row.to_dict() for row in run_protocol(half, ids, mask, 3))
    assert (row["dtype"], row["refused"], row["tokens"]) == ("float16", None, 6)
    assert row["relative_error"] < 5e-3
    assert unchanged(model, before)
    assert hook_count(model) == hook_count(half) == 0


def test_the_epsilons_are_rescaled_too():
    """Small states, which ε touches: with ε as it was the copy would be another function."""
    model, (ids, _) = large(tiny_gemma(layers=2, rms_norm_eps=1e-2)), batch()
    with torch.no_grad():
        wanted = model(ids).logits
        half, _ = rescaled(model, {"input_ids": ids})
        assert error(half(ids).logits, wanted) < 0.02
        for module in half.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-2
        assert error(half(ids).logits, wanted) > 0.02


def test_what_adds_more_than_its_norms_give_is_refused():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e6)
    before = snapshot(model)
    with pytest.raises(
        ct.BadInput, match=r"LlamaForCausalLM cannot be rescaled: .* more .* than what norms with a scale give"
    ):
        rescaled(model, {"input_ids": batch()[0]})
    assert unchanged(model, before)
    assert hook_count(model) == 0


# ---------------------------------------------------------------------------------------------------- the command


def run(capsys, *arguments):
    """(exit status, JSON or None, stdout, stderr)."""
    return outcome(capsys, "protocol", *arguments)


QUICK = ("embedded", "--tokens", 2, "--dtypes", "float32", "bfloat16", "--routes", "auto", "ball")


def test_rows_of_every_dtype_and_route(capsys):
    status, data, _, err = run(capsys, *QUICK, "--json")
    assert (status, err, len(data["prompts"]), data["rescaled"], data["interrupted"]) == (0, "", 5, None, False)
    rows = data["rows"]
    assert [(r["dtype"], r["route"]) for r in rows] == [
        (d, r) for d in ("float32", "bfloat16") for r in ("auto", "ball")
    ]
    for row in rows:
        assert set(FIELDS) < set(row)
        if row["route"] == "ball":
            assert "image of the normalisation" in row["refused"]
            continue
        assert (row["tokens"], row["agreement"], row["mismatches"]) == (10, 1, 0)
        assert row["agreement_unpatched"] < 0.3
        assert 0 < row["sensitivity_median"] <= row["sensitivity"] < 4
        assert row["kl_max"] < 1e-3
    assert rows[0]["relative_error"] < 5e-6 < rows[2]["relative_error"] < 0.03


def test_tables_fit_80_columns_and_the_figure_is_written(capsys, tmp_path):
    picture = tmp_path / "figure.svg"
    status, _, out, _ = run(capsys, *QUICK, "--out", picture)
    assert status == 0
    assert max(len(line) for line in out.splitlines() if not line.startswith("picture: ")) <= 80
    assert "10/10" in out
    assert "refused" in out
    assert "20 tokens, 0 differ, 0 of them by more than rounding explains" in out
    shown = picture.read_text()
    for word in ("float32", "bfloat16", "unpatched", "refused", "agreement", "KL"):
        assert f"{word}" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["figure.svg"]


def test_an_error_beyond_rounding_is_no_success(capsys, monkeypatch):
    def wrong(*args):
        yield Row("bfloat16", "auto", made([1, 2], [1, 5], [True, True], [0.01, 0.3]))

    monkeypatch.setattr(command, "run_protocol", wrong)
    status, _, out, _ = run(capsys, "embedded", "--dtypes", "bfloat16", "--routes", "auto")
    assert status == 1
    assert "2 tokens, 1 differ, 1 of them by more than rounding explains" in out


def test_only_refusals_are_no_success(capsys):
    status, data, _, _ = run(capsys, "embedded", "--tokens", 1, "--dtypes", "float32", "--routes", "ball", "--json")
    assert (status, [r["tokens"] for r in data["rows"]]) == (1, [0])


def test_rescaling_that_is_refused_is_a_row(capsys, monkeypatch):
    def refuse(*args):
        raise ct.BadInput("cannot be rescaled")

    monkeypatch.setattr(command, "rescaled", refuse)
    options = ("embedded", "--tokens", 1, "--routes", "auto", "--rescale", "--json")
    status, data, _, _ = run(capsys, *options, "--dtypes", "float32", "float16")
    assert (status, [r["refused"] for r in data["rows"]]) == (0, [None, "cannot be rescaled"])


def test_ctrl_c_shows_what_was_done(capsys, monkeypatch):
    def interrupted(*args):
        yield Row("float32", "auto", made([1], [1], [False], [0.0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_protocol", interrupted)
    status, data, _, _ = run(capsys, "embedded", "--json")
    assert (status, data["interrupted"], [r["tokens"] for r in data["rows"]]) == (130, True, [1])


def test_prompts_from_a_file(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("Mia lives in Oslo .\n\nLeo lives in Rome .\n")
    options = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--tokens",
        1,
        "--dtypes",
        "float64",
        "--routes",
        "auto",
        "--json",
    )
    status, data, _, _ = run(capsys, "embedded", *options)
    assert (status, data["prompts"]) == (0, ["Mia lives in Oslo .", "Leo lives in Rome ."])
    assert data["rows"][0]["relative_error"] < 1e-12


BAD = {
    "no tokens": (["--tokens", "0"], "--tokens must be at least 1"),
    "another kind of picture": (["--out", "figure.pdf"], "must be a file name in .svg or .png"),
    "a suffix only": (["--out", ".svg"], "must be a file name in .svg or .png"),
    "a folder that is not there": (["--out", "missing/figure.svg"], "cannot use missing"),
    "a picture that is there": (["--out", "there.svg"], "exists already"),
    "no chat template": (["--chat"], "has no chat template"),
    "no prompts": (["--prompts", "empty.txt"], "is empty"),
    "too long for the model": (["--tokens", "5000"], "positions, the model has"),
    "unknown route": (["--routes", "x"], "invalid choice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    rows, real = [], command.run_protocol
    monkeypatch.setattr(command, "run_protocol", lambda *given: (rows.append(row) or row for row in real(*given)))
    for name in ("there.svg", "empty.txt"):
        (tmp_path / name).touch()
    arguments, said = BAD[case]
    status, _, out, err = run(capsys, "embedded", *arguments)
    assert (status, out, err.count("\n"), rows) == (2, "", 1, [])  # refused before anything is measured
    assert said in err
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {"there.svg": 0, "empty.txt": 0}


def test_the_tolerance_of_explained_is_the_package_s(monkeypatch):
    done = made([1], [2], [True], [0.01])
    assert Row("bfloat16", "auto", done).to_dict()["explained"] == 1
    monkeypatch.setitem(tolerances.VERIFIED, torch.bfloat16, 1e-3)
    assert Row("bfloat16", "auto", done).to_dict()["explained"] == 0
