"""Fused experts: an implementation that tells what each chosen expert computes, token by token.

transformers looks its experts' forward up in ``ALL_EXPERTS_FUNCTIONS``; ours is registered there and computes
each token's chosen experts with (B·T, k, ·) arrays, handing them to listeners before and after each matrix.
Three classes do not look it up; what they call instead is replaced for as long as needed.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from controllability.arrays import ARITHMETICS
from controllability.models.hooks.installation import HookStack

NAME = "controllability"


class ExpertListener(Protocol):
    """What is told: arrays over all tokens, one row a chosen expert."""

    def routed(self, index: Tensor, shares: Tensor) -> None:
        """The chosen experts (N, k) and their shares (N, k)."""
        ...

    def first(self, x: Tensor, y: Tensor) -> Tensor:
        """The first matrices read ``x`` (N, 1 or k, in) and gave ``y`` (N, k, out); returns what to go on with."""
        ...

    def last(self, x: Tensor, y: Tensor) -> Tensor:
        """The last matrices read ``x`` and gave ``y``; returns what to go on with."""
        ...


_LISTENERS: weakref.WeakKeyDictionary[nn.Module, list[ExpertListener]] = weakref.WeakKeyDictionary()


def listen(installation: HookStack, layer: nn.Module, experts: nn.Module, listener: ExpertListener) -> None:
    """Let ``listener`` be told what ``experts`` (inside ``layer``) compute, until the installation is undone."""
    listeners = _LISTENERS.setdefault(experts, [])
    listeners.append(listener)
    installation.finally_do(lambda: listener in listeners and listeners.remove(listener))
    if len(listeners) > 1:
        return  # what tells them is in place; contexts end in the reverse order
    kind = type(experts).__name__
    if hasattr(experts, "_apply_gate") and hasattr(experts, "is_transposed"):
        _register()
        own = copy.copy(experts.config)  # models may share one config: this module alone looks ours up
        vars(own)["_experts_implementation_internal"] = NAME
        installation.assign(experts, "config", own)
    elif kind in ADAPTERS:
        ADAPTERS[kind](installation, layer, experts)
    else:
        raise NotImplementedError(kind)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


@dataclass
class Matrices:
    """The two stacked matrices of an experts module, (E, out, in) each, and what lies between."""

    first: Tensor
    last: Tensor
    first_bias: Tensor | None
    last_bias: Tensor | None
    between: Any


def _matrices(experts: Any) -> Matrices:
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    last = experts.down_proj
    if experts.is_transposed:
        first, last = first.transpose(-1, -2), last.transpose(-1, -2)
    first_bias, last_bias = (
        getattr(experts, f"{n}_bias", None) if experts.has_bias else None for n in (name, "down_proj")
    )
    return Matrices(first, last, first_bias, last_bias, experts._apply_gate if experts.has_gate else experts.act_fn)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of fused experts, as transformers calls it: hidden (N, d), index and weights (N, k) -> (N, d)."""
    return _compute(experts, _matrices(experts), hidden_states, top_k_index, top_k_weights)


