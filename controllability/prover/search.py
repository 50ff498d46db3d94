"""The search: which rules conclude that a block can be patched, and where it stops if none does."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Literal, get_args

from architectures.widths import declared_misfits
from controllability.errors import BadInput, within_depth
from controllability.interfaces import Component, Layout, Param, Path, Place, leaves
from controllability.prover.derivation import Derivation
from controllability.prover.explain import explained, leaf_failure, refusal
from controllability.prover.remedies import Remedy
from controllability.rules import RULES, Attempt, Failure, Side, Step
from controllability.solvers.norm_scale import check_route

Via = Literal["input-output", "output"]
MOST = 8  # derivations kept at one place: alternatives for numbers on which the first one fails


@within_depth
def derive(block: Component, via: Via, route: str, frozen: Iterable[str] = (), jointly: bool = False) -> Derivation:
    """The derivation that ``block`` can be patched.  See ``controllability.prove``, which documents the options and errors."""
    if via not in get_args(Via):
        raise BadInput(f"unknown theorem via={via!r}: choose input-output (Theorem 1) or output (Theorem 1b)")
    check_route(route)
    if not isinstance(block, Component):
        raise BadInput(f"prove takes a component, got {type(block).__name__}; architectures.block(name) gives one")
    frozen = frozenset((frozen,) if isinstance(frozen, str) else frozen or ())
    if odd := [name for name in frozen if not isinstance(name, str)]:
        raise BadInput(f"frozen takes names of parameters, got {odd[0]!r}")
    known = {str(p) for p in block.parameters()} | {p.name for p in block.parameters()}
    if unknown := sorted(frozen - known):
        raise BadInput(
            f"frozen names {', '.join(unknown)}, which the block does not have; it has {', '.join(sorted(known))}"
        )
    if not isinstance(jointly, bool):
        raise BadInput(f"jointly must be True or False, got {jointly!r}")
    Layout.of(block)  # refuses parts that read what is not there yet
    if problems := declared_misfits(block):
        raise BadInput(f"the sizes of the block do not fit: {'; '.join(problems)}")
    if any(leaf.mixes for _, leaf in leaves(block)):
        via = "output"  # what mixes positions is not steered: Theorem 1b
    prover = Prover(block, via, route, frozen, jointly)
    place = Place(block)
    attempt = prover.attempt(place, "input")
    if not attempt.steps:
        asked = Remedy("", block, via, route, frozen, jointly)
        raise refusal(asked, attempt, prover, _unproved)
    return Derivation(block, attempt.steps[0], tuple(attempt.steps[1:]), via, route, frozen, jointly)


def _unproved(question: Remedy) -> list[Failure]:
    """Why a question to the prover has no answer, the most telling failure first; [] where it has one."""
    via: Via = "output" if question.via == "output" else "input-output"
    prover = Prover(question.block, via, question.route, question.frozen, question.jointly)
    attempt = prover.attempt(Place(question.block), "input")
    return [] if attempt.steps else explained(attempt.failures, question.block, prover)


class Prover:
    """One search; attempts are remembered by place and side."""

    def __init__(self, block: Component, via: Via, route: str, frozen: frozenset[str], jointly: bool = False) -> None:
        self.via, self.route, self.frozen, self.jointly = via, route, frozen, jointly
        self.normalised = frozenset(scales_of_norms(block))  # scales whose route is to be chosen
        self.per_expert_rows = frozenset(per_expert_leaves(block, (), False, False, 1)[0])
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
                tried = rule.conclude(place, self)
                found.steps += tried.steps
                found.failures += [f if f.side else replace(f, side=side) for f in tried.failures]
        best: dict[frozenset[Param], Step] = {}
        for step in sorted(found.steps, key=lambda s: s.cost):
            best.setdefault(step.moved, step)
        found.steps = list(best.values())[:MOST]
        if not found.steps and not found.failures:
            found.failures.append(leaf_failure(place, side, self.jointly))
        return found


def scales_of_norms(block: Component) -> Iterator[Path]:
    """Where a scale stands directly after a normalisation."""
    found = leaves(block)
    for (before, norm), (path, scale) in pairwise(found):
        same_sequence = before[:-1] == path[:-1] and before[-1:] != path[-1:]
        if same_sequence and norm.normalises and scale.scales:
            yield path


def per_expert_leaves(part: Component, path: Path, rows: bool, around: bool, k: int) -> tuple[list[Path], bool]:
    """The leaves at which a token has several rows, one for each chosen expert; and whether the output has them.

    ``rows`` says so of the input, ``around`` of what the nearest mixture reads, which chooses ``k`` experts: its
    experts' own maps change expert by expert, and only the rows of mixtures further out are too many for them.
    """
    if part.per_expert:
        return [path] if around else [], rows or k > 1
    if not part.children():
        return [path] if rows else [], rows
    found: list[Path] = []
    outs: list[bool] = []
    for i, child in enumerate(part.children()):
        source = part.source_of(i)
        flow = rows if source is None else outs[source]
        nearest = (rows, part.chosen) if i in part.binds else (around, k)
        inside, out = per_expert_leaves(child, (*path, i), flow, *nearest)
        found, outs = found + inside, [*outs, out]
    if part.chosen:  # it adds its experts up
        return found, rows
    return found, any(outs) if part.outlet is None else outs[part.outlet]
