"""Generation without the context: token for token the contextual model's, from the current token alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from family_models import RECIPES, build, default_dtype
from helpers import exactly, hook_count, snapshot, tiny_gemma, unchanged
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

import architectures
import controllability as ct
from controllability.models.generation.generate import left_padded
from controllability.models.hooks.carried_patches import carried
from controllability.models.reading.model_facts import input_embedding

NEVER = {"eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return tiny_gemma(layers=3, vocab=200)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))


def ragged(lengths=(12, 8, 3), side="right", seed=1):
    """Prompts of different lengths: ids, mask, and the prompts one by one."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, mask = torch.full((len(lengths), longest), 7), torch.zeros(len(lengths), longest, dtype=torch.long)
    singles = []
    for b, n in enumerate(lengths):
        one = torch.randint(3, 200, (n,), generator=generator)
        where = slice(0, n) if side == "right" else slice(longest - n, longest)
        ids[b, where], mask[b, where] = one, 1
        singles.append(one[None])
    return ids, mask, singles


def test_greedy_generation_is_the_contextual_models(model, prompt):
    done = ct.generate(model, prompt, max_new_tokens=10, **NEVER)
    plain = model.generate(prompt, max_new_tokens=10, do_sample=False, **NEVER)
    assert torch.equal(done.sequences, plain)
    assert torch.equal(torch.stack([s.patched for s in done.steps], 1), plain[:, 12:])
    assert done.agreement == 1.0
    assert done.max_logit_error < 1e-5 < 0.5 < done.max_logit_error_unpatched
    assert any(not torch.equal(s.unpatched, s.target) for s in done.steps), "the token alone must choose otherwise"


