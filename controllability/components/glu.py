"""Gated products of one fused matrix, and activations with learned or clamped shapes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from controllability.arrays import Array, arithmetic
from controllability.interfaces import Component, Param, Params, Size


@dataclass(frozen=True)
class Glu(Component):
    """y = φ(g) ∘ u, where the input (..., 2h) holds g and u as two halves, or interleaved.

    ``order`` is gate_up, up_gate or interleaved.  ``limit`` clamps g from above and u on both sides
    before, ``shift`` is added to u: with activation "swish" and ``alpha`` this is the clamped SwiGLU of
    gpt-oss.  ``limit`` without ``shift`` serves DeepSeek's.

    >>> import numpy as np
    >>> from controllability.components import Activation
    >>> Glu(Activation("relu"), "interleaved")({}, np.array([2.0, 5.0, -1.0, 7.0])) + 0
    array([10.,  0.])
    """

    activation: Component
    order: Literal["gate_up", "up_gate", "interleaved"] = "gate_up"
    limit: Any = None
    shift: Any = 0
    bounds = {"limit": "> 0", "shift": "finite"}
    has_module = False

    def __call__(self, params: Params, x: Array) -> Array:
        half = x.shape[-1] // 2
        if self.order == "interleaved":
            gate, up = x[..., 0::2], x[..., 1::2]
        else:
            gate, up = x[..., :half], x[..., half:]
        if self.order == "up_gate":
            gate, up = up, gate
        return self.gate(params, gate, up)

    def gate(self, params: Params, gate: Array, up: Array) -> Array:
        """The gated product of two separate inputs, both (..., h)."""
        xp = arithmetic(gate, up)
        if self.limit is not None:
            gate = xp.minimum(gate, self.limit)
            up = xp.maximum(xp.minimum(up, self.limit), -self.limit)
        if self.shift:
            up = up + xp.number(self.shift)
        return self.activation(params, gate) * up

    def own_parameters(self) -> tuple[Param, ...]:
        return tuple(sorted(self.activation.parameters(), key=str))

    def map_held(self, change: Callable[[Any], Any]) -> "Glu":
        return replace(self, activation=change(self.activation))

    def output_width(self, width: Size) -> Size:
        return width // 2 if isinstance(width, int) else width.removeprefix("2") if width else None

    def describe(self) -> str:
        clamp = f", clamped at {self.limit}" if self.limit is not None else ""
        return f"gated halves ({self.order}, {self.activation.describe()}{clamp})"


@dataclass(frozen=True)
class Swish(Component):
    """y = x·σ(αx), elementwise: SiLU with another slope.

    >>> import numpy as np
    >>> from controllability.components import Activation
    >>> bool(np.allclose(Swish(1.0)({}, np.ones(1)), Activation("silu")({}, np.ones(1))))
    True
    """

    alpha: Any = 1.0
    bounds = {"alpha": "finite"}

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        return x * xp.sigmoid(x * xp.number(self.alpha))

    def describe(self) -> str:
        return f"activation x·σ({self.alpha} x)"


@dataclass(frozen=True)
class XIELU(Component):
    """xIELU of Apertus: α_p x² + βx for x > 0, else α_n (e^min(x,ε) − 1 − x) + βx, with learned α.

    Stored are softplus⁻¹(α_p), softplus⁻¹(α_n − β), β and ε, one number each; they stay as they are.

    >>> import numpy as np
    >>> names = [Param(n) for n in ("p", "n", "beta", "eps")]
    >>> values = {"p": np.zeros(1), "n": np.zeros(1), "beta": np.array([0.5]), "eps": np.array([-1e-6])}
    >>> float(XIELU(*names)(values, np.array([2.0]))[0].round(6))  # 4 ln 2 + 1
    3.772589
    """

    alpha_p: Param
    alpha_n: Param
    beta: Param
    eps: Param
    has_module = False

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        p, n, beta, eps = (xp.lift(q.value(params)).reshape(-1)[:1] for q in self.own_parameters())
        positive = xp.log(1 + xp.exp(p)) * x * x + beta * x
        low = xp.where(x < eps, x, xp.zeros_like(x) + eps)
        negative = (xp.exp(low) - 1 - x) * (beta + xp.log(1 + xp.exp(n))) + beta * x
        return xp.where(x > 0, positive, negative)

    def describe(self) -> str:
        return f"activation xIELU {self.alpha_p.name.rpartition('.')[0]}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.alpha_p, self.alpha_n, self.beta, self.eps)
