"""Distillation into a LoRA adapter, the trained peer of ``peers.py``: its line is its own trajectory.

Rank r on gate, up and down of every layer, Adam at a constant rate, the loss of a step the mean KL from the contextual model over all
tokens of all queries.  With preservation the mean KL from the model itself on one row of ordinary text is added, another one
each step, out of as many tokens as C is of.  The rate is chosen on another context, by the lowest loss after a few steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peer_methods import Change, Point
from peer_texts import Task, Texts, hidden_states
from torch import Tensor

from controllability.compiling.token_sets import Sample

RATES = (1e-3, 3e-3, 1e-2)
MAPS = ("gate_proj", "up_proj", "down_proj")
Rows = Sequence[Sequence[int]]


class Adapter:
    """Low-rank changes of the feed-forward maps while it is attached: ΔW = BA, with B zero at first."""

    def __init__(self, model: Any, rank: int) -> None:
        self.maps = {
            f"model.layers.{i}.mlp.{name}.weight": layer.mlp.get_submodule(name)
            for i, layer in enumerate(model.model.layers)
            for name in MAPS
        }
        draw = torch.Generator().manual_seed(0)
        self.factors: Change = {}
        for name, linear in self.maps.items():
            outer, inner = linear.weight.shape
            left = torch.zeros(outer, rank, requires_grad=True)
            right = (torch.rand(rank, inner, generator=draw) * 2 - 1) * inner**-0.5
            self.factors[name] = left, right.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [factor for pair in self.factors.values() for factor in pair]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model as the adapter changes it."""
        hooks = [
            linear.register_forward_hook(lambda _, x, y, name=name: y + (x[0] @ self.factors[name][1].T) @ self.factors[name][0].T)
            for name, linear in self.maps.items()
        ]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def change(self) -> Change:
        """As it is now."""
        return {name: (left.detach().clone(), right.detach().clone()) for name, (left, right) in self.factors.items()}


def trajectory(
    model: Any, task: Task, rank: int, rate: float, marks: Sequence[int], preserved: Rows = ()
) -> Iterator[tuple[Point, float]]:  # fmt: skip
    """(point, loss of that step) after each of ``marks`` steps, the last of which ends it.  The base model is left as it was."""
    adapter, queries, parts = Adapter(model, rank), None, []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(adapter.parameters, lr=rate)
    order = torch.randperm(len(preserved), generator=torch.Generator().manual_seed(0)).tolist()
    spent, passes = 0.0, 0
    for step in range(1, max(marks) + 1):
        started = time.process_time()
        model.requires_grad_(False)
        try:
            if queries is None:
                queries, passes = _Goal(model, task.queries), 1
            if preserved:
                ids = tuple(preserved[order[step % len(order)]])
                parts = [_Goal(model, [Sample("", ids, ids, 0)])]
            with adapter.attached():
                loss = sum((goal.mean_kl(model) for goal in parts), queries.mean_kl(model))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        finally:
            for parameter in trained:
                parameter.requires_grad_()
        passes += 2 + 3 * len(parts)  # forward and back; with preservation also without the adapter
        spent += time.process_time() - started
        if step in marks:
            yield Point(str(step), spent, passes, adapter.change()), float(loss.detach())


class _Goal:
    """Texts and the distributions that are wanted at their positions, as the KL needs them at each step."""

    @torch.no_grad()
    def __init__(self, model: Any, samples: Sequence[Sample]) -> None:
        self.samples, wanted = samples, Texts.of(model, samples).wanted
        self.chances = wanted.exp()
        self.entropy = -(self.chances * wanted).sum(-1)

    def mean_kl(self, model: Any) -> Tensor:
        """From the model as it is now, over the positions."""
        logits = model.get_output_embeddings()(hidden_states(model, self.samples, "source"))
        return (logits.logsumexp(-1) - (self.chances * logits).sum(-1) - self.entropy).mean()


def chosen_rate(model: Any, task: Task, rank: int, steps: int, preserved: Rows = ()) -> float:
    """Of ``RATES``, the one with the lowest loss after so many steps."""
    losses = {rate: next(trajectory(model, task, rank, rate, [steps], preserved))[1] for rate in RATES}
    print(f"rate: {losses}", flush=True)
    return min(losses, key=lambda rate: losses[rate])
