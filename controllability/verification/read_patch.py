"""Reads a patch that was made elsewhere: names, shapes and kinds of numbers, all that does not fit in one error."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from controllability.arrays import Array, arithmetic
from controllability.deltas import Delta, ExpertLowRank, LowRank, PatchedMatrix, Shift
from controllability.errors import BadInput
from controllability.interfaces import Component, Param, Params, Path, leaves, node, updates_of


@dataclass(frozen=True)
class GivenPatch:
    """A patch as it was read: deltas that can be added, those of the transposed shape (turned), its precision."""

    deltas: dict[Param, Delta]
    turned: dict[Param, Delta]
    epsilon: float


def read_patch(block: Component, params: Params, patch: Mapping[str, Any], tokens: tuple[int, ...]) -> GivenPatch:
    """The deltas of a patch made elsewhere, for states with ``tokens`` leading axes.

    Raises one ``BadInput`` with every name and shape that does not fit.
    """
    if not isinstance(patch, Mapping):
        raise BadInput(f"a patch maps parameter names to arrays or deltas, got {type(patch).__name__}")
    own = {str(p): p for p in block.parameters()}
    given, problems, epsilon = GivenPatch({}, {}, 0.0), list[str](), 0.0
    for name, change in patch.items():
        try:
            if name not in own:
                raise BadInput(_unknown(str(name), own))
            base = own[name].value(params)
            reader = _Reader(block, own[name], base.base if isinstance(base, PatchedMatrix) else base, tokens)
            delta, turned = reader.read(change)
            epsilon = max(epsilon, _coarseness(change))
        except BadInput as problem:
            problems.append(str(problem))
            continue
        (given.turned if turned else given.deltas)[own[name]] = delta
    if problems:
        raise BadInput("the patch does not fit the block: " + "; ".join(problems))
    return GivenPatch(given.deltas, given.turned, epsilon)


def _unknown(name: str, own: Mapping[str, Param]) -> str:
    slices = sorted(str(p) for p in own.values() if p.index and p.name == name)
    if slices:
        return f"{name} is read in slices: give a change for each of {', '.join(slices)}"
    whole = name.partition("[")[0]
    if whole != name and whole in own:
        return f"{name} is a slice: the block reads {whole} as a whole, give a change of its full shape"
    return f"{name} is no parameter of the block; it has {', '.join(sorted(own))}"


def _coarseness(change: Any) -> float:
    """Machine epsilon of what was given, before it is converted."""
    parts = (change.left, change.right) if isinstance(change, LowRank) else (getattr(change, "value", change),)
    return max((arithmetic(p).machine_epsilon(p) for p in parts if _kind(p) in "ft"), default=0.0)


def _kind(x: Any) -> str:
    """'f' NumPy floats, 'o' objects, 't' a floating tensor, '' anything else."""
    if isinstance(x, np.ndarray):
        return {"f": "f", "O": "o"}.get(x.dtype.kind, "")
    return "t" if getattr(getattr(x, "dtype", None), "is_floating_point", False) else ""


def _converted(x: Any, like: Array) -> Array:
    """``x`` as the kind of array that ``like`` is, in its own precision."""
    xp = arithmetic(like)
    if xp.kind == "torch":
        x = x.astype(np.float64) if _kind(x) == "o" else x
        return xp.torch.as_tensor(x, device=like.device)  # type: ignore[attr-defined]
    if xp.kind == "numpy":
        return x.astype(np.float64) if _kind(x) == "o" else x
    return xp.array(x)


@dataclass(frozen=True)
class _Reader:
    """Reads what is added to one parameter."""

    block: Component
    param: Param
    base: Any
    tokens: tuple[int, ...]

    def read(self, change: Any) -> tuple[Delta, bool]:
        """The delta, and whether it was given in the transposed shape."""
        if isinstance(change, LowRank):
            return self._low_rank(change)
        flat = isinstance(change, Shift) and change.value.shape[-1:] == (math.prod(self.shape),)
        return self._dense(change.shaped(self.base) if flat else change.value if isinstance(change, Shift) else change)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def _fits(self, x: Any) -> Array:
        """``x`` as an array of the parameters' kind.  Raises ``BadInput`` for what cannot be added."""
        if not _kind(x):
            what = f"an array of {x.dtype}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
            raise BadInput(f"{self.param} gets {what}: give floating point numbers or objects")
        xp = arithmetic(self.base)
        if _kind(x) == "t":
            x = x.detach() if xp.kind == "torch" else x.detach().cpu().double().numpy()
        elif _kind(x) == "f" and not np.isfinite(x).all():
            raise BadInput(f"the change of {self.param} holds NaN or infinity")
        try:
            x = _converted(x, self.base)
        except (TypeError, ValueError) as why:
            raise BadInput(f"the change of {self.param} cannot be converted to {xp.kind} numbers: {why}") from why
        here = arithmetic(x)
        if not (here.exact or here.all(here.is_zero(x * 0))):
            raise BadInput(f"the change of {self.param} holds NaN or infinity")
        return here.lift(x)

    def _place(self) -> tuple[Path, Component] | None:
        """The first leaf that is steered by this parameter."""
        for path, leaf in leaves(self.block):
            if any(way.param == self.param for way in updates_of(leaf, "input", "output")):
                return path, leaf
        return None

    def _dense(self, x: Any) -> tuple[Delta, bool]:
        x = self._fits(x)
        own, found = self.shape, tuple(x.shape)
        lead, last = found[: len(found) - len(own)], found[len(found) - len(own) :]
        turned = len(own) > 1 and last == (*own[:-2], own[-1], own[-2]) != own
        place = self._place()
        rows = (1,) * self._inside(place[0]) if place else ()
        allowed = lead in ((), self.tokens, (*self.tokens, *rows))
        if len(found) < len(own) or not allowed or not (turned or last == own):
            many = f", or {(*self.tokens, *own)} with a change for every token" if self.tokens else ""
            raise BadInput(f"the change of {self.param} has shape {found}: expected {own}{many}")
        if lead and place is None:
            raise BadInput(f"{self.param} is read whole: it can be changed for all tokens only, not {found}")
        if place is not None and place[1].positions:  # taps of a convolution
            return Shift(x.reshape(*lead, -1)), turned
        if place is None or len(own) < 2:
            return Shift(x if place is None else self._spread(x, lead, rows, len(own))), turned
        in_out, stacked = _storage(place[1])
        if turned:
            x = x.swapaxes(-1, -2)
        if place[1].per_expert:
            return self._experts(x, lead, in_out, stacked), turned
        matrix = x.swapaxes(-1, -2) if in_out else x
        return LowRank(*_factors(self._spread(matrix, lead, rows, 2)), in_out), turned

    def _inside(self, path: Path) -> int:
        """How many mixtures a leaf stands in: a token has rows of its own there."""
        return sum(path[i] in node(self.block, path[:i]).binds for i in range(len(path)))

    def _spread(self, x: Array, lead: tuple[int, ...], rows: tuple[int, ...], axes: int) -> Array:
        """``x`` with axes for the rows between the tokens' and the parameter's."""
        return x.reshape(*self.tokens, *rows, *x.shape[x.ndim - axes :]) if lead and lead == self.tokens else x

    def _experts(self, x: Array, lead: tuple[int, ...], in_out: bool, stacked: int | None) -> Delta:
        """A change of all experts, one low-rank term for each of them."""
        if stacked is not None:
            x = x.reshape(*lead, stacked, -1, x.shape[-1])
        matrices = x.swapaxes(-1, -2) if in_out else x
        left, right = _factors(matrices)
        count = matrices.shape[-3]
        index = np.broadcast_to(np.arange(count), (*lead, count)).copy()
        xp = arithmetic(x)
        if xp.kind == "torch":
            index = xp.torch.as_tensor(index, device=x.device)  # type: ignore[attr-defined]
        return ExpertLowRank(left, right, in_out, index, count)

    def _low_rank(self, change: LowRank) -> tuple[Delta, bool]:
        place = self._place()
        experts = isinstance(change, ExpertLowRank)
        if place is None or len(self.shape) < 2 or experts != place[1].per_expert:
            raise BadInput(f"{self.param} has shape {self.shape}: a {type(change).__name__} cannot be added to it")
        left, right = self._fits(change.left), self._fits(change.right)
        in_out, stacked = _storage(place[1])
        inner, outer = self.shape[-2:] if in_out else self.shape[-2:][::-1]
        sides = (left.shape[-1], right.shape[-1])
        if stacked is not None:
            outer //= stacked
        turned = sides == (inner, outer) != (outer, inner)
        rows = (1,) * self._inside(place[0])
        lead = tuple(left.shape[: -3 if experts else -2])
        if lead not in ((), self.tokens, (*self.tokens, *rows), (*self.tokens, *rows[1:])):
            raise BadInput(f"the change of {self.param} has token axes {lead}: expected {self.tokens} or none")
        if not turned and sides != (outer, inner):
            raise BadInput(
                f"the change of {self.param} maps {sides[1]} to {sides[0]} numbers; the block maps {inner} to {outer} there"
            )
        if turned:
            left, right = right, left
        if isinstance(change, ExpertLowRank):
            return ExpertLowRank(left, right, in_out, change.index, change.experts), turned
        return LowRank(left, right, in_out), turned


def _storage(leaf: Component) -> tuple[bool, int | None]:
    """Whether a leaf stores its matrices (in, out), and how many it stacks in one; as a leaf of one's own says it, or not."""
    return getattr(leaf, "layout", "out_in") == "in_out", getattr(leaf, "stacked", None)


def _factors(matrix: Array) -> tuple[Array, Array]:
    """A dense (..., out, in) as left (..., r, out) and right (..., r, in), one of them the identity."""
    out, inner = matrix.shape[-2:]
    size = min(out, inner)
    xp = arithmetic(matrix)
    corner = xp.zeros_like(matrix[..., :size, :size])
    one = xp.array(np.eye(size, dtype=int), like=matrix) if xp.kind != "numpy" else np.eye(size, dtype=matrix.dtype)
    return (corner + one, matrix) if out <= inner else (matrix.swapaxes(-1, -2), corner + one)
