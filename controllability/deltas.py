"""What a patch adds to one parameter, kept in the smallest form: low rank or a vector."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from controllability.arrays import Array, arithmetic
from controllability.arrays.one_line import OneLine


class _Arrays(OneLine):
    """A dataclass whose arrays have the same leading axes: one row a token."""

    def mapped(self, change: Callable[[Array], Array]) -> Self:
        """The same with ``change(array)`` in place of each of its arrays."""
        arrays = {name: change(value) for name, value in vars(self).items() if hasattr(value, "shape")}
        return replace(self, **arrays)  # type: ignore[type-var]

    def row(self, index: object) -> Self:
        """The delta of one token (or of a slice of tokens)."""
        return self.mapped(lambda array: array[index])


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(_Arrays):
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
            if xp.symbolic and self.right.shape[0] != 1:  # short names, before they meet anything large
                return xp.matmul(xp.name(xp.matmul(xp.name(x), self.right.swapaxes(-1, -2))), self.left)
            return xp.matmul(xp.matmul(x, self.right.swapaxes(-1, -2)), self.left)
        if self.right.shape[-2] == 1:
            return xp.sum(self.right[..., 0, :] * x) * self.left[..., 0, :]
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
        """How many numbers the same change would be as dense matrices, of the active experts where there are some."""
        return math.prod(self.left.shape[:-2]) * self.left.shape[-1] * self.right.shape[-1]

    def norms(self) -> Array:
        """Frobenius norm of each ΔW, from the factors: shape (...)."""
        xp = arithmetic(self.left, self.right)
        gram = xp.matmul(self.left, self.left.swapaxes(-1, -2)) * xp.matmul(self.right, self.right.swapaxes(-1, -2))
        return xp.sqrt(xp.magnitude(gram.sum(-1).sum(-1)))

    def products(self, other: Any) -> Array:
        """⟨ΔW_a, ΔW_b⟩ of each of these with each of ``other``, from the factors: (..., N), (..., M) -> (..., N, M)."""
        return _products((self.left, self.right), (other.left, other.right))


def _products(one: tuple[Array, Array], other: tuple[Array, Array], same: Array = True) -> Array:
    """From factors (..., N, rank, ·) and (..., M, rank, ·); only terms that are ``same`` (..., N·rank, M·rank) count."""

    def gram(x: Array, y: Array) -> Array:
        flat = [f.reshape(*f.shape[:-3], f.shape[-3] * f.shape[-2], f.shape[-1]) for f in (x, y)]
        return flat[0] @ flat[1].swapaxes(-1, -2)

    terms = gram(one[0], other[0]) * gram(one[1], other[1]) * same
    shape = (*terms.shape[:-2], *one[0].shape[-3:-1], *other[0].shape[-3:-1])
    return terms.reshape(shape).sum(-1).sum(-2)


@dataclass(frozen=True, eq=False, repr=False)
class ExpertLowRank(LowRank):
    """A low-rank change of stacked experts (experts, out, in): expert ``index[j]`` gets ``left_j right_jᵀ``.

    ``index`` (..., k) names the active experts, ``left`` is (..., k, rank, out) and ``right``
    (..., k, rank, in).  Experts that are not named stay as they are.
    """

    index: Array = None
    experts: int = 0

    def routed(self, x: Array, index: Array) -> Array:
        """``ΔW[index] x`` for any routing: (..., j, in), (..., j) -> (..., j, out)."""
        xp = arithmetic(self.right, x)
        if self.right.ndim == 3 and x.ndim > 2:
            return self._for_all(x, index)
        if index.shape == self.index.shape and bool((index == self.index).all()):  # its own routing: slot by slot
            return (xp.sum(self.right * x[..., None, :]) * self.left).sum(-2)
        same = index[..., :, None] == self.index[..., None, :]  # (..., j, k)
        inner = xp.sum(self.right[..., None, :, :, :] * x[..., :, None, None, :])  # (..., j, k, rank, 1)
        effect = (inner * self.left[..., None, :, :, :]).sum(-2)  # (..., j, k, out)
        return xp.where(same[..., None], effect, xp.zeros_like(effect)).sum(-2)

    def _for_all(self, x: Array, index: Array) -> Array:
        """One patch for all tokens: two products over all its experts, those that a slot does not choose masked between."""
        xp = arithmetic(self.right, x)
        experts, rank, width = self.right.shape
        inner = xp.name(xp.matmul(x, self.right.reshape(experts * rank, width).swapaxes(-1, -2)))
        inner = inner.reshape(*x.shape[:-1], experts, rank)
        same = (index[..., None] == self.index)[..., None]
        inner = xp.where(same, inner, xp.zeros_like(inner))  # x may be one row for all slots
        return xp.matmul(inner.reshape(*inner.shape[:-2], experts * rank), self.left.reshape(experts * rank, -1))

    def dense(self) -> Array:
        """ΔW as stored: (..., experts, out, in), or (..., experts, in, out) when transposed."""
        matrices = LowRank(self.left, self.right, self.transposed).dense()  # (..., k, ·, ·)
        return arithmetic(matrices).planes(matrices, self.index, self.experts)

    def norms(self) -> Array:
        """Frobenius norm over all experts: shape (...)."""
        each = LowRank(self.left, self.right).norms()
        return arithmetic(each).sqrt((each * each).sum(-1))

    def products(self, other: Any) -> Array:
        (*one, expert), (*others, of_other) = self._slots(), other._slots()
        return _products((one[0], one[1]), (others[0], others[1]), expert[..., :, None] == of_other[..., None, :])

    def _slots(self) -> tuple[Array, Array, Array]:
        """(left, right) (..., N, k·rank, ·), and the expert of each of the N·k·rank terms."""
        *lead, count, k, rank, _ = self.left.shape
        left, right = (f.reshape(*lead, count, k * rank, f.shape[-1]) for f in (self.left, self.right))
        expert = arithmetic(left).concatenate([self.index[..., None]] * rank, -1)  # (..., N, k, rank)
        return left, right, expert.reshape(*lead, count * k * rank)


@dataclass(frozen=True, eq=False, repr=False)
class Shift(_Arrays):
    """A vector added to a scale or a bias: (..., n); leading axes run over tokens."""

    value: Array

    def dense(self) -> Array:
        """The vector itself."""
        return self.value

    def shaped(self, base: Array) -> Array:
        """The vector as ``base`` is stored: the taps of a convolution (d, 1, K) are d·K numbers."""
        if base.ndim < 3 or self.value.shape[-1] != math.prod(base.shape):
            return self.value
        return self.value.reshape(*self.value.shape[:-1], base.shape[0], -1)[..., None, :]

    @property
    def numbers(self) -> int:
        """How many numbers this delta holds."""
        return math.prod(self.value.shape)

    @property
    def dense_numbers(self) -> int:
        """As many as it holds: a vector is as dense as it gets."""
        return self.numbers

    def norms(self) -> Array:
        """Euclidean norm of each vector: shape (...)."""
        xp = arithmetic(self.value)
        return xp.sqrt((self.value * self.value).sum(-1))

    def products(self, other: Any) -> Array:
        """The inner product of each of these vectors with each of ``other``: (..., N), (..., M) -> (..., N, M)."""
        return self.value @ other.value.swapaxes(-1, -2)


Delta = LowRank | Shift


@dataclass(frozen=True, eq=False, repr=False)
class PatchedMatrix(OneLine):
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
    return base + delta.shaped(base)
