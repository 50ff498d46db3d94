"""The evidence at one leaf and one token: inputs, factors of the change, and what it may have been mistaken for."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from controllability.arrays import Array
from controllability.components.mixture import CHOSEN
from controllability.deltas import Delta, ExpertLowRank, LowRank
from controllability.execution.trace import Trace
from controllability.interfaces import Component, Path, node
from controllability.rules import Step
from controllability.verification.known_mistakes import Case, Row, Slip
from controllability.verification.plain_numbers import floats, is_zero, largest, numbers
from controllability.verification.replay import Instance, Measured, Steered, other_choice, shares
from controllability.verification.rule_words import letter

WIDTH = 70  # of a node's name
UNPATCHED = "this input in the source run, as if nothing before it were patched"
POSITIONS = 512  # other positions whose input is compared


def fed_by(block: Component, path: Path) -> str:
    """What the node at ``path`` reads, in the user's terms."""
    while path:
        parent, index = path[:-1], path[-1]
        around = node(block, parent)
        if (source := around.source_of(index)) is not None:
            return f"the output of {short(around.children()[source])}"
        path = parent
    return "the block's input"


def short(component: Component) -> str:
    """A component's description that fits a line."""
    text = component.describe()
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


class Evidence:
    """Reads everything at one token of a measured run."""

    def __init__(
        self, instance: Instance, step: Step, measured: Measured, leaf: Steered, position: tuple[int, ...]
    ) -> None:
        self.instance, self.step, self.measured, self.leaf, self.position = instance, step, measured, leaf, position
        self.run, self.path = measured.run, leaf.path
        self.component = node(instance.block, leaf.path)
        self.chosen = self._chosen(self.run)

    def at(self, x: Array) -> Array:
        """The rows (k, n) of a node's value at the token."""
        x = numbers(x[self.position] if x.ndim > len(self.position) else x)
        return x.reshape(-1, x.shape[-1])

    def _chosen(self, run: Trace) -> list[int]:
        if not self.component.per_expert:
            return []
        return [int(e) for e in self.at(run.params_at(self.path)[CHOSEN]).reshape(-1)]

    def spread(self, rows: Array) -> Array:
        """One row for every chosen expert, where they all read the same."""
        count = len(self.chosen)
        return rows if not count or len(rows) == count else np.repeat(rows, count, axis=0)

    def case(self, fit: float, tolerance: float, epsilon: float, noisy: bool) -> Case:
        """Everything that the known mistakes are held against."""
        instance, leaf = self.instance, self.leaf
        demand, given = (self.at(v) for v in self.measured.leaves[self.path])
        delta = instance.turned.get(leaf.param, instance.given.get(leaf.param))
        mixture = leaf.rule == "O-mixture"
        rows = self._rows(delta, given, demand, fit)
        share = self.at(shares(self.run, self.path))[:, 0] if mixture else None
        # whether the patched run goes to other experts than the target run, and the derivation wants the same
        strayed = mixture and bool(self.at(other_choice(self.run, self.path, self.run.raw(self.path))).any())
        total = demand.reshape(-1), given.reshape(-1)
        if leaf.param in instance.turned and share is None:
            total = total[0], np.concatenate([row.given for row in rows])
        return Case(
            leaf.rule, str(leaf.param), fed_by(instance.block, self.path), rows, total[1], total[0],
            moved=delta is not None and not is_zero(delta), transposed=leaf.param in instance.turned, shares=share,
            candidates=tuple(self._candidates(rows)), lacks=self._lacks(fit, tolerance),
            offset=float(self.component.offset),
            relative=fit, tolerance=tolerance, epsilon=epsilon, noisy=noisy, strayed=strayed,
        )  # fmt: skip

    def _rows(self, delta: Delta | None, given: Array, demand: Array, fit: float) -> tuple[Row, ...]:
        x = self.spread(self.at(self.run.input(self.path)))
        inputs = {name: self._same_input(trace) for name, trace in self._others()}
        together = self.leaf.rule == "O-mixture"
        mistaken = [] if together else self._mistaken(demand)
        rows = []
        for i, part in enumerate(self._parts(delta, fit, len(x))):
            effect = self._effect(part, x[i], given[0] if together else given[i])
            wanted = effect * 0 if together else self._own_demand(demand[i], given[i], effect, fit)
            others = tuple((name, v[i]) for name, v in inputs.items() if v is not None)
            slips = tuple((kind, how, v[i]) for kind, how, v in mistaken)
            label = f"expert {self.chosen[i]}" if self.chosen else ""
            left, right, turned = part.get("left"), part.get("right"), None
            if "matrix" in part and part["matrix"].shape[0] == part["matrix"].shape[1]:
                turned = part["matrix"].T @ x[i]
            elif left is not None and right is not None and left.shape == right.shape:
                turned = right * (left @ x[i])
            rows.append(Row(x[i], effect, wanted, left, right, part.get("vector"), turned, others, slips, label))
        return tuple(rows)

    def _effect(self, part: dict[str, Any], x: Array, like: Array) -> Array:
        """What the change alone adds to the output."""
        if "matrix" in part:
            return part["matrix"] @ x
        if "left" in part:
            return part["left"] * (part["right"] @ x)
        if "vector" in part:
            return part["vector"] * x if self.component.scales else part["vector"]
        return np.zeros_like(like) if like.dtype != object else like * 0

    def _own_demand(self, demand: Array, given: Array, effect: Array, fit: float) -> Array:
        """What is demanded of this parameter, where the patch moves another one of the same map too."""
        rest = given - effect
        if self.leaf.param in self.instance.turned or largest(rest) <= fit * largest(given):
            return demand
        return demand - rest

    def _others(self) -> tuple[tuple[str, Trace], ...]:
        return ("target", self.run.target), ("source", self.run.unpatched)

    def _same_input(self, trace: Trace) -> Array | None:
        """What the same map reads in another run; None where that run has other experts there."""
        if self.chosen and self._chosen(trace) != self.chosen:
            return None
        return self.spread(self.at(trace.input(self.path)))

    def _parts(self, delta: Delta | None, fit: float, count: int) -> Iterator[dict[str, Any]]:
        """The change at every row: its factors, the whole matrix where it is of higher rank, or a vector."""
        if delta is None:
            yield from ({} for _ in range(count))
        elif isinstance(delta, LowRank):
            for left, right in self._factors(delta):
                yield _rank_one(left, right, fit)
        else:
            shared = delta.value.ndim - 1 < len(self.position)
            rows = numbers(delta.value if shared else delta.value[self.position])
            rows = rows.reshape(-1, rows.shape[-1])
            yield from ({"vector": row} for row in (np.repeat(rows, count, 0) if len(rows) < count else rows))

    def _factors(self, delta: LowRank) -> Iterator[tuple[Array, Array]]:
        """(left, right) of every row: (rank, out), (rank, in)."""
        axes = 3 if isinstance(delta, ExpertLowRank) else 2
        shared = delta.left.ndim - axes < len(self.position)
        both = (numbers(f if shared else f[self.position]) for f in (delta.left, delta.right))
        left, right = (f.reshape(-1, *f.shape[-2:]) for f in both)
        if not isinstance(delta, ExpertLowRank):
            yield from zip(left, right, strict=True)
            return
        index = floats(delta.index if shared else delta.index[self.position]).reshape(-1)
        for expert in self.chosen:
            here = index == expert
            yield np.concatenate([left[:0, 0], *left[here]]), np.concatenate([right[:0, 0], *right[here]])

    def _mistaken(self, demand: Array) -> list[tuple[str, str, Array]]:
        """Outputs that a slip in δ or in the left factor would give."""
        goal = self.run.goals.get(self.path)
        if goal is None or goal.wanted is None:
            return []
        wanted = self.at(goal.wanted())
        whole = "it adds the whole wanted output, where only what is missing should be added"
        found = [("whole", whole, wanted)]
        bias = getattr(self.component, "bias", None)
        if bias is not None and bias != self.leaf.param and not self.chosen:
            found.append(("whole", whole, wanted - self.at(bias.value(self.instance.params))))
        if self.leaf.rule.startswith("O") and not self.chosen:
            source, target = (self.at(t.output(self.path)) for t in (self.run.unpatched, self.run.target))
            before = "δ counts from this map's output in the source run, as if nothing before it were patched"
            after = "δ counts from this map's output in the target run, as if what is before it were patched"
            found += [("source-output", before, wanted - source), ("target-output", after, wanted - target)]
        return found

    def _candidates(self, rows: tuple[Row, ...]) -> Iterator[Slip]:
        """Vectors that might stand for the input: the same place in other runs, other positions, other nodes."""
        size = rows[0].x.size
        for name, trace in self._others():
            other = self._same_input(trace)
            if other is None:
                continue
            named = f"{letter(self.leaf.rule)}', this input in the target run" if name == "target" else UNPATCHED
            yield Slip(f"{name}-vector", named, tuple(other))
            own = np.stack([row.x for row in rows])
            yield Slip("tap-point", f"the change of this input, {name} run less patched run", tuple(other - own))
        runs = [("source", self.run.unpatched), ("target", self.run.target), ("patched", self.run)]
        for name, path, label, kind in self._nodes():
            for run, trace in runs:
                value = self._value(trace, path, name == "offset")
                if value is None or value.shape[-1] != size or len(value) not in (1, len(rows)):
                    continue
                vectors = tuple(np.repeat(value, len(rows), 0) if len(value) < len(rows) else value)
                yield Slip(kind, f"{label} in the {run} run", vectors)
        yield from self._other_positions(len(rows))

    def _nodes(self) -> Iterator[tuple[str, Path, str, str]]:
        """(which, path, name, kind of mistake) of every value in the block."""
        block = self.instance.block
        yield "input", (), "the block's input", "tap-point"
        for path in _paths(block):
            component = node(block, path)
            if not component.is_skip:
                yield "output", path, f"the output of {short(component)}", "tap-point"
            if offset := component.offset:
                yield "offset", path, f"the output of {short(component)} without its offset {offset:g}", "offset"

    def _value(self, trace: Trace, path: Path, without_offset: bool) -> Array | None:
        if not path:
            return None if isinstance(trace.state, tuple | list) else self.at(trace.state)
        mixture = next((path[:i] for i in range(len(path)) if path[i] in node(trace.block, path[:i]).binds), None)
        if mixture is not None and self.path[: len(mixture)] != mixture:
            return None  # rows of experts that this map does not see
        value = self.at(trace.output(path))
        if without_offset:
            value = value - node(trace.block, path).offset * self.at(trace.input(path))
        return value

    def _other_positions(self, count: int) -> Iterator[Slip]:
        tokens = self.instance.tokens
        x = self.run.input(self.path)
        for i, other in enumerate(np.ndindex(*tokens)):
            if other == self.position or i >= POSITIONS or self.chosen:
                continue
            vectors = numbers(x[other].reshape(-1, x.shape[-1]))
            if len(vectors) == count:
                yield Slip("other-position", f"the input at {place_name(other)}", tuple(vectors))

    def _lacks(self, fit: float, tolerance: float) -> str:
        """The change of the skip, if that is exactly what the sum of the theorem lacks."""
        theorem = next((s for s in self.step.walk() if s.rule.name in ("theorem-1", "theorem-1b")), None)
        if theorem is None or not self.leaf.rule.startswith("O"):
            return ""
        outlet, inside = theorem.place.outlet, theorem.premises[0].place.outlet[: len(theorem.place.path) + 1]
        run, target = self.run, self.run.target
        missing = self.at(target.output(outlet)) - self.at(run.output(outlet))
        others = [part.outlet for part in theorem.place.parts() if part.path != inside]
        skip = sum(self.at(target.output(o)) - self.at(run.output(o)) for o in others)
        size = max(largest(self.at(target.output(outlet))), largest(skip))
        if largest(skip) == 0 or largest(missing - skip) > fit * size + tolerance:
            return ""
        return "s(v') − s(v), the change of the skip"


