"""A short causal convolution over time, channel by channel: the window of positions that it reads, and its taps."""

from dataclasses import dataclass
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.deltas import Shift
from controllability.interfaces import Component, Condition, OutputControllable, Param, Params, Size, Update


@dataclass(frozen=True)
class Window(Component):
    """The last ``count`` positions of every position, oldest first, with 0 before the first: (..., T, d) -> (..., T, count·d).

    A state without a position axis, (d,), is a first position.

    >>> import numpy as np
    >>> Window(2)({}, np.array([[1.0], [2.0]]))
    array([[0., 1.],
           [1., 2.]])
    """

    count: int
    bounds = {"count": "≥ 1"}
    mixes = True

    def __call__(self, params: Params, x: Array) -> Array:
        xp, nothing = arithmetic(x), x * 0
        if x.ndim == 1:
            return xp.concatenate([nothing] * (self.count - 1) + [x], -1)
        before = [
            xp.concatenate([nothing[..., :lag, :], x[..., : max(x.shape[-2] - lag, 0), :]], -2)
            for lag in range(self.count)
        ]
        return xp.concatenate([rows[..., : x.shape[-2], :] for rows in reversed(before)], -1)

    def describe(self) -> str:
        return f"the last {self.count} positions"

    def output_width(self, width: Size) -> Size:
        return width * self.count if isinstance(width, int) else f"{self.count}{width}" if width else None


@dataclass(frozen=True)
class Taps(Component, OutputControllable):
    """y = ``factor``·(Σ_k c_k ∘ z_k + ``skip`` z_K): a depthwise convolution on its window z_1, …, z_K, oldest first.

    ``weight`` is stored (d, 1, K), as in ``torch.nn.Conv1d``; z: (..., K·d), y: (..., d).  Its weight moves channel by channel
    (rule O-taps); whatever decides the window stays as it is.

    >>> import numpy as np
    >>> taps = Taps(Param("c", (1, 1, 2)), skip=1)
    >>> taps({"c": np.array([[[10.0, 1.0]]])}, np.array([3.0, 4.0]))
    array([38.])
    """

    weight: Param
    skip: int = 0
    factor: Any = 1
    bounds = {"factor": "≠ 0"}

    def __call__(self, params: Params, x: Array) -> Array:
        xp, z = arithmetic(x), self._rows(x)
        total = (xp.lift(self.weight.value(params))[..., 0, :].swapaxes(-1, -2) * z).sum(-2) + z[..., -1, :] * self.skip
        return total * xp.number(self.factor)

    def _rows(self, x: Array) -> Array:
        """(..., K·d) -> (..., K, d)."""
        assert isinstance(self.positions, int)
        return x.reshape(*x.shape[:-1], self.positions, -1)

    @property
    def positions(self) -> int:
        size = self.weight.shape[2]
        assert isinstance(size, int)
        return size

    def describe(self) -> str:
        return f"convolution {self.weight}"

    def own_parameters(self) -> tuple[Param, ...]:
        return (self.weight,)

    @property
    def module(self) -> str:
        """The module around the stored ``Conv1d``, which computes with its weight itself."""
        return self.weight.name.rpartition(".")[0].rpartition(".")[0]

    @property
    def width(self) -> Size:
        channels = self.weight.shape[0]
        return channels * self.positions if isinstance(channels, int) else f"{self.positions}{channels}"

    def output_width(self, width: Size) -> Size:
        return self.weight.shape[0]

    def output_updates(self) -> tuple[Update, ...]:
        """Δc_k = δ∘z_k/Σ_j z_j², the least change of the taps of each channel."""
        statement = f"no channel of {self.weight} reads only zeros where its output must change"
        hint = "the convolution cannot move a channel in which nothing comes in: add a bias before it"
        condition = Condition(statement, self.describe(), self._room, hint)
        return (Update("taps", self.weight, (condition,), self._solved, self._effect),)

    def _solved(self, params: Params, x: Array, delta: Array) -> Shift:
        xp, z = arithmetic(x, delta), self._rows(x)
        size = z[..., 0, :] * 0 + 1 if xp.exact else xp.or_one(xp.largest(z.swapaxes(-1, -2))[..., 0])
        unit = z / size[..., None, :]  # whose squares neither overflow nor vanish
        share = delta / xp.number(self.factor) / xp.or_one((unit * unit).sum(-2)) / size
        change = (share[..., None, :] * unit).swapaxes(-1, -2)
        return Shift(change.reshape(*change.shape[:-2], -1))

    def _effect(self, params: Params, x: Array, change: Shift) -> Array:
        z, flat = self._rows(x), change.value
        channels = flat.reshape(*flat.shape[:-1], z.shape[-1], -1).swapaxes(-1, -2)
        return (channels * z).sum(-2) * arithmetic(x).number(self.factor)

    def _room(self, x: Array, delta: Array) -> Array:
        """The smallest of the channels' largest entries, of those whose output must change."""
        xp, z = arithmetic(x, delta), self._rows(x)
        size = (z * z).sum(-2) if xp.exact else xp.largest(z.swapaxes(-1, -2))[..., 0]
        far = size * 0 + (1 if xp.exact else float("inf"))
        return xp.smallest(xp.where(xp.is_zero(delta), far, size))