def _compute(experts: nn.Module, m: Matrices, hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    index, shares = index.reshape(len(flat), -1), shares.reshape(len(flat), -1)
    listeners = _LISTENERS.get(experts, [])
    for listener in listeners:
        listener.routed(index, shares)
    x = flat[:, None, :]
    y = _stage(x.expand(-1, index.shape[1], -1), m.first, m.first_bias, index)
    for listener in listeners:
        y = listener.first(x, y)
    x = m.between(y)
    y = _stage(x, m.last, m.last_bias, index)
    for listener in listeners:
        y = listener.last(x, y)
    return (y * shares[..., None]).sum(1).to(hidden.dtype).reshape(hidden.shape)


def _stage(x: Tensor, weights: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """``W[index] x``: (N, k, in), (E, out, in), (N, k) -> (N, k, out)."""
    grouped = x.dtype == weights.dtype and x.dtype != torch.float64  # for which torch has a kernel
    y = _grouped(x, weights, index) if grouped else ARITHMETICS["torch"].routed(x, weights, index)
    return y if bias is None else y + bias[index]


def _grouped(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """The experts' product with the kernel that transformers uses: rows sorted by expert, one product for all of them."""
    from transformers.integrations.moe import _grouped_linear

    experts, order = index.reshape(-1).sort(stable=True)
    ends = torch.bincount(experts, minlength=len(weights)).cumsum(0, dtype=torch.int32)
    rows = x.reshape(-1, x.shape[-1])[order]
    y = torch.empty(len(rows), weights.shape[1], dtype=x.dtype, device=x.device)
    y[order] = _grouped_linear(rows, weights, ends)
    return y.reshape(*index.shape, -1)


# ------------------------------------------------------- classes that do not look their experts' forward up


def _dbrx(installation: HookStack, layer: nn.Module, experts: Any) -> None:
    """Gate and up matrices are two parameters, stored (experts · h, d): listeners are told of one after the other."""
    glu = experts.mlp

    def stage(name: str, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        y = _stage(x.expand(-1, index.shape[1], -1), weights, None, index)
        for listener in _LISTENERS.get(experts, []):
            y = getattr(listener, name)(x, y)
        return y

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        for listener in _LISTENERS.get(experts, []):
            listener.routed(top_k_index, top_k_weights)
        w1, v1, w2 = (w.view(experts.num_experts, -1, w.shape[-1]) for w in (glu.w1, glu.v1, glu.w2))
        x = hidden.reshape(-1, 1, hidden.shape[-1])
        gate, up = (stage("first", x, w, top_k_index) for w in (w1, v1))
        y = stage("last", glu.activation_fn(gate) * up, w2.transpose(-1, -2), top_k_index)
        return (y * top_k_weights[..., None]).sum(1).to(hidden.dtype).reshape(hidden.shape)

    installation.assign(experts, "forward", forward)


def _llama4(installation: HookStack, layer: nn.Module, experts: Any) -> None:
    """All experts run densely on inputs that are already multiplied with the shares (0 for those not chosen)."""
    router = next(m for m in layer.modules() if type(m).__name__ == "Llama4Router")
    chosen: list[tuple[Tensor, Tensor]] = []

    def remember(x: Tensor, output: Any) -> None:
        scores, logits = output
        index = logits.topk(router.top_k, dim=1).indices  # type: ignore[arg-type]
        chosen[:] = [(index, scores.gather(1, index))]

    def forward(hidden: Tensor) -> Tensor:
        index, shares = chosen[0]
        listeners = _LISTENERS.get(experts, [])
        for listener in listeners:
            listener.routed(index, shares)
        x = hidden.view(experts.num_experts, -1, hidden.shape[-1])
        y = torch.bmm(x, experts.gate_up_proj)
        y = _told(listeners, "first", index, x, y)
        gate, up = y.chunk(2, dim=-1)
        x = up * experts.act_fn(gate)
        y = _told(listeners, "last", index, x, torch.bmm(x, experts.down_proj))
        return y.reshape(-1, y.shape[-1])

    installation.after(router, remember)
    installation.assign(experts, "forward", forward)


def _told(listeners: list[ExpertListener], stage: str, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Tell listeners about (E, N, ·) arrays of all experts, as (N, k, ·) of the chosen ones."""
    tokens = torch.arange(x.shape[1], device=x.device)[:, None]
    for listener in listeners:
        chosen = getattr(listener, stage)(x[index, tokens], y[index, tokens])
        y = y.clone()
        y[index, tokens] = chosen
    return y


def _jetmoe(installation: HookStack, layer: nn.Module, experts: Any) -> None:
    """Tokens are sorted by expert: row p of a stage belongs to the (token, choice) pair ``order[p]``."""
    told: dict[str, Any] = {}

    def routed(x: Tensor, output: Any) -> None:
        order, _, gates, sizes, _ = output
        k = experts.router.top_k
        index, shares = torch.empty_like(order), torch.empty_like(gates)
        index[order] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(order.device)
        shares[order] = gates
        told.update(order=order, k=k)
        for listener in _LISTENERS.get(experts, []):
            listener.routed(index.reshape(-1, k), shares.reshape(-1, k))

    def stage(name: str) -> Any:
        def tell(x: Tensor, y: Tensor) -> Tensor:
            order, k = told["order"], told["k"]
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            for listener in _LISTENERS.get(experts, []):
                grid = getattr(listener, name)(x[back].reshape(-1, k, x.shape[-1]), y[back].reshape(-1, k, y.shape[-1]))
                y = grid.reshape(-1, y.shape[-1])[order]
            return y

        return tell

    installation.after(experts.router, routed)
    installation.after(experts.input_linear, stage("first"))
    installation.after(experts.output_linear, stage("last"))


ADAPTERS = {"DbrxExperts": _dbrx, "Llama4TextExperts": _llama4, "JetMoeMoE": _jetmoe}
