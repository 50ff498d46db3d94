"""Fused experts: an implementation that tells what each chosen expert computes, token by token.

transformers looks its experts' forward up by a name; ours is registered there and computes
each token's chosen experts with (B·T, k, ·) arrays, handing them to listeners before and after each matrix.
Three classes do not look it up; what they call instead is replaced for as long as needed.
"""

import weakref
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from controllability.arrays import ARITHMETICS
from controllability.models import transformers_parts
from controllability.models.hooks.installation import HookStack

NAME = "controllability"
Stage = Literal["first", "last"]  # of an expert's matrices


class ExpertListener(Protocol):
    """What is told: arrays over all tokens, one row a chosen expert."""

    def routed(self, index: Tensor, shares: Tensor) -> None:
        """The chosen experts (N, k) and their shares (N, k)."""

    def computed(self, stage: Stage, x: Tensor, y: Tensor) -> Tensor:
        """Matrices read ``x`` (N, 1 or k, in) and gave ``y`` (N, k, out); returns what to go on with."""
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
    if transformers_parts.is_fused(experts):
        own = transformers_parts.implemented(experts.config, NAME, experts_forward)
        installation.assign(experts, "config", own)  # models may share one config: this module alone looks ours up
    elif kind in ADAPTERS:
        ADAPTERS[kind](installation, layer, experts)
    else:
        raise transformers_parts.changed(f"experts {kind}")


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of fused experts, as transformers calls it: hidden (N, d), index and weights (N, k) -> (N, d)."""
    x = hidden_states.reshape(-1, 1, hidden_states.shape[-1])
    index, shares = top_k_index.reshape(len(x), -1), top_k_weights.reshape(len(x), -1)
    up, between = transformers_parts.first_stage(experts)
    _tell_choice(experts, index, shares)
    y = _told(experts, "first", x, _stage(x.expand(-1, index.shape[1], -1), *_matrices(experts, up), index))
    x = between(y)
    y = _told(experts, "last", x, _stage(x, *_matrices(experts, "down_proj"), index))
    return (y * shares[..., None]).sum(1).to(hidden_states.dtype).reshape(hidden_states.shape)


def _matrices(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Stacked matrices (E, out, in) of an experts module, and their biases."""
    weights = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias", None) if experts.has_bias else None
    return weights.transpose(-1, -2) if experts.is_transposed else weights, bias


def _tell_choice(experts: nn.Module, index: Tensor, shares: Tensor) -> None:
    for listener in _LISTENERS.get(experts, []):
        listener.routed(index, shares)


def _told(experts: nn.Module, stage: Stage, x: Tensor, y: Tensor) -> Tensor:
    """What the experts go on with when their listeners have been told."""
    for listener in _LISTENERS.get(experts, []):
        y = listener.computed(stage, x, y)
    return y


def _stage(x: Tensor, weights: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """``W[index] x``: (N, k, in), (E, out, in), (N, k) -> (N, k, out)."""
    grouped = x.dtype == weights.dtype and x.dtype != torch.float64  # for which torch has a kernel
    y = _grouped(x, weights, index) if grouped else ARITHMETICS["torch"].routed(x, weights, index)
    return y if bias is None else y + bias[index]


def _grouped(x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """The experts' product with the kernel that transformers uses: rows sorted by expert, one product for all of them."""
    experts, order = index.reshape(-1).sort(stable=True)
    ends = torch.bincount(experts, minlength=len(weights)).cumsum(0, dtype=torch.int32)
    rows = x.reshape(-1, x.shape[-1])[order]
    y = torch.empty(len(rows), weights.shape[1], dtype=x.dtype, device=x.device)
    y[order] = transformers_parts.grouped_linear(rows, weights, ends)
    return y.reshape(*index.shape, -1)


# ------------------------------------------------------- classes that do not look their experts' forward up


def _dbrx(installation: HookStack, layer: nn.Module, experts: Any) -> None:
    """Gate and up matrices are two parameters, stored (experts · h, d): listeners are told of one after the other."""
    glu = experts.mlp

    def stage(name: Stage, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return _told(experts, name, x, _stage(x.expand(-1, index.shape[1], -1), weights, None, index))

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _tell_choice(experts, top_k_index, top_k_weights)
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

    def told(stage: Stage, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
        at = index, torch.arange(x.shape[1], device=x.device)[:, None]  # of all experts' (E, N, ·), the chosen ones
        y = y.clone()
        y[at] = _told(experts, stage, x[at], y[at])
        return y

    def forward(hidden: Tensor) -> Tensor:
        index, shares = chosen[0]
        _tell_choice(experts, index, shares)
        x = hidden.view(experts.num_experts, -1, hidden.shape[-1])
        gate, up = told("first", index, x, torch.bmm(x, experts.gate_up_proj)).chunk(2, dim=-1)
        x = up * experts.act_fn(gate)
        y = told("last", index, x, torch.bmm(x, experts.down_proj))
        return y.reshape(-1, y.shape[-1])

    installation.after(router, remember)
    installation.assign(experts, "forward", forward)


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
        _tell_choice(experts, index.reshape(-1, k), shares.reshape(-1, k))

    def stage(name: Stage) -> Any:
        def tell(x: Tensor, y: Tensor) -> Tensor:
            order, k = told["order"], told["k"]
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            grids = (value[back].reshape(-1, k, value.shape[-1]) for value in (x, y))
            return _told(experts, name, *grids).reshape(-1, y.shape[-1])[order]

        return tell

    installation.after(experts.router, routed)
    installation.after(experts.input_linear, stage("first"))
    installation.after(experts.output_linear, stage("last"))


ADAPTERS = {"DbrxExperts": _dbrx, "Llama4TextExperts": _llama4, "JetMoeMoE": _jetmoe}
