"""What a sweep found out, layer by layer: plain data, ready for JSON and tables."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from controllability.deltas import Delta, Shift
from controllability.interfaces import Param
from controllability.models.sweep import LayerSweep, LayerTarget, residual_of


@dataclass(frozen=True)
class LayerReport:
    """One layer: residual of its output, margins of its side conditions, size of each patch, route taken."""

    index: int
    residual: float
    route: str
    why: str
    amplification: float | None
    derivation: int
    margins: list[dict[str, Any]] = field(default_factory=list)
    relative_changes: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A whole patch: options, layers, sizes.  ``residual`` is the largest of the layers'."""

    scope: str
    via: str
    route: str
    dtype: str
    tokens: int
    numbers: int
    dense_numbers: int
    seconds: float
    layers: list[LayerReport]

    @property
    def residual(self) -> float:
        """The largest relative error of a layer's output at the paired positions."""
        return max(layer.residual for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"residual": self.residual}


def layer_report(solver: LayerSweep, target: LayerTarget, norms: dict[str, float]) -> LayerReport:
    """Report of one solved layer; ``norms`` are the Frobenius norms of the stored parameters."""
    assert solver.output is not None
    journal = solver.run.journal
    routes = [value for where, value in journal.decisions.items() if not where.endswith(": why")]
    whys = [value for where, value in journal.decisions.items() if where.endswith(": why")]
    rules = {goal.steering.rule for goal in solver.run.goals.values()}
    margins: dict[tuple[str, str], float | None] = {}
    for margin in journal.margins:
        key = (margin.condition.statement, margin.condition.where)
        margins[key] = (
            margin.value if margins.get(key) is None else min(margin.value or math.inf, margins[key] or math.inf)
        )
    changes = {str(p): _relative_change(p, delta, solver, norms) for p, delta in solver.deltas().items()}
    return LayerReport(
        index=solver.layer.index,
        residual=residual_of(solver.output, target.outputs[()]),
        route=routes[0] if routes else ("scale" if "O-scale" in rules else "none"),
        why=whys[0] if whys else "the only way here",
        amplification=journal.numbers.get("amplification"),
        derivation=solver.choice,
        margins=[{"statement": s, "where": w, "margin": value} for (s, w), value in margins.items()],
        relative_changes=changes,
    )


def _relative_change(param: Param, delta: Delta, solver: LayerSweep, norms: dict[str, float]) -> float | None:
    """Matrices: ‖ΔW‖/‖W‖.  Scales: max |Δm|/|m| over the channels with m ≠ 0.  Biases: ‖Δb‖/‖b‖.

    The largest over the tokens; None where the stored parameter is 0.
    """
    scale = _component(param, solver)
    if isinstance(delta, Shift) and scale is not None:
        m = scale.effective(solver.layer.params)
        alive = m != 0
        if not bool(alive.any()):
            return None
        return float((delta.value / m.where(alive, m + 1)).abs().masked_fill(~alive, 0).max())
    norm = norms[param.name]
    return float(delta.norms().max()) / norm if norm else None


def _component(param: Param, solver: LayerSweep) -> Any:
    from controllability.components.scale import Scale
    from controllability.trace import leaves

    for _, leaf in leaves(solver.layer.block):
        if isinstance(leaf, Scale) and leaf.weight == param:
            return leaf
    return None
