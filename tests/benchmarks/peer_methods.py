"""The closed forms of ``peers.py``: published formulas for ΔW of a Gemma 3's down projections, in a few lines each.

patchkv     ridge on every down projection, block by block        ΔW = RKᵀ(KKᵀ + αI)⁻¹, α = λ‖KKᵀ‖²_F/tr KKᵀ  [arXiv 2609.39329]
memit       keys of ordinary text are kept, residual spread       ΔW = RKᵀ(λC + KKᵀ)⁻¹                         [arXiv 2210.07229]
null-space  AlphaEdit: what ordinary text reads is projected out  ΔW = RKᵀP(KKᵀP + λI)⁻¹                       [arXiv 2410.02355]
ctw         memit's in Σ = C shrunk, λ = ridge·tr CΣ⁻¹, rank 32   ΔW = R(KᵀΣ⁻¹K + λI)⁻¹KᵀΣ⁻¹        [Context-to-Weight-Memory]

K has the keys (what the projection reads at the tokens of the queries), R what its output lacks there.  In code they are rows.
What is the same for all, ours included: the tokens, the first one held with the weight of ten; keys of length one, as in C; and
what a projection before a norm is asked for (theory 7, damped), of which the papers, written for models without that norm, say
nothing.  What a method asks of its texts or of an optimiser beyond that (self-written questions, fitted targets) is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peer_texts import Task
from torch import Tensor

from controllability.compiling.metric_sweep import FIRST, fitted
from controllability.compiling.strengths import STRENGTHS, Strength
from controllability.compiling.token_sets import Prefix, Sample, padded
from controllability.compiling.yardstick import Yardstick
from controllability.deltas import LowRank
from controllability.models.moments import Moments
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import silent

Change = dict[str, tuple[Tensor, Tensor]]  # of a parameter by name: ΔW = left @ right
Solve = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]  # keys (T, n), residuals (T, d), layer

DAMPING, SHRINK, RANK = 0.1, 0.1, 32
OURS = {
    "gentle": STRENGTHS["gentle"], "balanced": STRENGTHS["balanced"], "strong": STRENGTHS["strong"],
    "λ 0.1, early": Strength(0.1, 0.01, first=0.2, closing=2, closing_ridge=0.003, closing_damping=0.0003),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What a method made with one value of its knob, its processor seconds and its passes over the model."""

    knob: str
    seconds: float
    passes: int
    change: Change


@dataclass(frozen=True)
class Metrics:
    """C = E[kkᵀ] of every layer's down projection, tr C = 1; what is made of it is made once a model and not counted."""

    moments: Moments
    _kept: dict[tuple[str, int, float], Any] = field(default_factory=dict)

    def second(self, layer: int) -> Tensor:
        """C (n, n), float64."""
        return self.moments.metrics[f"model.layers.{layer}.mlp.down_proj.weight"].second.double() / self.moments.tokens

    def factor(self, layer: int, shrink: float = 1e-4) -> Tensor:
        """The Cholesky factor of (1 − a)C + a·(tr C/n)·I."""
        return self._made("factor", layer, shrink, lambda C: torch.linalg.cholesky(shrunk(C, shrink)))

    def null_space(self, layer: int, share: float) -> Tensor:
        """A basis (n, k) of the directions of the smallest eigenvalues, which carry ``share`` of tr C at most."""
        spread, basis = self._made("eigen", layer, 0.0, torch.linalg.eigh)
        return basis[:, spread.clamp_min(0).cumsum(0) <= share * spread.sum()]

    def _made(self, what: str, layer: int, how: float, make: Callable[[Tensor], Any]) -> Any:
        if (what, layer, how) not in self._kept:
            self._kept[what, layer, how] = make(self.second(layer))
        return self._kept[what, layer, how]


def shrunk(C: Tensor, share: float) -> Tensor:
    """C with ``share`` of its trace spread over all directions alike."""
    return (1 - share) * C + share * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)


