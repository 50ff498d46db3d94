"""A patch: parameter names and what is added to each."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from controllability.arrays import Array
from controllability.arrays.one_line import OneLine
from controllability.deltas import Delta, ExpertLowRank, PatchedMatrix, added
from controllability.execution.journal import Journal
from controllability.interfaces import Param, Params
from controllability.symbolic.definitions import Definitions


def _as_stored(delta: Delta, base: Array) -> Array:
    """A delta in the shape of the stored parameter, token axes before it."""
    change = delta.dense()
    tokens = change.shape[: -3 if isinstance(delta, ExpertLowRank) else -base.ndim]
    if math.prod(change.shape) == math.prod(base.shape):  # one token; inside a mixture it is a row of its own
        tokens = ()
    return change.reshape(*tokens, *base.shape)  # experts may be stacked in two dimensions


@dataclass(frozen=True, eq=False, repr=False)
class Patch(OneLine, Mapping[str, Delta]):
    """Parameter name -> delta, for one block.

    With SymPy numbers the deltas are closed forms over named intermediate values (t1, t2, …);
    ``definitions.meaning`` says what the names stand for and ``definitions.expand`` puts it in.  ``residual`` is by how much the
    block missed its target, token by token, max |difference| / max |target|, when it was constructed; None: not measured.

    >>> import numpy as np
    >>> from controllability.deltas import Shift
    >>> patch = Patch({Param("b"): Shift(np.ones(2))})
    >>> patch.applied_to({"b": np.zeros(2), "W": np.eye(2)})["b"]
    array([1., 1.])
    """

    deltas: Mapping[Param, Delta]
    journal: Journal = field(default_factory=Journal)
    definitions: Definitions | None = None
    residual: float | None = None

    def __getitem__(self, name: str) -> Delta:
        return self._by_name()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def __len__(self) -> int:
        return len(self.deltas)

    def _by_name(self) -> dict[str, Delta]:
        return {str(param): delta for param, delta in self.deltas.items()}

    def applied_to(self, params: Params) -> dict[str, Array | PatchedMatrix]:
        """``params`` with the patch on them, matrices still factored: for calling a block."""
        patched = dict(params)
        for param, delta in self.deltas.items():
            base = param.value(params)
            assert not isinstance(base, PatchedMatrix)
            patched[str(param)] = added(base, delta)
        return patched

    def merged_into(self, params: Params) -> dict[str, Array]:
        """``params`` with the patch added densely; for a patch of one token (no token axes)."""
        merged = dict(params)
        for param, delta in self.deltas.items():
            base = param.value(params)
            assert not isinstance(base, PatchedMatrix)
            merged[str(param)] = base + _as_stored(delta, base)
        return merged

    @property
    def numbers(self) -> int:
        """How many numbers the patch holds."""
        return sum(delta.numbers for delta in self.deltas.values())

    @property
    def dense_numbers(self) -> int:
        """How many numbers the same changes would be as dense arrays."""
        return sum(delta.dense_numbers for delta in self.deltas.values())
