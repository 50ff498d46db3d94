"""Where earlier tokens' outputs cannot stay as they are, extending solves everything anew; and a failure changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_models import build
from test_streaming import SIZES, Talk, built, random_model
from transformers import BertConfig, BertForMaskedLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

import controllability as ct
from controllability.models.patches import extend as streaming
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.inputs import is_causal
from controllability.solvers.resorts import Resort


def narrow_window() -> Any:
    """Gemma 3 whose first layer sees two tokens: a pair of words that comes again has the same state there."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 3},
        head_dim=12,
        sliding_window=2,
        layer_types=layers,
        attn_implementation="eager",
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def test_a_layer_that_falls_short_before_a_joint_scale() -> None:
    """A new scale moves what it gave by least squares: no new token may come without solving for all."""
    model, talk = narrow_window(), Talk(4)
    one, words = torch.tensor([1]), talk.words
    talk.words = torch.cat([words[:2], one, words[:1], words[2:4], one, words[:1], words[4:]])
    with ct.exact_mode():
        mp = talk.patch(model, 6)
        assert Resort.SHORT in mp.report.layers[0].route
        for count in (7, 8, 9):
            mp.extend(model, talk.target(count), talk.source(count))
            streamed, unpatched = talk.errors(model, mp, count)
            assert streamed < 1e-9 < 1e-2 < unpatched


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_positions_without_a_pair_would_move(family: str) -> None:
    model, talk = built(family), Talk(7)

    def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        here, there = talk.pairs(count)
        return here[1:], there[1:]

    with ct.exact_mode(), torch.no_grad():
        mp = ct.patch_model(model, talk.target(3), talk.source(3), scope="all", positions=pairs(3))
        for count in (4, 5, 6):
            assert mp.extend(model, talk.target(count), talk.source(count)).anew
        wanted = model(**talk.target(6)).logits[0, pairs(6)[1]]
        with mp.applied(model):
            found = model(**talk.source(6)).logits[0, 1:]
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-9


def test_a_model_that_looks_ahead_is_solved_anew() -> None:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    model, talk = BertForMaskedLM(BertConfig(**sizes)).double().eval(), Talk(8)
    with ct.exact_mode():
        mp = talk.patch(model, 4)
        assert mp.extend(model, talk.target(5), talk.source(5)).anew
        streamed, unpatched = talk.errors(model, mp, 5)
    assert streamed < 1e-9 < 1e-2 < unpatched


@pytest.mark.parametrize(("name", "causal"), [("llama", True), ("gpt2", True), ("mixtral", True), ("xlnet", False)])
def test_whether_a_model_looks_ahead_is_tried(name: str, causal: bool) -> None:
    model = build(name)
    assert is_causal(model, checked_reading(model)) is causal


def gpt2(positions: int) -> Any:
    torch.manual_seed(0)
    return (
        GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=48, n_layer=2, n_head=4, n_positions=positions))
        .double()
        .eval()
    )


def test_padding_on_the_left_of_absolute_positions() -> None:
    """Without its padding the sequence has other positions than those it was solved at."""
    model, talk = gpt2(64), Talk(9)
    runs = []
    for run in (talk.target(3), talk.source(3)):
        ids = run["input_ids"]
        padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
        runs.append({"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) >= 2).long()[None]})
    here, there = talk.pairs(3)
    with ct.exact_mode():
        mp = ct.patch_model(model, *runs, scope="all", positions=(here + 2, there + 2))
        assert mp.extend(model, talk.target(4), talk.source(4)).anew
        assert not mp.extend(model, talk.target(5), talk.source(5)).anew
        assert talk.errors(model, mp, 5)[0] < 1e-9


def test_a_new_sequence_that_fills_all_positions() -> None:
    model, one, two = gpt2(16), Talk(10), Talk(11)
    with ct.exact_mode():
        mp = one.patch(model, 2)
        mp.extend(model, two.target(6), two.source(6), positions=two.pairs(6))
        assert two.target(6)["input_ids"].shape[1] == 16
        assert max(one.errors(model, mp, 2)[0], two.errors(model, mp, 6)[0]) < 1e-9


@pytest.mark.parametrize(
    "error", [ct.SideConditionFailed("a condition", "somewhere", -1.0), ct.NotVerified("it misses")]
)
def test_what_going_on_refuses_is_tried_at_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition can fail for the tokens that came one by one, by rounding, and hold for all of them."""
    model, talk = built("gemma3"), Talk(8)

    def refuse(*_: Any) -> Any:
        raise error

    with ct.exact_mode():
        mp = talk.patch(model, 5)
        with monkeypatch.context() as patched:
            patched.setattr(streaming, "refuse_unreached", refuse)
            assert mp.extend(model, talk.target(6), talk.source(6)).anew
        assert not mp.extend(model, talk.target(7), talk.source(7)).anew
        assert talk.errors(model, mp, 7)[0] < 1e-9


@pytest.mark.parametrize("name", ["record", "joined", "look_at", "entries_of", "batch_of"])
def test_an_interrupted_extension_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C anywhere behind the pass: the same token can be added again, and another one instead of it."""
    model, talk = built("llama"), Talk(12)
    other = Talk(12)
    other.words = torch.cat([talk.words[:6], talk.words[20:]])
    with ct.exact_mode():
        mp = talk.patch(model, 5)
        mp.extend(model, talk.target(6), talk.source(6))

        def stop(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(streaming, name, stop)
            with pytest.raises(KeyboardInterrupt):
                mp.extend(model, talk.target(7), talk.source(7))
        assert mp.report.tokens == 7 == len(mp.rows.sample)
        assert len(mp.extensions) == 1
        assert talk.errors(model, mp, 6)[0] < 1e-9
        mp.extend(model, other.target(7), other.source(7))
        assert other.errors(model, mp, 7)[0] < 1e-9


def test_whether_sizes_are_free_is_not_remembered() -> None:
    """The ε of the norm behind the last layer decides it, and can be changed."""
    model, talk = random_model("gemma3", 32, 48, 2).float(), Talk(5)
    assert talk.patch(model, 29).report.layers[-1].route == "kept rms, sizes free"
    model.model.norm.eps = 1.0
    assert talk.patch(model, 29).report.layers[-1].route != "kept rms, sizes free"