def place_name(position: tuple[int, ...]) -> str:
    """'position 3', 'position (0, 3)', '' for a single token."""
    if not position:
        return ""
    return f"position {position[0] if len(position) == 1 else position}"


def _paths(block: Component, path: Path = ()) -> Iterator[Path]:
    """Every node but those in line, whose value is their last part's; in the order of evaluation."""
    for i, child in enumerate(block.children()):
        yield from _paths(child, (*path, i))
    if path and not block.in_line:
        yield path


def _rank_one(left: Array, right: Array, fit: float) -> dict[str, Any]:
    """A change as ``left rightᵀ`` if it is of rank 1, else as a matrix; nothing if it is 0."""
    if len(left) == 1:
        a, b = left[0], right[0]
        return {"left": a, "right": b} if largest(a) and largest(b) else {}
    if left.shape[0] == left.shape[1] and (left == np.eye(len(left), dtype=int)).all():
        matrix = right
    elif right.shape[0] == right.shape[1] and (right == np.eye(len(right), dtype=int)).all():
        matrix = left.T
    else:
        matrix = left.T @ right
    if not largest(matrix):
        return {}
    b = matrix[int(np.argmax(abs(matrix).max(axis=1)))]
    a = (matrix @ b) / (b @ b)
    if largest(matrix - np.multiply.outer(a, b)) <= fit * largest(matrix):
        return {"left": a, "right": b}
    return {"matrix": matrix}