def ridge(K: Tensor, R: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """PatchKV's; the Gram matrices of keys and of tokens have the same trace and norm."""
    gram = K @ K.T
    return regressed(gram, R, strength * float(gram.square().sum() / gram.trace())), K


def kept_keys(K: Tensor, R: Tensor, factor: Tensor, strength: float, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """MEMIT's, C = LLᵀ given by L; ``rank`` truncates in the norm of what is minimised, KKᵀ + λC, as CTW does."""
    right = torch.cholesky_solve(K.T, factor).T
    gram = K @ right.T
    left = regressed(gram, R, strength)
    if rank is not None:  # ΔW(KKᵀ + λC)ΔWᵀ = RG(G + λI)⁻¹Rᵀ, G the Gram matrix
        size, basis = torch.linalg.eigh((gram + gram.T) / 2)
        size = size.clamp_min(0)
        top = torch.linalg.svd((R.T @ basis) * (size / (size + strength)).sqrt(), full_matrices=False)[0][:, :rank]
        left, right = top, (top.T @ left) @ right
    return left, right


def projected(K: Tensor, R: Tensor, basis: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """AlphaEdit's, P = UUᵀ given by U; PK(KᵀPK + λI)⁻¹ is (PKKᵀ + λI)⁻¹PK."""
    right = (K @ basis) @ basis.T
    return regressed(right @ right.T, R, strength), right


def regressed(gram: Tensor, R: Tensor, strength: float) -> Tensor:
    """((G + λI)⁻¹R)ᵀ; with λ = 0 by the pseudoinverse."""
    if not strength:
        return (torch.linalg.pinv(gram, hermitian=True) @ R).T
    return torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), R).T


@contextmanager
def applied(model: Any, change: Change) -> Iterator[None]:
    """The model with ΔW in its weights; restored to the bit."""
    held = {name: model.get_parameter(name).data for name in change}
    try:
        for name, (left, right) in change.items():
            model.get_parameter(name).data = held[name] + (left @ right).to(held[name])
        yield
    finally:
        for name, weight in held.items():
            model.get_parameter(name).data = weight


class Tokens:
    """The tokens of a task's queries, each once: where they are, their weights, and the contextual model's states there."""

    @torch.no_grad()
    def __init__(self, model: Any, task: Task) -> None:
        self.samples, self.layers = task.queries, model.model.layers
        places = [(i, j) for i, sample in enumerate(task.queries) for j in range(len(sample.source))]
        counted = [(*place, w) for place, w in zip(places, weights(task.queries), strict=True) if w]
        row, at, weight = zip(*counted, strict=True)
        shift = [
            len(s.target) - len(s.source) if j >= s.first else 0
            for s, j in ((self.samples[i], j) for i, j in zip(row, at, strict=True))
        ]
        self.row, self.at, self.shift, self.weight = (torch.tensor(x) for x in (row, at, shift, weight))
        self.wanted = self.states(model, "target", range(len(self.layers)))

    def states(self, model: Any, side: str, layers: Sequence[int]) -> dict[int, Tensor]:
        """What these layers give at the tokens, (T, d)."""
        at, found = self.at + self.shift * (side == "target"), {}
        with listening() as listen:
            for i in layers:
                listen(self.layers[i], lambda _, x, y, i=i: found.update({i: first_of(y)[self.row, at]}))
            model.base_model(**padded(self.samples, side), use_cache=False)
        return found

    def rows(self, layer: Any, x: Tensor, y: Tensor, lacks: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(K, R): keys of length √weight, and what the projection lacks, given what its normed output lacks of a state."""
        x, y, norm = x[self.row, self.at].double(), y[self.row, self.at].double(), layer.post_feedforward_layernorm
        scale, rms = 1 + norm.weight.double(), y.square().mean(-1, keepdim=True).add(norm.eps).sqrt()
        asked = rms * scale * lacks(scale * y / rms) / (scale.square() + DAMPING * scale.square().mean())
        factor = (self.weight.double().sqrt() / x.norm(dim=-1))[:, None]
        return x * factor, asked * factor

    @torch.no_grad()
    def block_by_block(self, model: Any, solve: Solve, layers: Sequence[int]) -> tuple[Change, int]:
        """Each projection makes good what its own layer lacks, on the run that is changed so far: one pass."""
        change: Change = {}
        entering: dict[int, Tensor] = {}

        def changed(i: int, x: Tensor, y: Tensor) -> Tensor:
            due = self.wanted[i].double() - entering[i][self.row, self.at].double()
            left, right = change[name_of(i)] = solve(*self.rows(self.layers[i], x, y, lambda given: due - given), i)
            return y + (x @ right.T.to(x)) @ left.T.to(x)

        with listening() as listen:
            for i in layers:
                listen(self.layers[i].pre_feedforward_layernorm, lambda _, x, y, i=i: entering.update({i: x[0]}))
                listen(self.layers[i].mlp.down_proj, lambda _, x, y, i=i: changed(i, x[0], y))
            model.base_model(**padded(self.samples, "source"), use_cache=False)
        return change, 1

    @torch.no_grad()
    def spread(self, model: Any, solve: Solve, layers: Sequence[int]) -> tuple[Change, int]:
        """From the lowest up, each takes an equal share of what the state behind the last of them lacks: a pass for each."""
        change: Change = {}
        for count, i in enumerate(layers):
            seen: list[tuple[Tensor, Tensor]] = []
            with applied(model, change), listening() as listen:
                listen(self.layers[i].mlp.down_proj, lambda _, x, y, seen=seen: seen.append((x[0], y)))
                now = self.states(model, "source", layers[-1:])[layers[-1]]
            share = (self.wanted[layers[-1]].double() - now.double()) / (len(layers) - count)
            change[name_of(i)] = solve(*self.rows(self.layers[i], *seen[0], lambda _, share=share: share), i)
        return change, len(layers)


def weights(samples: Sequence[Sample]) -> list[float]:
    """Of every token of every sample: one, where it comes first; the first ones have ``FIRST`` in all."""
    firsts = {prefix for sample in samples for prefix in sample.prefixes() if len(prefix) <= sample.first}
    seen: set[Prefix] = set()
    found = []
    for prefix in (prefix for sample in samples for prefix in sample.prefixes()):
        weight = FIRST / len(firsts) if prefix in firsts else 1.0
        found.append(0.0 if prefix in seen else weight)
        seen.add(prefix)
    return found


def name_of(layer: int) -> str:
    """The parameter's name."""
    return f"model.layers.{layer}.mlp.down_proj.weight"


def first_of(output: Any) -> Tensor:
    """A layer's states: some versions give a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def listening() -> Iterator[Callable[[Any, Callable[..., Any]], None]]:
    """Forward hooks that are gone at the end; one that returns something replaces the output."""
    hooks = []
    try:
        yield lambda module, hear: hooks.append(module.register_forward_hook(hear))
    finally:
        for hook in hooks:
            hook.remove()


def closed_form(
    model: Any, task: Task, solver: Callable[[float], Solve], knobs: Sequence[float], layers: Sequence[int], spreads: bool
) -> Iterator[Point]:  # fmt: skip
    """A point for every value of the knob; the pass over the contexts counts in each."""
    started = time.process_time()
    tokens = Tokens(model, task)
    before = time.process_time() - started
    for knob in knobs:
        solve, started = solver(knob), time.process_time()
        change, passes = (tokens.spread if spreads else tokens.block_by_block)(model, solve, layers)
        yield Point(f"{knob:g}", before + time.process_time() - started, 1 + passes, change)


def depths(model: Any, shares: Sequence[float]) -> list[int]:
    """Layers at these shares of the depth."""
    return sorted({min(int(share * len(model.model.layers)), len(model.model.layers) - 1) for share in shares})


def ours(model: Any, task: Task, metrics: Metrics, points: Mapping[str, Strength] = OURS) -> Iterator[Point]:
    """``compile_context``'s own sweep, with what it knows of the queries and the cache of the context that it makes first."""
    started, sample = time.process_time(), task.queries[0]
    context = sample.target[: len(sample.target) - len(sample.source) + sample.first]
    past = SharedPast.of(model, context, sample.target[len(context) :])
    queries = Yardstick.of(model, task.queries, past=past)
    before = time.process_time() - started
    for name, strength in points.items():
        started = time.process_time()
        patch = fitted(model, queries, strength, None, metrics.moments, silent, past)
        seconds = before + time.process_time() - started
        change = {e.param.name: (e.delta.left.mT, e.delta.right) for e in patch.entries if type(e.delta) is LowRank}
        assert len(change) == len(patch.entries), "a scale was moved"
        yield Point(name, seconds, 3, change)


def patchkv(model: Any, task: Task, metrics: Metrics) -> Iterator[Point]:
    """Every down projection.  The paper's λ is 1e-3."""
    layers = range(len(model.model.layers))
    return closed_form(
        model, task, lambda s: lambda K, R, _: ridge(K, R, s), (1e-3, 1e-2, 0.1, 1.0, 10.0), layers, False
    )


def memit(model: Any, task: Task, metrics: Metrics) -> Iterator[Point]:
    """In the middle layers.  λ counts tokens of ordinary text; the paper's is 15,000 beside thousands of facts."""

    def solver(strength: float) -> Solve:
        return lambda K, R, i: kept_keys(K, R, metrics.factor(i), strength)

    return closed_form(model, task, solver, (30.0, 100.0, 300.0, 1000.0, 3000.0), middle(model), True)


def null_space(model: Any, task: Task, metrics: Metrics) -> Iterator[Point]:
    """In the middle layers.  The paper's λ is 10 beside keys that are not of length one."""

    def solver(strength: float) -> Solve:
        return lambda K, R, i: projected(K, R, metrics.null_space(i, SHARE), strength)

    return closed_form(model, task, solver, (0.03, 0.1, 0.3, 1.0, 3.0), middle(model), True)


def ctw(model: Any, task: Task, metrics: Metrics) -> Iterator[Point]:
    """Four depths, rank 32, ridge 0.1 as its configuration has it."""

    def solver(strength: float) -> Solve:
        def solve(K: Tensor, R: Tensor, i: int) -> tuple[Tensor, Tensor]:
            factor = metrics.factor(i, SHRINK)
            felt = float(torch.cholesky_solve(metrics.second(i), factor).trace())
            return kept_keys(K, R, factor, strength * felt, RANK)

        return solve

    return closed_form(model, task, solver, (0.01, 0.03, 0.1, 0.3, 1.0), depths(model, (0.56, 0.67, 0.78, 0.89)), True)


def middle(model: Any) -> list[int]:
    """The layers from 0.45 to 0.83 of the depth."""
    count = len(model.model.layers)
    return [*range(round(0.45 * count), round(0.83 * count))]


SHARE = (
    0.2  # of what ordinary text reads, which the null space may carry: chosen on the context "style", of 0.02 and 0.2
)
CLOSED = {"ours": ours, "patchkv": patchkv, "memit": memit, "null-space": null_space, "ctw": ctw}
