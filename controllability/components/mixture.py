"""Mixture of experts: a router, the experts' first maps, and their last linear maps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from controllability.arrays import Array, arithmetic
from controllability.components.routing import Routing
from controllability.components.updates import CHOSEN, SHARES, expertwise, spread
from controllability.deltas import ExpertLowRank, PatchedMatrix
from controllability.interfaces import Combinator, Component, Param, Params, Size, Steerable, Update


@dataclass(frozen=True)
class ExpertLinear(Component, Steerable):
    """y_j = W_e x_j (+ b_e) with e the j-th chosen expert.  x: (..., k, in), y: (..., k, out).

    ``weight`` is stored (experts, out, in), or (experts, in, out) with layout "in_out"; ``bias``
    (experts, out).  Its weight moves expert by expert (rules I-experts, O-experts); those that are not chosen stay as they are.

    >>> import numpy as np
    >>> experts = ExpertLinear(Param("W", ("E", "h", "d")))
    >>> experts({"W": np.stack([np.eye(2), 2 * np.eye(2)]), CHOSEN: np.array([1])}, np.ones((1, 2)))
    array([[2., 2.]])
    """

    weight: Param
    bias: Param | None = None
    layout: Literal["out_in", "in_out"] = "out_in"
    stacked: int | None = None
    per_expert = True
    bounds = {"stacked": "≥ 1"}

    def __call__(self, params: Params, x: Array) -> Array:
        index: Array = params[CHOSEN]
        weight = self.weight.value(params)
        base = self._matrices(weight.base if isinstance(weight, PatchedMatrix) else weight)
        xp = arithmetic(x, base)
        x = spread(x, index)
        y = xp.routed(x, base, index)
        if isinstance(weight, PatchedMatrix):
            assert isinstance(weight.delta, ExpertLowRank)
            y = y + weight.delta.routed(x, index)
        if self.bias is not None:
            bias = self.bias.value(params)
            assert not isinstance(bias, PatchedMatrix)
            y = y + bias[index]
        return y

    def _matrices(self, base: Array) -> Array:
        """(experts, out, in), whatever the storage."""
        if self.stacked is not None:  # (experts · rows, columns), one block of rows an expert
            base = base.reshape(self.stacked, -1, base.shape[-1])
        return base.swapaxes(-1, -2) if self.layout == "in_out" else base

    def describe(self) -> str:
        return f"experts {self.weight}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def width(self) -> int | str | None:
        if len(self.weight.shape) != 3:
            return None
        return self.weight.shape[2 if self.layout == "out_in" else 1]

    def output_width(self, width: Size) -> Size:
        shape = self.weight.shape
        if self.stacked:
            return shape[0] // self.stacked if shape and isinstance(shape[0], int) else None
        return shape[-2 if self.layout == "out_in" else -1] if shape else None

    def updates(self) -> tuple[Update, ...]:
        return (expertwise(self, self.weight, self.layout == "in_out", self.count),)

    def count(self, params: Params) -> int:
        """How many experts there are."""
        weight = self.weight.value(params)
        assert not isinstance(weight, PatchedMatrix)
        return self.stacked or weight.shape[0]


@dataclass(frozen=True)
class Share(Component):
    """y_j = s_j x_j: the share of each chosen expert, where a model applies it to the expert's input.

    >>> import numpy as np
    >>> Share()({SHARES: np.array([0.5, 2.0])}, np.ones((2, 1)))
    array([[0.5],
           [2. ]])
    """

    per_expert = True

    def __call__(self, params: Params, x: Array) -> Array:
        shares: Array = params[SHARES]
        return x * shares[..., None]

    def describe(self) -> str:
        return "share of the expert"


@dataclass(frozen=True)
class Mixture(Combinator):
    """Σ_j s_j last_j(inner_j(x)) over the experts j that ``routing`` chooses from ``router(x)``.

    x: (..., d).  ``router`` gives logits (..., E); ``inner`` maps (..., 1, d) to (..., k, h) and
    ``last`` (..., k, h) to (..., k, d), both with the chosen experts' own weights.  With
    ``weighted=False`` the outputs are added as they are (Llama 4 applies the share before).

    >>> import numpy as np
    >>> from controllability.components.linear import Linear
    >>> mixture = Mixture(Linear(Param("R")), Routing(1), ExpertLinear(Param("U")), ExpertLinear(Param("V")))
    >>> one = np.ones((2, 1, 1))
    >>> mixture({"R": np.array([[0.0], [1.0]]), "U": one, "V": 3 * one}, np.ones(1)).round(3)
    array([2.193])
    """

    router: Component
    routing: Routing
    inner: Component
    last: Component
    weighted: bool = True
    has_module = False
    binds = (1, 2)

    def children(self) -> tuple[Component, ...]:
        return (self.router, self.inner, self.last)

    def own_parameters(self) -> tuple[Param, ...]:
        return self.routing.parameters()

    def map_held(self, change: Callable[[Any], Any]) -> "Mixture":
        return replace(self, routing=change(self.routing))

    @property
    def width(self) -> int | str | None:
        return self.router.width or self.inner.width

    def output_width(self, width: Size) -> Size:
        return self.last.output_width(self.child_width(2, width))

    def source_of(self, index: int) -> int | None:
        return 1 if index == 2 else None

    def child_input(self, index: int, x: Array, output: Callable[[int], Array]) -> Array:
        if index != 1:
            return super().child_input(index, x, output)
        return [a[..., None, :] for a in x] if isinstance(x, tuple | list) else x[..., None, :]

    @property
    def chosen(self) -> int:
        return self.routing.top_k

    @property
    def choice_words(self) -> str:
        return self.routing.describe()

    @property
    def joined_by(self) -> str:
        return "weighted sum" if self.weighted else "sum"

    def bindings(self, params: Params, output: Callable[[int], Array]) -> dict[str, Array]:
        chosen, shares = self.routing(params, output(0))
        return {CHOSEN: chosen, SHARES: shares}

    def choice_margin(self, params: Params, output: Callable[[int], Array]) -> Array:
        return self.routing.margin(params, output(0))

    def assemble(self, params: Params, output: Callable[[int], Array]) -> Array:
        if not self.weighted:
            return output(2).sum(-2)
        shares: Array = params[SHARES]
        return (output(2) * shares[..., None]).sum(-2)

    def describe(self) -> str:
        return f"mixture of experts ({self.routing.describe()}; {self.last.describe()})"
