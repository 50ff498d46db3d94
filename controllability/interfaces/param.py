"""Named parameters, whole or sliced."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controllability.arrays import Array
from controllability.deltas import PatchedMatrix
from controllability.errors import BadInput
from controllability.interfaces.arguments import refuse_misfits

Params = Mapping[str, Array | PatchedMatrix]


@dataclass(frozen=True)
class Param:
    """A named parameter, or a slice of one (fused tensors); ``shape`` may name its sizes.

    >>> str(Param("mlp.gate_up.weight", index=(slice(0, 4),)))
    'mlp.gate_up.weight[0:4]'
    """

    name: str
    shape: tuple[int | str, ...] = field(default=(), compare=False)
    index: tuple[slice, ...] = ()

    def __post_init__(self) -> None:
        refuse_misfits(self, {})
        whole = [s for s in self.shape if not isinstance(s, str)]
        if not self.name or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in whole):
            raise BadInput(
                f"Param: give a name, and sizes that are names or whole numbers from 1 on; got {self.name!r}, {self.shape}"
            )

    def __str__(self) -> str:
        if not self.index:
            return self.name
        parts = ",".join(":".join("" if e is None else str(e) for e in _ends(s)) for s in self.index)
        return f"{self.name}[{parts}]"

    def __hash__(self) -> int:
        return hash(str(self))

    def value(self, params: Params) -> Any:
        """The array of this parameter, or the patched matrix.  Raises ``BadInput`` when it is missing."""
        key = str(self)
        if key in params:
            return params[key]
        if self.name not in params:
            raise BadInput(f"parameter {key} is missing; given are: {', '.join(sorted(params)) or 'none'}")
        whole = params[self.name]
        assert not isinstance(whole, PatchedMatrix)
        return whole[self.index] if self.index else whole

    def overlaps(self, other: "Param") -> bool:
        """Whether the two name a common entry of one tensor."""
        if self.name != other.name:
            return False
        return all(_slices_meet(a, b) for a, b in zip(self.index, other.index, strict=False))


def _ends(s: slice) -> list[int | None]:
    return [s.start, s.stop] if s.step is None else [s.start, s.stop, s.step]


def _slices_meet(a: slice, b: slice) -> bool:
    ends = (a.start, a.stop, b.start, b.stop)
    if None in ends or min(ends) < 0:  # how long the axis is would have to be known
        return True
    return max(a.start, b.start) < min(a.stop, b.stop)


def overlap(a: frozenset[Param], b: frozenset[Param]) -> tuple[Param, ...]:
    """The parameters of ``a`` that share an entry with one of ``b``."""
    return tuple(sorted((p for p in a if any(p.overlaps(q) for q in b)), key=str))
