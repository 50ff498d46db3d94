"""Reports that tell the truth: perplexity, position 1 apart, control arms, size as KV cache, drift beside "verified"; Ctrl-C in any phase."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from compiled_facts import ASKED, OTHERWISE, PAIR, Plain, eight, load
from helpers import snapshot, unchanged

import controllability as ct
from controllability.cli.main import main
from controllability.cli.output import Output
from controllability.compiling import compile_context
from controllability.compiling.controls import another, random_change, shuffled
from controllability.compiling.write import measure_by_rank
from controllability.compiling.yardstick import agreement
from controllability.deltas import LowRank, Shift
from controllability.models.hooks.carried_patches import carried
from controllability.models.second_moments import second_moments


@pytest.fixture(scope="module")
def fit():
    model, tokenizer = load()
    return compile_context(model, tokenizer, PAIR, ASKED, OTHERWISE, controls=True)


def test_the_perplexity_is_that_of_whole_texts(fit):
    model, tokenizer = load()

    def perplexity():
        losses = []
        for sample in fit.sets["unrelated"].samples:
            ids = tokenizer(sample.text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                losses.append(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
        return torch.tensor(losses).sum().div(sum(len(s.source) - 1 for s in fit.sets["unrelated"].samples)).exp()

    found = fit.to_dict()["unrelated"]["perplexity"]
    assert found["base"] == pytest.approx(float(perplexity()), rel=1e-4)
    with fit.patch.applied(model):
        assert found["compiled"] == pytest.approx(float(perplexity()), rel=1e-4)
    assert found["ratio"] == found["compiled"] / found["base"] != 1
    assert "queries" not in fit.apart


@pytest.mark.parametrize("tokenizer", [None, Plain()])
def test_position_1_is_the_first_behind_the_protected_tokens_and_stands_apart(tokenizer):
    found = compile_context(load()[0], tokenizer or load()[1], PAIR, ASKED, controls=False)
    data, yardstick = found.to_dict()["unrelated"], found.sets["unrelated"]
    first, others = data["position_1"], data["other_positions"]
    at = 1 if tokenizer is None else 0  # behind <bos>, or where no token is put before a text
    by_hand = agreement([x[at : at + 1] for x in found.logits["unrelated"]], [y[at : at + 1] for y in yardstick.wanted])
    assert first == by_hand.to_dict()
    assert first["positions"] == len(yardstick.samples)
    assert first["positions"] + others["positions"] == data["positions"]
    total = first["kl"] * first["positions"] + others["kl"] * others["positions"]
    assert total == pytest.approx(data["kl"] * data["positions"])
    assert first["kl"] != pytest.approx(others["kl"], rel=0.05)
    assert "position_1" not in found.to_dict()["queries"]


def test_control_arms_do_not_do_what_the_patch_does(fit):
    data = fit.to_dict()
    arms = {arm["name"]: arm for arm in data["controls"]}
    assert [*arms] == ["shuffled context", "another context", "random change"]
    for name in ("another context", "random change"):
        assert arms[name]["queries"]["kl"] > 10 * data["queries"]["kl"]
        assert arms[name]["queries"]["exact_match"] == 0 < data["queries"]["exact_match"]
    assert arms["shuffled context"]["queries"]["exact_match"] == 1  # facts do not depend on their order
    shown = [row[1] for row in fit.rows()]
    assert all(shown.count(f"control: {name}") == len(fit.sets) for name in arms)
    assert compile_context(*load(), PAIR, ASKED).arms == []


@pytest.mark.parametrize("which", ["fit", "exact"])
def test_the_random_change_has_the_norm_of_each_map(which, fit):
    patch = fit.patch if which == "fit" else eight().patch
    other = random_change(patch)
    assert {type(entry.delta) for entry in patch.entries} == ({LowRank} if which == "fit" else {LowRank, Shift})
    for mine, theirs in zip(patch.entries, other.entries, strict=True):
        assert mine.param == theirs.param
        assert torch.allclose(mine.delta.norms(), theirs.delta.norms(), rtol=1e-5)
        a, b = mine.delta.dense().flatten().double(), theirs.delta.dense().flatten().double()
        assert abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0))) < 0.5


def test_other_contexts():
    _, tokenizer = load()
    assert (
        another(tokenizer, PAIR, ["x"]) == "Mia lives in Rome . Leo lives in Oslo ."
    )  # ours are no words of this vocabulary
    assert another(tokenizer, "Jan orders some tea .", ["Mia has a cat .", "Leo ."]) == "Mia has a cat . Leo ."
    assert sorted(shuffled("A b. C d! E?").split()) == ["A", "C", "E?", "b.", "d!"]
    assert shuffled("A b. C.") == "C. A b."
    assert shuffled("one two") == "two one"


def test_an_arm_without_a_patch_says_why():
    model, tokenizer = load()
    context = "Jan orders some tea ."  # without a name: other texts take its place, and are too long
    found = compile_context(model, tokenizer, context, [ASKED[0]], unrelated=["Leo has a cat . " * 51], controls=True)
    arm = found.to_dict()["controls"][1]
    assert set(arm) == {"name", "why"} and "positions" in arm["why"]
    assert "control: another context" not in {row[1] for row in found.rows()}


def test_the_patch_as_tokens_of_the_cache(fit, tmp_path):
    model, config = load()[0], load()[0].config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    numbers = sum(entry.delta.numbers for entry in fit.patch.entries)
    assert fit.to_dict()["kv_tokens"] == fit.kv_tokens == 4 * numbers / a_token
    fit.patch.save(tmp_path / "patch", model)
    size = (tmp_path / "patch" / "patch.safetensors").stat().st_size
    assert 4 * numbers <= size


def command(tmp_path, *options, strength="balanced"):
    (tmp_path / "queries.txt").write_text("\n".join(ASKED))
    texts = ["--context", PAIR, "--queries", str(tmp_path / "queries.txt"), "--strength", strength]
    return ["compile", "embedded", *texts, "--out", str(tmp_path / "out"), *options]


@pytest.mark.parametrize("strength", ["balanced", "exact"])
def test_what_drifts_is_not_called_verified_without_that_word(tmp_path, capsys, strength):
    assert main(command(tmp_path, strength=strength)) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "compile.json").read_text())
    moved = report["unrelated"]["kl"] > 0.2 or report["unrelated"]["perplexity"]["ratio"] > 1.15
    assert moved == (strength == "exact")
    (line,) = [line for line in text.splitlines() if line.startswith("verified")]
    assert ("drifts: unrelated text moves by" in line) == moved
    assert (report["verified"]["drifts"] is not None) == moved == (report["drifts"] is not None)
    if moved:
        assert "times the perplexity (above 1.15)" in line and "0.2" in line
        assert "It drifts: unrelated text moves by" in text and "try --strength strong" in text
    tokens = " ".join(text.split())
    assert "The patch is as large as the KV cache of" in tokens and "tokens; the context has 11." in tokens
    assert "Perplexity of unrelated text: " in tokens


def stages(**options):
    """The names of all phases that report progress."""
    seen = dict[str, None]()
    found = compile_context(*load(), PAIR, ASKED, progress=lambda stage, *_: seen.setdefault(stage), **options)
    measure_by_rank(found, load()[0], lambda stage, *_: seen.setdefault(stage))
    return [*seen]


@pytest.mark.parametrize("options", [{"answer_tokens": 2, "controls": True}, {"strength": "exact"}, {"ridge": 0.1}])
def test_ctrl_c_in_any_phase_leaves_the_model_and_the_files_as_they_were(tmp_path, monkeypatch, capsys, options):
    from controllability.cli import compile as compiling

    model, tokenizer = load()
    monkeypatch.setattr(compiling, "load_model", lambda *_: (model, tokenizer))
    before, found = snapshot(model), stages(**options)
    assert len(found) > 2
    words = {
        "answer_tokens": ["--answer-tokens", "2"],
        "controls": ["--controls"],
        "ridge": ["--ridge", "0.1"],
        "strength": [],
    }
    given = [word for name in options for word in words[name]]
    for stop in found:

        @contextlib.contextmanager
        def progress(_, stop=stop):
            def report(stage, *_):
                if stage == stop:
                    raise KeyboardInterrupt

            yield report

        monkeypatch.setattr(Output, "progress", progress)
        line = command(tmp_path, "--picture", "--moments", str(tmp_path / f"moments {stop}"), *given)
        if "strength" in options or "ridge" in options:
            line = command(tmp_path, "--picture", *given, strength=options.get("strength", "balanced"))
        assert main(line) == 130, stop
        assert capsys.readouterr().err == "controllability: interrupted; nothing was changed\n"
        assert unchanged(model, before) and carried(model) == () and not model.training
        assert {path.name for path in tmp_path.iterdir()} <= {"queries.txt", f"moments {stop}"}
        (tmp_path / f"moments {stop}").unlink(missing_ok=True)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert second_moments(model, [torch.arange(30)[None]]).tokens == 30  # it can be used as before
    assert ct.compile_context(model, tokenizer, PAIR, ASKED[:1]).results["queries"].kl < 0.1
