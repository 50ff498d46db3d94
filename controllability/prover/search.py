"""The search: which rules conclude that a block can be patched, and where it stops if none does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from controllability.components.mixture import ExpertLinear, Mixture, Share
from controllability.components.normalisation import Normalize
from controllability.components.scale import Scale
from controllability.interfaces import Component, Param, Path, Place, Sequence, leaves
from controllability.prover.explain import leaf_failure
from controllability.rules import RULES, Attempt, Side, Step

Via = Literal["input-output", "output"]
MOST = 8  # derivations kept at one place: alternatives for numbers on which the first one fails


class Prover:
    """One search; attempts are remembered by place and side."""

    def __init__(self, block: Component, via: Via, route: str, frozen: frozenset[str], jointly: bool = False) -> None:
        self.via, self.route, self.frozen, self.jointly = via, route, frozen, jointly
        self.normalised = frozenset(scales_of_norms(block))  # scales whose route is to be chosen
        self.crowded = frozenset(crowded_leaves(block, (), False, False, 1)[0])
        self._known: dict[tuple[Path, int, int, Side], Attempt] = {}

    def is_frozen(self, param: Param) -> bool:
        """Whether the user forbade to move this parameter."""
        return param.name in self.frozen or str(param) in self.frozen

    def attempt(self, place: Place, side: Side) -> Attempt:
        """The derivations of one side at ``place``: cheapest first, one for each set of moved parameters."""
        key = (place.path, place.start, len(place.component.children()), side)
        if key not in self._known:
            self._known[key] = self._search(place, side)
        return self._known[key]

    def _search(self, place: Place, side: Side) -> Attempt:
        found = Attempt()
        for rule in RULES:
            if rule.side == side and rule.jointly in (None, self.jointly):
                tried = rule.derive(place, self)
                found.steps += tried.steps
                found.failures += [f if f.side else replace(f, side=side) for f in tried.failures]
        best: dict[frozenset[Param], Step] = {}
        for step in sorted(found.steps, key=lambda s: s.cost):
            best.setdefault(step.moved, step)
        found.steps = list(best.values())[:MOST]
        if not found.steps and not found.failures:
            found.failures.append(leaf_failure(place, side))
        return found


def scales_of_norms(block: Component) -> Iterator[Path]:
    """Where a scale stands directly after a normalisation."""
    found = leaves(block)
    for (before, norm), (path, scale) in pairwise(found):
        same_sequence = before[:-1] == path[:-1] and before[-1:] != path[-1:]
        if same_sequence and isinstance(norm, Normalize) and isinstance(scale, Scale):
            yield path


def crowded_leaves(part: Component, path: Path, rows: bool, around: bool, k: int) -> tuple[list[Path], bool]:
    """The leaves at which a token has several rows, one for each chosen expert; and whether the output has them.

    ``rows`` says so of the input, ``around`` of what the nearest mixture reads, which chooses ``k`` experts: its
    experts' own maps change expert by expert, and only the rows of mixtures further out are too many for them.
    """
    if isinstance(part, ExpertLinear | Share):
        return [path] if around else [], rows or k > 1
    if not part.children():
        return [path] if rows else [], rows
    found: list[Path] = []
    if isinstance(part, Mixture):
        flow = rows
        for i, child in enumerate(part.children()):
            here = (rows, around, k) if i == 0 else (flow, rows, part.routing.top_k)
            inside, out = crowded_leaves(child, (*path, i), *here)
            found, flow = found + inside, out if i else rows
        return found, rows
    outs, flow = [], rows
    for i, child in enumerate(part.children()):
        inside, out = crowded_leaves(child, (*path, i), flow, around, k)
        found, outs = found + inside, [*outs, out]
        flow = out if isinstance(part, Sequence) else rows
    return found, flow if isinstance(part, Sequence) else any(outs)
