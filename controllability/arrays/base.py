"""What an arithmetic provides, and NumPy floats, which provide it plainly."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from controllability.arrays.lazy import np, special
from controllability.errors import NotExact

Array = Any  # numpy.ndarray (float or object) or torch.Tensor


def _of_entries(name: str) -> "Callable[[Arithmetic, Array], Array]":
    """The method that is ``function`` of that name."""
    return lambda self, x: self.function(name, x)


class Arithmetic:
    """NumPy floats; the other arithmetics override what differs."""

    kind = "numpy"
    exact = False
    symbolic = False  # no order, no numbers

    def machine_epsilon(self, x: Array) -> float:
        """Relative spacing of the numbers in ``x``; 0 in exact arithmetics."""
        return float(np.finfo(x.dtype).eps)

    def own_modes(self, x: Array) -> AbstractContextManager[None]:
        """A context in which computing with ``x`` does not depend on the library's modes that a caller set."""
        return nullcontext()

    def number(self, value: Any) -> Any:
        """A Python, SymPy or rational constant as a scalar of this arithmetic."""
        return float(value)

    def array(self, values: Any, like: Array | None = None) -> Array:
        """``values`` as an array of this arithmetic, on the device of ``like``."""
        return np.asarray(values, dtype=np.float64)

    def numbers(self, x: Array) -> np.ndarray:
        """``x`` as a NumPy array, floats as float64: for kernels that are written once, in NumPy."""
        return np.asarray(x) if x.dtype == object else np.asarray(x, dtype=np.float64)

    def lift(self, x: Array) -> Array:
        """``x`` in the precision in which patches are solved (half precisions become float32)."""
        return x

    def as_stored(self, x: Array, like: Array, side: int = 0) -> Array:
        """``x`` as the dtype of ``like`` holds it: the nearest value, or the largest below (side −1), the smallest above (1)."""
        return x

    def function(self, name: str, x: Array) -> Array:
        """One of sqrt, exp, log, tanh, atanh, erf of every entry: all that an arithmetic has to say of them."""
        if name == "erf":
            return special.erf(x)
        return getattr(np, "arctanh" if name == "atanh" else name)(x)

    sqrt, exp, log = (_of_entries(name) for name in ("sqrt", "exp", "log"))
    tanh, arctanh, erf = (_of_entries(name) for name in ("tanh", "atanh", "erf"))

    def sigmoid(self, x: Array) -> Array:
        return special.expit(x)

    def where(self, condition: Array, a: Array, b: Array) -> Array:
        return np.where(condition, a, b)

    def sum(self, x: Array) -> Array:
        """Sum over the features, keeping the axis."""
        return x.sum(axis=-1, keepdims=True)

    def max(self, x: Array) -> Array:
        """Largest feature, keeping the axis."""
        return x.max(axis=-1, keepdims=True)

    def min(self, x: Array) -> Array:
        """Smallest feature, keeping the axis."""
        return x.min(axis=-1, keepdims=True)

    def minimum(self, x: Array, bound: Any) -> Array:
        """The smaller of each entry and a constant."""
        return np.minimum(x, self.number(bound))

    def maximum(self, x: Array, bound: Any) -> Array:
        """The larger of each entry and a constant."""
        return -self.minimum(-x, -bound)

    def top(self, x: Array, k: int) -> Array:
        """Where the k largest features stand, in ascending order of place: (..., n) -> (..., k) integers."""
        return np.sort(np.argsort(-x, axis=-1, kind="stable")[..., :k], axis=-1)

    def take(self, x: Array, index: Array) -> Array:
        """The features at ``index``: (..., n), (..., k) -> (..., k)."""
        return np.take_along_axis(x, index, axis=-1)

    def only(self, x: Array, index: Array, other: Any) -> Array:
        """``x`` (..., n) with every feature that is not in ``index`` (..., k) replaced by a constant."""
        kept = np.zeros(x.shape, dtype=bool)
        np.put_along_axis(kept, index, True, axis=-1)
        return self.where(kept, x, self.zeros_like(x) + other)

    def routed(self, x: Array, weights: Array, index: Array) -> Array:
        """``W[index] x``: (..., k, in), (E, out, in), (..., k) -> (..., k, out)."""
        return (x[..., None, :] * weights[index]).sum(-1)

    def planes(self, x: Array, index: Array, count: int) -> Array:
        """Each matrix added to the plane that ``index`` names, 0 where none is: (..., k, m, n), (..., k) -> (..., count, m, n)."""
        planes = []
        for plane in range(count):
            named = (index == plane)[..., None, None]
            planes.append(self.where(named, x, self.zeros_like(x)).sum(-3)[..., None, :, :])
        return self.concatenate(planes, -3)

    def repeated(self, x: Array, k: int) -> Array:
        """One row k times: (..., 1, n) -> (..., k, n)."""
        return x[..., [0] * k, :]

    def largest(self, x: Array) -> Array:
        """Largest |feature|, keeping the axis."""
        return self.max(self.magnitude(x))

    def smallest(self, x: Array) -> Array:
        """Smallest |feature|, keeping the axis; in symbols the product, which is 0 exactly when one is."""
        return self.min(self.magnitude(x))

    def mean(self, x: Array) -> Array:
        """Mean over the features, keeping the axis."""
        return self.sum(x) / x.shape[-1]

    def is_zero(self, x: Array) -> Array:
        """Boolean array: which entries are (known to be) zero."""
        return x == 0

    def is_finite(self, x: Array) -> bool:
        """Whether no entry is NaN or infinite."""
        return self.exact or bool(self.is_zero(x * 0).all())

    def or_one(self, x: Array) -> Array:
        """``x``, and 1 where it is zero: a divisor that can be divided by."""
        return self.where(self.is_zero(x), x + 1, x)

    def any(self, x: Array) -> bool:
        return bool(x.any())

    def all(self, x: Array) -> bool:
        return bool(x.all())

    def zeros_like(self, x: Array) -> Array:
        return np.zeros_like(x)

    def linear(self, x: Array, weight: Array) -> Array:
        """``x Wᵀ`` for ``x`` of shape (..., in) and ``weight`` of shape (out, in)."""
        return x @ weight.swapaxes(-1, -2)

    def matmul(self, a: Array, b: Array) -> Array:
        """``a @ b``, whatever the precisions of the two."""
        return a @ b

    def identity(self, n: int, like: Array) -> Array:
        """The identity matrix, (n, n)."""
        return np.eye(n, dtype=like.dtype)

    def solve(self, matrix: Array, right: Array) -> Array:
        """x with ``matrix`` x = ``right``: (..., n, n), (..., n, k) -> (..., n, k)."""
        return np.linalg.solve(matrix, right)

    def activation(self, name: str, x: Array) -> Array | None:
        """A fused kernel for a named activation, or None where the formula is to be used."""
        return None

    def tidy(self, x: Array) -> Array:
        """The value in a normal form, where the arithmetic has one."""
        return x

    def name(self, x: Array) -> Array:
        """The value, from here on treated as given: symbols get a name for it."""
        return x

    def root(self, name: str, function: Any, value: Array) -> Array:
        """The unknown number x, called ``name``, with function(x) = value: in index notation only."""
        raise NotExact(f"the root {name} has no closed form")

    def concatenate(self, parts: list[Array], axis: int) -> Array:
        return np.concatenate(parts, axis=axis)

    def to_float(self, x: Array) -> Any:
        """Python float of a one-element array; None when it is not a number."""
        return float(np.asarray(x).reshape(()))

    def magnitude(self, x: Array) -> Array:
        return abs(x)