@pytest.mark.parametrize("options", [{"temperature": 0.8, "top_k": 20}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_sampled_generation_is_the_contextual_models(model, prompt, options):
    done = ct.generate(model, prompt, max_new_tokens=12, do_sample=True, seed=3, **options, **NEVER)
    torch.manual_seed(3)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=True, **options, **NEVER)
    assert torch.equal(done.sequences, plain)
    assert done.agreement == 1.0
    other = ct.generate(model, prompt, max_new_tokens=12, do_sample=True, seed=4, **options, **NEVER)
    assert not torch.equal(other.sequences, done.sequences), "another seed draws other tokens"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gives_each_prompt_its_own_generation(model, side):
    ids, mask, singles = ragged(side=side)
    done = ct.generate(model, ids, mask, max_new_tokens=6, **NEVER)
    assert done.agreement == 1.0
    assert done.max_logit_error < 1e-5 < 0.5 < done.max_logit_error_unpatched
    for b, one in enumerate(singles):
        alone = ct.generate(model, one, max_new_tokens=6, **NEVER)
        assert [t["patched"] for t in done.tokens(b)] == [t["patched"] for t in alone.tokens()]
        assert [t["position"] for t in done.tokens(b)] == [one.shape[1] - 1 + i for i in range(6)]
        plain = model.generate(one, max_new_tokens=6, do_sample=False, **NEVER)
        assert [t["target"] for t in done.tokens(b)] == plain[0, one.shape[1] :].tolist()


def test_one_pass_over_one_token_each(model, prompt):
    """Nothing is run again from the start: the lengths of all passes are counted."""
    lengths = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    ct.generate(model, prompt, max_new_tokens=5, control=False, **NEVER)
    handle.remove()
    checking = len(lengths) - 7  # the first use of a model compares its reading on random input
    assert checking in (0, 1)
    # the prompt and its sweep; the first token's pass, compared with a sweep by itself; one pass a token
    assert lengths[checking:] == [12, 1] + [1, 1] + [1] * 3


class Largest(TorchDispatchMode):
    """The most numbers that any operation has newly made (views of what exists do not count)."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_patch_is_ever_materialised():
    model = tiny_gemma(layers=2, d=512, h=1024)
    prompt = torch.arange(5, 10)[None]
    ct.generate(model, prompt, max_new_tokens=1)  # reads and checks the model
    with Largest() as made:
        ct.generate(model, prompt, max_new_tokens=3, **NEVER)
    assert made.numbers < 512 * 1024
    mp = ct.patch_model(model, {"input_ids": prompt}, {"input_ids": prompt[:, -1:]}, scope="last")
    with Largest() as made:
        mp.entries[0].delta.dense()
    assert made.numbers >= 512 * 1024, "a dense ΔW would be noticed"


def test_each_step_is_what_patch_model_gives(model, prompt):
    """An independent way to the same numbers: no cache, the whole history, one token."""
    done = ct.generate(model, prompt, max_new_tokens=4, **NEVER)
    for step in done.steps:
        n = int(step.position)
        history = done.sequences[:, : n + 1]
        mp = ct.patch_model(
            model, {"input_ids": history}, {"input_ids": history[:, -1:], "position_ids": torch.tensor([[n]])}
        )
        wanted = mp.target_logits[0, -1].double().numpy()
        assert int(step.patched) == int(mp.logits[0, -1].argmax())
        assert int(step.target) == int(np.argmax(wanted))
        gap = np.sort(wanted)[-1] - np.sort(wanted)[-2]
        assert abs(float(step.top1_gap) - gap) < 1e-4 * abs(wanted).max()
        with torch.no_grad():
            alone = model(history[:, -1:], position_ids=torch.tensor([[n]])).logits[0, -1].double().numpy()
        assert abs(float(step.max_logit_error_unpatched) - abs(alone - wanted).max()) < 1e-4 * abs(wanted).max()


def test_a_sample_that_ends_early_stops_and_the_others_go_on(model):
    ids, mask, _ = ragged()
    free = ct.generate(model, ids, mask, max_new_tokens=6, **NEVER)
    end = free.tokens(0)[1]["target"]
    done = ct.generate(model, ids, mask, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    left, left_mask = left_padded(ids, mask)
    plain = model.generate(
        left, attention_mask=left_mask, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    assert torch.equal(done.sequences[:, 12:], plain[:, 12:])
    lengths = [len(done.tokens(b)) for b in range(3)]
    assert lengths[0] == [t["target"] for t in free.tokens(0)].index(end) + 1
    assert max(lengths) == 6
    assert done.agreement == 1.0


@pytest.mark.parametrize("follow", ["target", "patched"])
def test_who_is_followed_after_a_mismatch(follow):
    """In bfloat16 route scale decides near-ties differently now and then; the history then says who was followed."""
    for seed in range(12):
        model = tiny_gemma(layers=2, vocab=400, dtype=torch.bfloat16, seed=seed, initializer_range=0.02)
        done = ct.generate(model, torch.arange(5, 17)[None], max_new_tokens=12, follow=follow, route="scale", **NEVER)
        followed = torch.stack([getattr(s, follow) for s in done.steps], 1)
        assert torch.equal(done.sequences[:, 12:], followed)
        if done.mismatches:
            assert done.agreement == 1 - len(done.mismatches) / 12
            assert done.explained, "each mismatch is a near-tie"
            return
    raise AssertionError("no mismatch in twelve models: the test does not test")


def test_what_rounding_does_not_explain_is_not_called_explained(model, prompt):
    step = ct.generate(model, prompt, max_new_tokens=1).steps[0]
    from dataclasses import replace

    assert bool(step.explained.all())
    wrong = replace(step, patched=step.target + 1)
    assert not bool(wrong.explained.all())
    assert not bool(step.near_tie.any())
    assert bool(replace(wrong, near_tie=~step.near_tie).explained.all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["auto", "uniform", "secular"])
def test_half_precision(dtype, route):
    model = tiny_gemma(layers=3, vocab=200, dtype=dtype)
    ids, mask, _ = ragged()
    done = ct.generate(model, ids, mask, max_new_tokens=6, route=route, **NEVER)
    assert done.explained
    assert done.relative_error < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert done.max_logit_error_unpatched > 10 * done.max_logit_error


UNPADDED = ("prophetnet",)  # whose own mask of padding overflows in float64
FAMILIES = ("llama", "gpt2", "gptj", "mixtral", "olmo2", "falcon", "phi", "qwen3_moe", "gpt_oss", "bloom", "jamba")


def generates(name):
    """Three tokens of two prompts in the exact mode: (agreement, patched error, unpatched error)."""
    with default_dtype(name), exactly(torch.float64):
        model = build(name)
        vocab = len(input_embedding(model))
        ids = torch.randint(5, vocab, (2, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 4:] = name in UNPADDED
        done = ct.generate(model, ids, mask, max_new_tokens=3, **NEVER)
    return done.agreement, done.relative_error, done.max_logit_error_unpatched


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    agreement, error, unpatched = generates(name)
    assert agreement == 1.0
    assert error < 1e-9 < unpatched


# -------------------------------------------------------------------------------------- nothing is left behind


def test_an_exception_in_mid_generation_leaves_the_model_alone(model, prompt):
    before, seen = snapshot(model), []

    def stop(step):
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ct.generate(model, prompt, max_new_tokens=5, on_step=stop, **NEVER)
    assert len(seen) == 2
    assert unchanged(model, before)
    assert hook_count(model) == 0
    assert carried(model) == ()
    assert ct.generate(model, prompt, max_new_tokens=2, **NEVER).agreement == 1.0, "and the next one works"


def test_what_the_callers_own_code_raises_is_not_renamed(model, prompt):
    def wrong(step):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        ct.generate(model, prompt, max_new_tokens=2, on_step=wrong)


def test_inside_inference_mode(model, prompt):
    with torch.inference_mode():
        assert ct.generate(model, prompt, max_new_tokens=2, **NEVER).agreement == 1.0


def test_a_streamer_is_told_every_token(model, prompt):
    told = []

    class Streamer:
        def put(self, value):
            told.append(value.reshape(-1).tolist())

        def end(self):
            told.append("end")

    done = ct.generate(model, prompt, max_new_tokens=3, streamer=Streamer(), **NEVER)
    assert told[-1] == "end"
    assert [t for row in told[:-1] for t in row] == done.sequences[0].tolist()


def test_reports_are_kept_when_asked_for(model):
    ids, mask, _ = ragged()
    done = ct.generate(model, ids, mask, max_new_tokens=2, reports=True, **NEVER)
    for step in done.steps:
        assert [layer.index for layer in step.layers] == [0, 1, 2]
        for layer in step.layers:
            assert len(layer.tokens.residual) == len(layer.tokens.route) == 3
            assert 0 < max(layer.tokens.residual) < 1e-4
            assert all(margin["margin"] > 0 for margin in layer.margins if margin["margin"] is not None)
    assert ct.generate(model, ids, mask, max_new_tokens=1).steps[0].layers is None


def test_the_summary_is_ready_for_json(model, prompt):
    import json

    data = json.loads(json.dumps(ct.generate(model, prompt, max_new_tokens=2, **NEVER).to_dict(), allow_nan=False))
    assert len(data["samples"][0]) == 2
    assert data["agreement"] == 1.0
    without = ct.generate(model, prompt, max_new_tokens=2, control=False, **NEVER)
    assert without.max_logit_error_unpatched is None
    assert without.steps[0].unpatched is None


# ------------------------------------------------------------------------------------------------- bad input

IDS = torch.arange(5, 17)[None]
BAD = {
    "no tensor": ({"input_ids": [[1, 2]]}, "must be a tensor of integers"),
    "floats": ({"input_ids": torch.rand(1, 4)}, "must be a tensor of integers"),
    "one row": ({"input_ids": torch.arange(4)}, "must be a tensor of integers"),
    "empty": ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
    "empty in a batch": (
        {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1] * 12, [0] * 12])}, "prompt 1 is empty",
    ),
    "mask of another shape": ({"attention_mask": torch.ones(1, 3)}, "must have the shape of input_ids"),
    "too long": ({"max_new_tokens": 200}, "12 tokens and 200 more need 211 positions, the model has 128"),
    "unknown token": ({"input_ids": IDS + 500}, "token ids must lie in 0 … 199, got 505"),
    "no tokens wanted": ({"max_new_tokens": 0}, "must be a positive integer, got 0"),
    "a fraction of a token": ({"max_new_tokens": 2.5}, "must be a positive integer, got 2.5"),
    "unknown follow": ({"follow": "nobody"}, "must be 'target' or 'patched'"),
    "unknown route": ({"route": "best"}, "unknown route 'best'"),
    "beams": ({"num_beams": 4}, "num_beams=4: one continuation of each prompt"),
    "no cache": ({"use_cache": False}, "use_cache must stay on"),
    "beams in the config": (
        {"generation_config": GenerationConfig(num_beams=3, eos_token_id=None)}, "asks for 3 sequences from 1 prompts",
    ),
    "a seed that is none": ({"seed": "x"}, "seed must be an integer, got 'x'"),
    "a seed of 100 digits": ({"seed": 10**100}, "seed must be an integer, got 1000.*64 bits"),
    "a seed that is no number": ({"seed": True}, "seed must be an integer, got True"),
    "a route that is no name": ({"route": []}, "route must be a name, got list"),
    "steps told to nobody": ({"on_step": 3}, "on_step must be a function of a step, got int"),
    "temperature 0": ({"do_sample": True, "temperature": 0.0}, "cannot generate with these options.*temperature"),
    "an unknown option": ({"tempreture": 1.0}, "cannot generate with these options.*tempreture"),
    "a cache of the caller's": ({"past_key_values": object()}, "past_key_values cannot be combined"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model, case):
    given, words = BAD[case]
    before = snapshot(model)
    with pytest.raises(ct.BadInput, match=words):
        ct.generate(model, **{"input_ids": IDS, "max_new_tokens": 2, **given})
    assert unchanged(model, before)
    assert hook_count(model) == 0


def test_models_that_cannot_generate_are_refused(model):
    sizes = {"vocab_size": 60, "d_model": 32, "d_ff": 64, "num_layers": 1, "d_kv": 8, "num_heads": 4}
    with pytest.raises(ct.BadInput, match="is an encoder-decoder"):
        ct.generate(T5ForConditionalGeneration(T5Config(**sizes)).eval(), IDS)
    with pytest.raises(ct.BadInput, match="has no generate"):
        ct.generate(model.model, IDS)
    with pytest.raises(ct.BadInput, match="must be a torch module, got str"):
        ct.generate("gemma", IDS)


def test_a_model_that_carries_a_patch_is_refused(model):
    mp = ct.patch_model(model, {"input_ids": IDS}, {"input_ids": IDS[:, -1:]}, scope="last")
    with mp.applied(model), pytest.raises(ct.PatchError, match="patches are on the model"):
        ct.generate(model, IDS)


def test_the_padding_moves_to_the_left_and_tokens_keep_their_order():
    ids = torch.tensor([[4, 5, 6, 0], [0, 7, 8, 0], [1, 2, 3, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    moved, kept = left_padded(ids, mask)
    assert [row[m == 1].tolist() for row, m in zip(moved, kept, strict=True)] == [[4, 5, 6], [7, 8], [1, 2, 3, 9]]
    assert kept.tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]


NO_TEXT = "cannot be run on one row of token ids a prompt and nothing else"
NO_CURRENT_TOKEN = "does not decode its last token"
CANNOT = {
    "blt": "generate.. fails on this BltForCausalLM, without any patch: .*no attribute 'num_hidden_layers'",
    "gemma4_assistant": NO_TEXT, "gemma4_unified_assistant": NO_TEXT, "musicgen": NO_TEXT, "musicgen_melody": NO_TEXT,
    "xlm": NO_CURRENT_TOKEN, "xlnet": NO_CURRENT_TOKEN,
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_families_that_can_be_patched_and_not_generate(name):
    with pytest.raises(ct.BadInput, match=CANNOT[name]):
        generates(name)


# transformers' own step with a state spreads a batch over itself (RWKV); a sequence is padded behind to whole chunks (Reformer)
NOT_IN_A_BATCH = {"rwkv": "2 samples of 1 positions", "reformer": "misses the target run"}


@pytest.mark.parametrize("name", NOT_IN_A_BATCH)
def test_families_whose_steps_differ_are_noticed(name):
    with pytest.raises(ct.ControllabilityError, match=NOT_IN_A_BATCH[name]):
        generates(name)


def decoders():
    """Every other causal-LM family."""
    found = [name for name, recipe in RECIPES.items() if re.search("Causal|LMHead", recipe["model_class"])]
    return [name for name in found if name not in {*CANNOT, *NOT_IN_A_BATCH}]


@pytest.mark.slow
@pytest.mark.parametrize("name", decoders())
def test_every_family(name):
    """A family generates, unless it is refused by name."""
    if architectures.find(name).refusal is not None:
        with pytest.raises(ct.NotControllable):
            generates(name)
        return
    agreement, error, unpatched = generates(name)
    assert agreement == 1.0
    assert error < 1e-9 < unpatched
