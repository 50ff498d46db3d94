"""The contextual model's own continuation of each query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from controllability.compiling.token_sets import Sample, batches, padded
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import result_of
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
            following = _next_tokens(model, [batch[i] for i in open_])
            for i, token in zip(open_, following, strict=True):
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


def _next_tokens(model: Any, samples: Sequence[Sample]) -> list[int]:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in padded(samples, "target").items()}
    logits = result_of(model(**without_cache(model, inputs)))
    return [int(logits[i, len(sample.target) - 1].argmax()) for i, sample in enumerate(samples)]


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, from the tokenizer and the model's generation config."""
    config = getattr(model, "generation_config", None)
    held = [tokenizer.eos_token_id, *_listed(getattr(config, "eos_token_id", None))]
    return frozenset(token for token in held if token is not None)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
