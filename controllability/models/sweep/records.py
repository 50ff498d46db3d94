"""What is kept of a solved layer for its report: a few numbers a token, still tensors."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from controllability.arrays import errors_and_sizes
from controllability.arrays.sharded import gathered
from controllability.deltas import Delta, ExpertLowRank, Shift
from controllability.execution.journal import RouteTaken
from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Path, node
from controllability.models.sweep.layer_sweep import LayerSweep


@dataclass(frozen=True, eq=False)
class LeafRecord:
    """One patched leaf: its delta, and the largest entries (N,) of its own output, what was added, and their sum.

    ``own`` and ``total`` are None where the run does not show them, ``added`` where the delta says it.  ``scale`` (d,)
    is the effective scale before the patch; ``own`` is then the product of the largest scale and the largest input.
    """

    parameter: str
    delta: Delta
    own: Tensor | None = None
    total: Tensor | None = None
    added: Tensor | None = None
    scale: Tensor | None = None

    def condition(self) -> list[float | None] | None:
        """(own + added) / total for every pair, None where the total is 0; None where the run does not show them."""
        if self.own is None or self.total is None:
            return None
        sizes, count = self.own.double(), len(self.own)
        if self.scale is None:
            shift = self.delta.value if isinstance(self.delta, Shift) else self.delta.left.sum(-2)
            added = self.added if self.added is not None else _largest(shift.reshape(count, -1))
            sizes = sizes + added.double()
        found = (sizes / self.total.double()).tolist()
        return [v if math.isfinite(v) else None for v in found]


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One call of one solved layer; all tensors are (N,), one number a pair.

    ``error`` and ``size`` are max |difference| and max |target| of the layer's output, ``margins`` (statement, where,
    values), ``by_scale`` whether a norm's scale alone was steered.
    """

    index: int
    derivation: int
    error: Tensor
    size: Tensor
    leaves: dict[str, LeafRecord]
    margins: list[tuple[str, str, Any]]
    routes: list[RouteTaken]
    by_scale: bool

    def residual(self) -> float:
        """max |difference| / max |target| over all pairs."""
        return float(self.error.max() / self.size.max().clamp_min(_TINY))

    def residuals(self) -> list[float]:
        """The same for every pair, each against its own size."""
        return (self.error.double() / self.size.double().clamp_min(_TINY)).tolist()

    def route(self) -> str:
        """The route that its norms took; "scale" where a norm's scale alone was moved, "none" without one."""
        return "+".join(dict.fromkeys(taken.route for taken in self.routes)) or ("scale" if self.by_scale else "none")

    def amplification(self) -> list[float | None]:
        """How much the norm after the patched map magnifies that map's rounding, for every pair; None without one."""
        seen = [taken.amplification for taken in self.routes if taken.amplification is not None]
        if not seen:
            scales = (leaf.condition() for leaf in self.leaves.values() if leaf.scale is not None)
            return next(filter(None, scales), [None] * len(self.error))
        return torch.stack([a.reshape(len(self.error), -1).amax(-1) for a in seen]).amax(0).double().tolist()

    def change(self, name: str, norms: dict[str, float]) -> list[float | None]:
        """Matrices: ‖ΔW‖/‖W‖.  Scales: max |Δm|/|m| over the channels with m ≠ 0.  Biases: ‖Δb‖/‖b‖.

        For every pair; None where the stored parameter is 0.
        """
        leaf, count = self.leaves[name], len(self.error)
        if isinstance(leaf.delta, Shift) and leaf.scale is not None:
            alive = leaf.scale != 0
            if not bool(alive.any()):
                return [None] * count
            ratio = (leaf.delta.value / leaf.scale.where(alive, leaf.scale + 1)).abs().masked_fill(~alive, 0)
            return _each(ratio.amax(-1), count).double().tolist()
        norm = norms.get(leaf.parameter)
        return [v / norm for v in _each(leaf.delta.norms(), count).double().tolist()] if norm else [None] * count


