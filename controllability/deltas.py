"""What a patch adds to one parameter, kept in the smallest form: low rank or a vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from controllability.arrays import Array, arithmetic


@dataclass(frozen=True, eq=False)
class LowRank:
    """``ΔW = Σ_k left_k right_kᵀ`` for a matrix that maps ``in`` to ``out``.

    ``left`` has shape (..., rank, out) and ``right`` (..., rank, in); leading axes run over
    tokens, each with its own patch.  ``transposed`` says that the parameter is stored (in, out).
    """

    left: Array
    right: Array
    transposed: bool = False

    def effect(self, x: Array) -> Array:
        """``ΔW x`` without building ΔW: (..., in) -> (..., out)."""
        xp = arithmetic(self.right, x)
        if self.right.ndim == 2:
            return xp.matmul(xp.matmul(x, self.right.swapaxes(-1, -2)), self.left)
        return (xp.sum(self.right * x[..., None, :]) * self.left).sum(-2)

    def dense(self) -> Array:
        """ΔW as stored: (..., out, in), or (..., in, out) when transposed."""
        matrix = self.left.swapaxes(-1, -2) @ self.right
        return matrix.swapaxes(-1, -2) if self.transposed else matrix

    @property
    def numbers(self) -> int:
        """How many numbers this delta holds."""
        return math.prod(self.left.shape) + math.prod(self.right.shape)

    @property
    def dense_numbers(self) -> int:
        """How many numbers the same change would be as dense matrices."""
        return math.prod(self.left.shape[:-2]) * self.left.shape[-1] * self.right.shape[-1]

    def norms(self) -> Array:
        """Frobenius norm of each ΔW, from the factors: shape (...)."""
        xp = arithmetic(self.left, self.right)
        gram = (self.left @ self.left.swapaxes(-1, -2)) * (self.right @ self.right.swapaxes(-1, -2))
        return xp.sqrt(xp.magnitude(gram.sum(-1).sum(-1)))

    def row(self, index: object) -> LowRank:
        """The delta of one token (or of a slice of tokens)."""
        return LowRank(self.left[index], self.right[index], self.transposed)


@dataclass(frozen=True, eq=False)
class Shift:
    """A vector added to a scale or a bias: (..., n); leading axes run over tokens."""

    value: Array

    def dense(self) -> Array:
        """The vector itself."""
        return self.value

    @property
    def numbers(self) -> int:
        """How many numbers this delta holds."""
        return math.prod(self.value.shape)

    @property
    def dense_numbers(self) -> int:
        """The same: a vector is as dense as it gets."""
        return self.numbers

    def norms(self) -> Array:
        """Euclidean norm of each vector: shape (...)."""
        xp = arithmetic(self.value)
        return xp.sqrt((self.value * self.value).sum(-1))

    def row(self, index: object) -> Shift:
        """The delta of one token (or of a slice of tokens)."""
        return Shift(self.value[index])


Delta = LowRank | Shift


@dataclass(frozen=True, eq=False)
class PatchedMatrix:
    """A stored matrix and what is added to it, not yet added: what a linear map computes with."""

    base: Array
    delta: LowRank

    def dense(self) -> Array:
        """W + ΔW as one array."""
        return self.base + self.delta.dense()


def added(base: Array, delta: Delta) -> Array | PatchedMatrix:
    """``base`` with ``delta`` on it: factored for a matrix, a plain array for a vector."""
    if isinstance(delta, LowRank):
        return PatchedMatrix(base, delta)
    return base + delta.value
