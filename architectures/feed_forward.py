"""Feed-forward halves, from the normed state to what is added: plain, gated, fused, mixture of experts.

Each is a small description that becomes an expression when it is given a ``View`` of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from architectures.view import View
from controllability.components import Activation, Glu, Linear, Mixture, Product, Routing, Share, Sum, Times, gated
from controllability.interfaces import Component

FeedForward = Callable[[View], Component]


@dataclass(frozen=True)
class Norm:
    """A normalisation module: rms or layer, scale and bias as stored, ``offset`` 1 where m − 1 is stored.

    ``bare`` has no parameters.  Whether there is a bias is read from the live module, and whether there are parameters.
    """

    module: str
    kind: Literal["rms", "layer"] = "rms"
    offset: int = 0
    bare: bool = False
    bias: bool = True

    def __call__(self, view: View, size: str = "d") -> Component:
        if self.bare or (view.get(self.module) is not None and not view.has(f"{self.module}.weight")):
            return view.bare_norm(self.module, self.kind)
        if self.kind == "rms":
            return view.rms_norm(self.module, self.offset, size)
        return view.layer_norm(self.module, self.bias, self.offset, size)


def layer_norm(module: str, **options: Any) -> Norm:
    """A LayerNorm module."""
    return Norm(module, "layer", **options)


@dataclass(frozen=True)
class Plain:
    """down(act(up z))."""

    up: str
    down: str
    activation: tuple[str, ...] = ()
    default: str = "gelu"
    renamed: tuple[tuple[str, str], ...] = ()  # a family's own names of activations
    kind = "plain"

    def __call__(self, view: View) -> Component:
        where = f"{self.up.rpartition('.')[0]}.act_fn"
        act = view.activation(*self.activation, default=self.default, module=where, renamed=dict(self.renamed))
        return view.linear(self.up, "h", "d") >> act >> view.linear(self.down, "d", "h")


@dataclass(frozen=True)
class Gated:
    """down(act(gate z) ∘ up z), maybe with a norm before down and fixed factors at gate and output."""

    path: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: tuple[str, ...] = ()
    default: str = "silu"
    norm: str = ""
    times: Callable[[View], tuple[Any, Any]] | None = None
    kind = "gated"

    def __call__(self, view: View) -> Component:
        at = f"{self.path}." if self.path else ""
        act = view.activation(*self.activation, default=self.default, module=f"{at}act_fn")
        gate: Component = view.linear(at + self.gate, "h", "d")
        before, after = self.times(view) if self.times else (1, 1)
        half = gated(gate >> Times(before) if before != 1 else gate, view.linear(at + self.up, "h", "d"), act)
        inner = half >> Norm(at + self.norm)(view, "h") if self.norm else half
        down = inner >> view.linear(at + self.down, "d", "h")
        return down >> Times(after) if after != 1 else down


@dataclass(frozen=True)
class Fused:
    """down(act(g) ∘ u) with g and u the halves of one matrix."""

    path: str = "mlp"
    first: str = "gate_up_proj"
    down: str = "down_proj"
    activation: tuple[str, ...] = ()
    default: str = "silu"
    glu: Callable[[View], Component] | None = None
    kind = "gated, fused"

    def __call__(self, view: View) -> Component:
        named = {"default": self.default, "module": f"{self.path}.act_fn"}
        between = self.glu(view) if self.glu else Glu(view.activation(*self.activation, **named))  # type: ignore[arg-type]
        return (
            view.linear(f"{self.path}.{self.first}", "2h", "d")
            >> between
            >> view.linear(f"{self.path}.{self.down}", "d", "h")
        )


@dataclass(frozen=True)
class MoE:
    """A mixture of experts, alone or beside shared experts; ``dense`` is what layers without experts have.

    ``shared_gate`` is a linear map to one number whose sigmoid multiplies the shared experts.  ``merge``
    puts routed and shared together (their sum by default).
    """

    routing: Callable[[View], Routing]
    path: str = "mlp"
    router: str = "gate"
    router_weight: str = "weight"
    experts: str = "experts"
    shared: FeedForward | None = None
    shared_at: str = ""
    shared_gate: str = ""
    dense: FeedForward | None = None
    transposed: bool = False
    glu: Callable[[View], Component] | None = None
    gated: bool = True
    share_first: bool = False
    shared_first: bool = False  # the model runs the shared experts before the routed ones
    times: tuple[str, ...] = ()  # config keys of a factor on the routed experts' sum
    after: str = ""
    before_experts: str = ""
    after_experts: str = ""
    merge: Callable[[View, Component, Component | None], Component] | None = None
    kind = "mixture of experts"

    def __call__(self, view: View) -> Component:
        experts = f"{self.path}.{self.experts}"
        if self.dense is not None and not view.has(experts, default=not view.settings.get("dense")):
            return self.dense(view)
        routed: Component = self.mixture(view)
        if self.before_experts:
            routed = routed >> view.linear(f"{self.path}.{self.after_experts}", "d", "l")
        factor = view.setting(*self.times, default=1) if self.times else 1
        if factor != 1:
            routed = routed >> Times(factor)
        beside = self._shared(view)
        if self.merge is not None:
            total = self.merge(view, routed, beside)
        else:
            pair = (beside, routed) if self.shared_first else (routed, beside)
            total = routed if beside is None else Sum(pair)  # type: ignore[arg-type]
        return total >> Norm(f"{self.path}.{self.after}")(view) if self.after else total

    def mixture(self, view: View) -> Mixture:
        """The routed experts alone."""
        experts = f"{self.path}.{self.experts}"
        first = "gate_up_proj" if self.gated else "up_proj"
        between = self.glu(view) if self.glu else self._between(view)
        width = "l" if self.before_experts else "d"
        inner: Component = (
            view.experts(f"{experts}.{first}", "2h" if self.gated else "h", width, self.transposed) >> between
        )
        if self.share_first:
            inner = Share() >> inner
        if self.before_experts:
            inner = view.linear(f"{self.path}.{self.before_experts}", "l", "d") >> inner
        last = view.experts(f"{experts}.down_proj", width, "h", self.transposed)
        router = view.router(f"{self.path}.{self.router}", self.router_weight)
        return Mixture(router, self.routing(view), inner, last, weighted=not self.share_first)

    def _between(self, view: View) -> Component:
        act = view.activation(module=f"{self.path}.{self.experts}.act_fn")
        return Glu(act) if self.gated else act

    def _shared(self, view: View) -> Component | None:
        if self.shared is None or (self.shared_at and not view.has(self.shared_at, default=True)):
            return None
        beside = self.shared(view)
        if not self.shared_gate:
            return beside
        gate = Linear(view.param(f"{self.path}.{self.shared_gate}.weight", "one", "d")) >> Activation("sigmoid")
        return Product((gate, beside))


# ------------------------------------------------------------------------------------------- routing

TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
    "num_experts_per_topk",
)  # fmt: skip


def top_k(view: View) -> int:
    """How many experts a token goes to."""
    value = view.setting(*TOP_K, default=2)
    return int(value[view.index] if isinstance(value, list | tuple) else value)


def softmax_top(renormalise: bool | str = True) -> Callable[[View], Routing]:
    """Soft-max over all experts, then top-k; renormalised always, never, or as a config key says."""

    def routing(view: View) -> Routing:
        wanted = view.setting(renormalise, default=True) if isinstance(renormalise, str) else renormalise
        return Routing(top_k(view), renormalise=1 if wanted else None)

    return routing


def top_softmax(view: View) -> Routing:
    """Top-k over the logits, then soft-max over the chosen."""
    return Routing(top_k(view), after=True)


@dataclass(frozen=True)
class SigmoidTop:
    """Sigmoid scores; a correction bias for the choice alone; maybe only the best groups; renormalised; scaled."""

    correction: str = "mlp.gate.e_score_correction_bias"
    scaling: tuple[str, ...] = ("routed_scaling_factor",)
    renormalise: str = "norm_topk_prob"
    groups: bool = False
    eps: float = 1e-20
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, view: View) -> Routing:
        bias = view.param(self.correction, "E") if self.correction and view.has(self.correction, True) else None
        n, kept = (view.setting(key, default=1) for key in ("n_group", "topk_group"))
        wanted = view.setting(self.renormalise, default=True) if self.renormalise else True
        scaling = view.setting(*self.scaling, default=1) if self.scaling else 1
        return Routing(
            top_k(view), "sigmoid", correction=bias, groups=(n, kept) if self.groups and n > 1 else None,
            renormalise=1 if wanted else None, eps=self.eps, scaling=scaling, **self.options,
        )  # fmt: skip
