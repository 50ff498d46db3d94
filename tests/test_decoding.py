"""What decides a token beside the logits: processors with a state of their own, and modes that are not ours."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_gemma
from transformers import LogitsProcessor

import controllability as ct


class Counting(LogitsProcessor):
    """A token for each call, as decoders that are bound to a grammar do."""

    def __init__(self):
        self.next = 9

    def __call__(self, input_ids, scores):
        self.next += 1
        chosen = torch.full_like(scores, -1e9)
        chosen[:, self.next] = 0
        return chosen


@pytest.mark.parametrize("control", [True, False])
def test_a_processor_is_called_once_a_step_in_every_run(gemma, control):
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    own = Counting()
    done = ct.generate(gemma, ids, max_new_tokens=4, eos_token_id=None, logits_processor=[own], control=control)
    assert done.sequences[:, 9:].tolist() == [[10, 11, 12, 13]] * 2
    assert own.next == 13
    assert done.agreement == 1
    if control:
        assert [step.unpatched.tolist() for step in done.steps] == [[t, t] for t in (10, 11, 12, 13)]


@pytest.mark.parametrize("seed", range(3))
def test_guidance_keeps_a_cache_for_every_run(seed):
    model = tiny_gemma(seed=seed)
    ids = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "eos_token_id": None, "guidance_scale": 2.0}
    wanted = model.generate(ids, do_sample=False, pad_token_id=0, **options)
    plain = model.generate(ids, do_sample=False, pad_token_id=0, **options | {"guidance_scale": 1.0})
    done = ct.generate(model, ids, **options)
    assert done.sequences.tolist() == wanted.tolist()
    assert done.agreement == 1
    assert seed or wanted.tolist() != plain.tolist()


def test_processors_that_cannot_be_copied_are_refused(gemma):
    processor = Counting()
    processor.lines = (line for line in "ab")
    with pytest.raises(ct.BadInput, match=r"logits processors of its own, and these cannot be copied: .*generator"):
        ct.generate(gemma, torch.arange(5, 12)[None], max_new_tokens=2, logits_processor=[processor])


OTHER_MODES = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4}, "dola generation": {"dola_layers": "high"},
    "constrained beam search": {"force_words_ids": [[3]]}, "assisted generation": {"assistant_early_exit": 1},
}  # fmt: skip


@pytest.mark.parametrize("mode", OTHER_MODES)
@pytest.mark.parametrize("where", ["options", "config"])
def test_another_way_to_decode_is_refused(gemma, mode, where):
    for name, value in OTHER_MODES[mode].items() if where == "config" else ():
        setattr(gemma.generation_config, name, value)
    with pytest.raises(ct.BadInput, match=f"ask for {mode}"):
        ct.generate(
            gemma, torch.arange(5, 12)[None], max_new_tokens=2, **(OTHER_MODES[mode] if where == "options" else {})
        )


@pytest.mark.parametrize("options", [
    {"output_scores": True}, {"return_dict_in_generate": True}, {"prefill_chunk_size": 4}, {"length_penalty": 2.0},
])  # fmt: skip
def test_what_would_be_ignored_is_refused(gemma, options):
    with pytest.raises(ct.BadInput, match=f"{next(iter(options))} has no effect"):
        ct.generate(gemma, torch.arange(5, 12)[None], max_new_tokens=2, **options)
