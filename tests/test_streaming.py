"""Tokens added to a patch of scope "all" one by one: as if all had been solved at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import error
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import controllability as ct
from controllability.solvers.least_norm import Span
from controllability.solvers.resorts import Resort
from controllability.solvers.served_tokens import Known, continued

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from scope_all import random_model

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONTEXT = 9


def built(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gptj":
        config: Any = GPTJConfig(
            vocab_size=120, n_embd=48, n_inner=128, n_layer=2, n_head=4, rotary_dim=4, n_positions=128
        )
        model = GPTJForCausalLM(config)
    elif family == "mixtral":
        config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
        model = MixtralForCausalLM(config)
    elif family == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=12))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


class Talk:
    """A first token, a context that the source leaves out, and a conversation of distinct tokens."""

    def __init__(self, seed: int = 0) -> None:
        ids = torch.randperm(110, generator=torch.Generator().manual_seed(seed)) + 5
        self.first, self.context, self.words = torch.tensor([1]), ids[:CONTEXT], ids[CONTEXT:]

    def target(self, count: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.cat([self.first, self.context, self.words[:count]])[None]}

    def source(self, count: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.cat([self.first, self.words[:count]])[None]}

    def pairs(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        here = torch.arange(1 + count)
        return here, torch.where(here > 0, here + CONTEXT, 0)

    def patch(self, model: Any, count: int, **options: Any) -> Any:
        pairs = self.pairs(count)
        return ct.patch_model(model, self.target(count), self.source(count), scope="all", positions=pairs, **options)

    @torch.no_grad()
    def errors(self, model: Any, mp: Any, count: int) -> tuple[float, float]:
        """(patched, unpatched) against the contextual model, at every word."""
        wanted = model(**self.target(count)).logits[0, self.pairs(count)[1]]
        with mp.applied(model):
            found = model(**self.source(count)).logits[0]
        return error(found, wanted), error(model(**self.source(count)).logits[0], wanted)


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gptj"])
def test_streaming_gives_what_solving_at_once_gives(family: str, via: str) -> None:
    model, talk = built(family), Talk()
    with ct.exact_mode():
        mp = talk.patch(model, 2, via=via)
        for count in range(3, 17):
            done = mp.extend(model, target=talk.target(count), source=talk.source(count))
            assert (done.tokens, done.grown, done.anew) == (1, True, False)
        at_once = talk.patch(model, 16, via=via)
        streamed, unpatched = talk.errors(model, mp, 16)
        assert streamed < 1e-9 < 1e-2 < unpatched
        assert talk.errors(model, at_once, 16)[0] < 1e-9
        assert talk.errors(model, mp, 5)[0] < 1e-9, "the earlier tokens are still served"
    assert mp.report.tokens == 17 == len(mp.rows.sample)
    assert mp.report.residual < 1e-9
    assert len(mp.report.layers[0].tokens.residual) == 17


def test_earlier_block_outputs_do_not_move() -> None:
    model, talk = built("gemma3"), Talk(1)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[:, :6].clone())) for layer in model.model.layers
    ]
    with ct.exact_mode(), torch.no_grad():
        mp = talk.patch(model, 5)
        with mp.applied(model):
            model(**talk.source(5))
        before, seen[:] = list(seen[-2:]), []
        scale = next(e.delta.value for e in mp.entries if e.param.name.endswith("post_feedforward_layernorm.weight"))
        for count in range(6, 10):
            mp.extend(model, target=talk.target(count), source=talk.source(count))
        seen[:] = []
        with mp.applied(model):
            model(**talk.source(9))
    for hook in hooks:
        hook.remove()
    assert all(error(a, b) < 1e-12 for a, b in zip(seen, before, strict=True))
    moved = next(e.delta.value for e in mp.entries if e.param.name.endswith("post_feedforward_layernorm.weight"))
    assert error(moved, scale) > 1e-6, "the joint scale did change: its left factors were found anew"


def test_a_new_sequence_beside_the_first() -> None:
    model, one, two = built("llama"), Talk(2), Talk(3)
    with ct.exact_mode():
        mp = one.patch(model, 6)
        done = mp.extend(model, two.target(5), two.source(5), positions=two.pairs(5))
        assert not done.grown
        assert done.tokens == 6
        mp.extend(model, one.target(7), one.source(7))
        mp.extend(model, two.target(6), two.source(6))
        for talk, count in ((one, 7), (two, 6)):
            patched, unpatched = talk.errors(model, mp, count)
            assert patched < 1e-9 < 1e-2 < unpatched
        assert mp.inputs["source"]["input_ids"].shape == (2, 8), "one padded batch"


def test_a_contradiction_is_refused_and_nothing_is_lost() -> None:
    model, talk = built("llama"), Talk(4)
    with ct.exact_mode():
        mp = talk.patch(model, 4)
        other = Talk(5)
        other.words = talk.words  # the same words behind another context: one state in layer 0, two targets
        with pytest.raises(ct.SideConditionFailed) as refused:
            mp.extend(model, other.target(4), {"input_ids": talk.words[None, :1]}, positions=([0], [3]))
            mp.extend(model, other.target(4), {"input_ids": talk.words[None, :1]}, positions=([0], [5]))
        assert refused.value.certificate is not None
        patched, unpatched = talk.errors(model, mp, 4)
        assert patched < 1e-9 < 1e-2 < unpatched
        mp.extend(model, talk.target(5), talk.source(5))
        assert talk.errors(model, mp, 5)[0] < 1e-9


def test_what_cannot_be_extended_says_why() -> None:
    model, talk = built("llama"), Talk(6)
    mp = talk.patch(model, 3)
    grown = talk.target(4), talk.source(4)
    with mp.applied(model), pytest.raises(ct.PatchError, match=r"leave applied\(\) or unmerge before extending"):
        mp.extend(model, *grown)
    each = ct.patch_model(model, talk.target(3), {"input_ids": talk.words[None, :3]})
    with pytest.raises(ct.PatchError, match=r"only a patch of scope 'all'.*of scope 'each'"):
        each.extend(model, *grown)
    for odd, why in (
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, r"one sequence, \(1, T\)"),
        (talk.source(4) | {"position_ids": torch.arange(5)[None]}, "leave out position_ids"),
        (talk.source(4) | {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "without padding"),
    ):
        with pytest.raises(ct.BadInput, match=why):
            mp.extend(model, talk.target(4), odd)


def test_float32_models_that_leave_layers_to_later_ones_are_solved_anew_when_they_must() -> None:
    model, talk = built("gemma3").float(), Talk(7)
    mp = talk.patch(model, 20)
    for count in range(21, 30):
        mp.extend(model, target=talk.target(count), source=talk.source(count))
    patched, unpatched = talk.errors(model, mp, 29)
    assert patched < 1e-3 < 1e-2 < unpatched


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gptj"])
def test_both_runs_are_one_pass_where_the_model_masks_its_past(family: str) -> None:
    model, talk = built(family), Talk(8)
    with ct.exact_mode():
        mp = talk.patch(model, 4)
        mp.extend(model, talk.target(5), talk.source(5))  # its caches are filled by whole runs
        passes: list[int] = []
        hook = model.register_forward_pre_hook(lambda m, a, k: passes.append(len(k["input_ids"])), with_kwargs=True)
        mp.extend(model, talk.target(6), talk.source(6))
        mp.extend(model, talk.target(9), talk.source(9))  # three tokens at once
        hook.remove()
        assert passes == [2, 2]
        assert talk.errors(model, mp, 9)[0] < 1e-9


def test_a_model_that_ignores_masks_is_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, talk = built("llama"), Talk(9)
    with ct.exact_mode():
        plain, passes = model.model.forward, []

        def careless(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            passes.append(len(kwargs["input_ids"]))
            return plain(*args, **kwargs)

        monkeypatch.setattr(model.model, "forward", careless)
        mp = talk.patch(model, 4)
        mp.extend(model, talk.target(5), talk.source(5))
        passes.clear()
        mp.extend(model, talk.target(6), talk.source(6))
        assert passes == [1, 1]
        assert talk.errors(model, mp, 6)[0] < 1e-9


def test_what_changed_behind_a_stream_is_noticed() -> None:
    model, talk = built("llama"), Talk(10)
    mp = talk.patch(model, 3)
    mp.extend(model, talk.target(4), talk.source(4))
    model.train()
    with pytest.raises(ct.BadInput, match="training mode"):
        mp.extend(model, talk.target(5), talk.source(5))
    model.eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(ct.PatchError, match="changed since this patch was made"):
        mp.extend(model, talk.target(5), talk.source(5))


def test_targets_that_move_for_tokens_that_depend_on_each_other_are_solved_anew() -> None:
    rng = np.random.default_rng(0)
    x, gap = rng.normal(size=(5, 4)), rng.normal(size=(5, 3))
    x[4], gap[4] = x[0] + x[1], gap[0] + gap[1]
    span = Span.of(x[:3])
    known = Known(x[:3], gap[:3], gap[:3], span=span, left=span.solve(gap[:3])[0])
    known, rest = continued(known, x[3:], gap[3:], gap[3:])
    assert np.abs(rest).max() < 1e-12
    assert known.left is not None and known.span is not None
    assert np.abs(known.span.coordinates @ known.left - gap).max() < 1e-12
    change = rng.normal(size=(5, 3))
    assert known.moved(change).span is None, "nothing to go on from"
    change[4] = change[0] + change[1]
    moved = known.moved(change)
    assert moved.span is not None and moved.left is not None
    assert np.abs(x @ (moved.left.T @ moved.span.right).T - gap - change).max() < 1e-12


class Repeating(Talk):
    """A conversation in which words come again: in a parallel block they have one state in layer 0."""

    def __init__(self) -> None:
        super().__init__(4)
        self.words = self.words[:5].repeat(4)


@pytest.mark.parametrize("via", ["input-output", "output"])
def test_a_word_that_comes_again_in_a_parallel_block(via: str) -> None:
    """Layer 0 falls short of the second target and moves nothing that it serves; the last layer serves both."""
    model, talk = built("gptj"), Repeating()
    with ct.exact_mode():
        mp = talk.patch(model, 2, via=via)
        for count in range(3, 15):
            done = mp.extend(model, target=talk.target(count), source=talk.source(count))
            assert (done.tokens, done.anew) == (1, False)
        streamed, unpatched = talk.errors(model, mp, 14)
    first, last = mp.report.layers
    assert Resort.SHORT in first.route and first.residual > 1e-3
    assert last.residual < 1e-9
    assert streamed < 1e-9 < 1e-2 < unpatched


def test_in_float32_the_last_layers_sizes_stay_free() -> None:
    """So many tokens that no scale keeps every RMS: what a new one changes in sizes is solved anew."""
    model, talk = random_model("gemma3", 32, 48, 2).float(), Talk(5)
    mp = talk.patch(model, 29)
    assert mp.report.layers[-1].route == Resort.SIZED
    done = mp.extend(model, target=talk.target(30), source=talk.source(30))
    assert done.anew
    assert mp.report.layers[-1].route == Resort.SIZED
    streamed, unpatched = talk.errors(model, mp, 30)
    assert streamed < 1e-4 < 1e-2 < unpatched


def test_ids_that_the_model_does_not_know_are_refused() -> None:
    model, talk = built("llama"), Talk(6)
    mp = talk.patch(model, 3)
    target, source = ({"input_ids": run["input_ids"].clone()} for run in (talk.target(4), talk.source(4)))
    target["input_ids"][0, -1] = source["input_ids"][0, -1] = 120
    with pytest.raises(ct.BadInput, match="target"):
        mp.extend(model, target, source)
    assert mp.report.tokens == 4
    assert mp.extend(model, talk.target(4), talk.source(4)).tokens == 1
