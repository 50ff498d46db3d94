"""Gradient distillation of a context into a LoRA adapter, as PEFT does it: the method to beat.

The adapter has the rank asked for on every linear map of the feed-forward halves, and a copy of each norm scale that the
patch moves too.  Adam on the mean KL from the contextual model's logits, all queries in one batch; the teacher runs once, before
the clock starts.  Seconds are processor time, as everywhere in ``compiled.py``.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from compiled_sets import Task

from controllability.compiling.token_sets import padded

THRESHOLDS = (1e-4, 1e-6)
LINEAR, SCALES = ["gate_proj", "up_proj", "down_proj"], ["post_feedforward_layernorm"]


@dataclass(frozen=True)
class Training:
    """Adam's learning rate, and whether it falls to zero over the whole budget (else it stays)."""

    rate: float
    decays: bool

    def __str__(self) -> str:
        return f"{self.rate:g} {'decaying' if self.decays else 'constant'}"


@dataclass(frozen=True)
class Reached:
    """When a KL was reached first: Adam's steps and the seconds until then."""

    steps: int
    seconds: float


@dataclass(frozen=True)
class Distilled:
    """The plain models at the end and where each KL was reached first, and how it went; a KL never reached has no entry."""

    final: Any
    at: dict[float, Any]
    reached: dict[float, Reached]
    lowest_kl: float
    final_kl: float
    seconds: float


def distil(model: Any, task: Task, rank: int, training: Training, steps: int) -> Distilled:
    """Train for the whole budget; the clock stops while a model is kept."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR, modules_to_save=SCALES)
    student = get_peft_model(copy.deepcopy(model), config).train()
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=training.rate, fused=True)
    ids = padded(task.queries, "source")["input_ids"]  # nothing looks at the padding on the right
    counts = torch.zeros_like(ids, dtype=torch.bool)
    for i, sample in enumerate(task.queries):
        counts[i, sample.rows("source")] = True
    wanted = torch.cat([*task.sets["queries"].yardstick.wanted]).double().log_softmax(-1)
    at: dict[float, Any] = {}
    reached: dict[float, Reached] = {}
    lowest, kept_for, started = float("inf"), 0.0, time.process_time()
    for step in range(steps):
        if training.decays:
            optimiser.param_groups[0]["lr"] = training.rate * (1 - step / steps)
        found = student(input_ids=ids, use_cache=False).logits[counts].double().log_softmax(-1)
        loss = (wanted.exp() * (wanted - found)).sum(-1).mean()
        kl = loss.item()  # after `step` steps
        lowest = min(lowest, kl)
        for threshold in THRESHOLDS:
            if kl <= threshold and threshold not in reached:
                now = time.process_time()
                reached[threshold] = Reached(step, now - started - kept_for)
                at[threshold] = _plain(student)
                kept_for += time.process_time() - now
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    seconds = time.process_time() - started - kept_for
    final = _plain(student)
    return Distilled(final, at, reached, lowest, task.sets["queries"].measure(final)["kl"], seconds)


def _plain(student: Any) -> Any:
    """The adapter as ordinary weights of a copy."""
    return copy.deepcopy(student).eval().merge_and_unload()