_TINY = torch.finfo(torch.float32).tiny


def record(solver: LayerSweep) -> LayerRecord:
    """Keep of a solved layer what its report will be written from."""
    assert solver.output is not None
    run, wanted = solver.run, solver.run.wanted()
    error, size = errors_and_sizes(solver.output.flatten(1), wanted.flatten(1))
    params = {path: goal.update.param for path, goal in run.goals.items()}
    leaves = {str(param): _leaf(run, path, param.name, run.solved[path]) for path, param in params.items()}
    seen: dict[tuple[str, str], Any] = {}
    for margin in run.journal.margins:
        key, values = (margin.condition.statement, margin.condition.where), margin.tokens
        known = seen.get(key)
        seen[key] = values if known is None else known if values is None else torch.minimum(known, values)
    return LayerRecord(
        solver.layer.index, solver.choice, error, size, leaves, [(s, w, values) for (s, w), values in seen.items()], run.journal.routes,
        any(goal.update.kind == "scale" for goal in run.goals.values()),
    )  # fmt: skip


def joined(earlier: LayerRecord, later: LayerRecord) -> LayerRecord:
    """One record of the tokens of both; the deltas, which serve them all, are the later's."""

    def both(a: Any, b: Any) -> Any:
        return None if a is None or b is None else torch.cat([a.reshape(-1), b.reshape(-1)])

    leaves = dict(later.leaves)
    for name, leaf in leaves.items():
        seen = {
            what: both(getattr(earlier.leaves[name], what), getattr(leaf, what)) for what in ("own", "total", "added")
        }
        leaves[name] = replace(leaf, **seen)
    known = {(statement, where): values for statement, where, values in earlier.margins}
    margins = [(s, w, both(known.get((s, w)), values)) for s, w, values in later.margins]
    taken = {route.where: route for route in (*earlier.routes, *later.routes)}  # one scale serves all: the later one
    seen = [{route.where: route.amplification for route in half.routes} for half in (earlier, later)]
    routes = [replace(route, amplification=both(*(half.get(key) for half in seen))) for key, route in taken.items()]
    error, size = both(earlier.error, later.error), both(earlier.size, later.size)
    return replace(later, error=error, size=size, leaves=leaves, margins=margins, routes=routes)


def _leaf(run: PatchedRun, path: Path, parameter: str, delta: Delta) -> LeafRecord:
    leaf, total = node(run.block, path), run.known_output(path)
    if leaf.scales and isinstance(delta, Shift):
        scale = leaf(run.params, 1)  # what it multiplies by
        before = run.known_output((*path[:-1], path[-1] - 1)) if path else None
        if total is None or before is None:
            return LeafRecord(parameter, delta, scale=scale)
        size = _largest(torch.atleast_2d(scale + delta.value)) * _largest(before)
        return LeafRecord(parameter, delta, size, _largest(total), scale=scale)
    own = run.raw_outputs.get(path)
    if own is None and total is not None and isinstance(delta, Shift):
        own = total - delta.value
    if own is None or total is None:
        return LeafRecord(parameter, delta)
    own_token = run.joint is None  # one delta a token, made for its one input
    one_input = isinstance(delta, Shift) or (delta.left.shape[-2] == 1 and not isinstance(delta, ExpertLowRank))
    added = None if own_token and one_input else _largest(total - own)
    return LeafRecord(parameter, delta, _largest(own), _largest(total), added)


def _each(values: Tensor, count: int) -> Tensor:
    """One number a pair, (N,), also of a delta that serves them all."""
    values = gathered(values)
    return values.reshape(-1).expand(count) if values.numel() == 1 else values.reshape(count)


def _largest(x: Tensor) -> Tensor:
    """The largest absolute entry of each row: (N, …) -> (N,)."""
    return gathered(torch.linalg.vector_norm(x.flatten(1), math.inf, dim=-1))
