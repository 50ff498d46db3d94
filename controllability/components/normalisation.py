"""Parameter-free normalisation.  RMSNorm and LayerNorm are compositions with Scale and Bias."""

from dataclasses import dataclass, field
from typing import Any, Literal

from controllability.arrays import Array, arithmetic
from controllability.components.bias import Bias
from controllability.components.scale import Scale
from controllability.interfaces import Component, Param, Params, Sequence


@dataclass(frozen=True)
class Normalize(Component):
    """n(x) = x/√(mean(x²) + ε) ("rms"), or the same of x − mean(x) ("layer").  x: (..., d).

    For ε > 0 the "rms" kind is a bijection onto the open ball mean(u²) < 1; how that is used to
    steer what comes before it is the rule O-normalised.

    >>> import numpy as np
    >>> Normalize("rms", 0.0)({}, np.array([3.0, 4.0])) ** 2
    array([0.72, 1.28])
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: Any = 1e-6
    computed_by: str = field(default="", compare=False)
    bounds = {"eps": "≥ 0"}

    def __call__(self, params: Params, x: Array) -> Array:
        xp = arithmetic(x)
        given, x = x, xp.lift(x)  # half precision cannot hold the squares
        half = x is not given
        if self.kind == "layer":
            x = x - xp.mean(x)
        n = x / xp.sqrt(xp.mean(x * x) + xp.number(self.eps))
        return xp.array(n, like=given) if half else n

    def describe(self) -> str:
        return f"normalise ({self.kind})" + (f" {self.computed_by}" if self.computed_by else "")

    @property
    def normalises(self) -> str:
        return self.kind

    @property
    def norm_epsilon(self) -> Any:
        return self.eps

    @property
    def module(self) -> str:
        return self.computed_by


def rms_norm(name: str, width: int | str = "d", eps: Any = 1e-6, offset: int = 0) -> Sequence:
    """RMSNorm: normalise, then scale by ``offset + {name}.weight``."""
    return Normalize("rms", eps, name) >> Scale(Param(f"{name}.weight", (width,)), offset)


def layer_norm(name: str, width: int | str = "d", eps: Any = 1e-5, offset: int = 0, bias: bool = True) -> Sequence:
    """LayerNorm: centre and normalise, scale, and add ``{name}.bias`` if there is one."""
    norm = Normalize("layer", eps, name) >> Scale(Param(f"{name}.weight", (width,)), offset)
    return norm >> Bias(Param(f"{name}.bias", (width,))) if bias else norm
