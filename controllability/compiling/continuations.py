"""The contextual model's own continuation of each query."""

from collections.abc import Sequence
from typing import Any

import torch

from controllability.compiling.token_sets import Sample, batches
from controllability.compiling.yardstick import run
from controllability.models.sweep.target_run import Progress


@torch.no_grad()
def with_answers(
    model: Any, samples: Sequence[Sample], count: int, ends: frozenset[int], progress: Progress
) -> list[Sample]:
    """Every sample with up to ``count`` tokens of its target's greedy continuation; it stops before a token of ``ends``."""
    found: list[Sample] = []
    total, done = len(samples), 0
    for batch in batches(samples, "target"):
        growing = dict(enumerate(batch))
        for _ in range(count):
            open_ = sorted(growing)
            for i, logits in zip(open_, run(model, [batch[i] for i in open_], "target"), strict=True):
                token = int(logits[len(batch[i].target) - 1].argmax())
                if token in ends:
                    del growing[i]
                else:
                    batch[i] = batch[i].longer(token)
            if not growing:
                break
        found += batch
        done += len(batch)
        progress("answers", done, total)
    return found


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, from the tokenizer and the model's generation config."""
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    held = [tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])]
    return frozenset(token for token in held if token is not None)
