"""What a proof, or a refusal, says of every leaf of a block: moved, undone, left alone, or to blame."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from controllability.interfaces import Component, InputControllable, OutputControllable, Param, Path, Place, Sequence
from controllability.interfaces.param import overlap
from controllability.interfaces.paths import leaves
from controllability.prover.derivation import Derivation
from controllability.rules import Step
from controllability.rules.normalised import OutputNormalised

State = Literal["input", "output", "undone", "shared", "own", "fixed", "culprit"]

WORDS: dict[State, tuple[str, str]] = {
    "input": ("moved: in", "moved on the input side: it gives at v what it gave at v'"),
    "output": ("moved: out", "moved on the output side: it makes up for what is still missing"),
    "undone": ("undone", "stays as it is; the output side goes through it by undoing it"),
    "shared": ("shared", "reads a parameter that is moved elsewhere"),
    "own": ("own rule", "could move by a rule of its own; here it stays as it is"),
    "fixed": ("", "fixed: it has no rule of its own and stays as it is"),
    "culprit": ("culprit", "here the derivation stops"),
}


@dataclass(frozen=True)
class Group:
    """A part of a block that gets a frame: parts start … stop of a sequence, or (stop 0) the node at ``path``."""

    path: Path
    label: str
    css: str
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Roles:
    """The reading of a block: a state for every leaf, frames, cuts between inner and outer functions.

    ``steps`` holds the step that decided a leaf's state, ``cuts`` (path of a sequence, index of the outer
    function's first part).

    >>> from controllability import prove
    >>> from controllability.components import Activation, Linear, residual
    >>> from controllability.interfaces import Param
    >>> proof = prove(residual(Linear(Param("up")) >> Activation("silu") >> Linear(Param("down"))))
    >>> list(roles(proof).states.values())
    ['fixed', 'input', 'fixed', 'output']
    """

    states: Mapping[Path, State]
    steps: Mapping[Path, Step] = field(default_factory=dict)
    spans: tuple[Group, ...] = ()
    cuts: frozenset[tuple[Path, int]] = frozenset()


def roles(proof: Derivation) -> Roles:
    """What the derivation does with every leaf of its block."""
    steps: dict[Path, Step] = {}
    states: dict[Path, State] = {}
    for step in proof.root.walk():
        for path, state in _decided(step):
            states[path], steps[path] = state, step
    moved = frozenset(proof.root.moved)
    for path, leaf in leaves(proof.block):
        if path not in states:
            states[path] = "shared" if overlap(moved, leaf.parameters()) else unmoved(leaf)
    spans = tuple(s for step in proof.root.walk() if (s := _through(step)) is not None)
    cuts = frozenset(cut for step in proof.root.walk() if (cut := _cut(step)) is not None)
    return Roles({path: states[path] for path, _ in leaves(proof.block)}, steps, spans, cuts)


def refused_roles(block: Component, culprit: str) -> Roles:
    """A block without a derivation: the part that ``culprit`` describes is marked.

    Several parts may have the same description; all of them are marked.
    """
    states: dict[Path, State] = {path: unmoved(leaf) for path, leaf in leaves(block)}
    states |= {path: "culprit" for path, leaf in leaves(block) if leaf.describe() == culprit}
    return Roles(states, spans=tuple(_described(block, (), culprit)))


def unmoved(leaf: Component) -> State:
    """The state of a leaf that a proof does not touch."""
    return "own" if isinstance(leaf, InputControllable | OutputControllable) else "fixed"


def covers(place: Place, path: Path) -> bool:
    """Whether the node at ``path`` is, or stands inside, ``place``."""
    if path[: len(place.path)] != place.path:
        return False
    if not place.component.in_line:
        return True
    stop = place.start + len(place.component.children())
    return len(path) > len(place.path) and place.start <= path[len(place.path)] < stop


def chain(root: Step, path: Path) -> list[Step]:
    """The steps around the node at ``path``, from the whole block inwards."""
    if not covers(root.place, path):
        return []
    inside = max((chain(premise, path) for premise in root.premises), key=len, default=[])
    return [root, *inside]


def _decided(step: Step) -> Iterator[tuple[Path, State]]:
    """The leaves whose state this very step settles."""
    parts = step.place.parts()
    if step.update is not None:
        side: State = "input" if step.rule.side == "input" else "output"
        yield _holder(step.place, step.update.param), side
    elif isinstance(step.rule, OutputNormalised):
        last = parts[-1]
        below = step.premises[0].moved
        scaled = last.component.scales
        if scaled:
            yield last.path, "output" if step.moved - below else "undone"
        yield parts[-2 if scaled else -1].path, "undone"
    elif step.rule.name in ("O-through-bijection", "O-times"):
        for path, _ in leaves(parts[-1].component, parts[-1].path):
            yield path, "undone"


def _holder(place: Place, param: Param) -> Path:
    """The leaf at, or below, a place that reads a parameter: in a mixture it is the experts' last matrix that moves."""
    below = [leaf for part in place.parts() for leaf in leaves(part.component, part.path)]
    return next((path for path, leaf in below if param in leaf.own_parameters()), place.path)


def _through(step: Step) -> Group | None:
    """The frame around a part whose inner functions and output are both steered."""
    place = step.place
    if step.rule.name not in ("T-split", "T-sum", "T-mixture", "T-mixture jointly"):
        return None
    stop = place.start + len(place.component.children()) if place.component.in_line else 0
    return Group(place.path, "through", "through", place.start, stop)


def _cut(step: Step) -> tuple[Path, int] | None:
    """Where a theorem splits a sequence into inner and outer function."""
    if step.rule.name not in ("theorem-1", "T-split") or len(step.premises) != 2:
        return None
    inner, outer = (premise.place for premise in step.premises)
    run = inner.path[: len(outer.path)] == outer.path  # parts of the sequence that f stands in, not one part of it
    sequence, index = (outer.path, outer.start) if run else (outer.path[:-1], outer.path[-1])
    return (sequence, index) if inner.path[: len(sequence)] == sequence else None


def _described(part: Component, path: Path, text: str) -> Iterator[Group]:
    """Every node with parts, and every run of parts of a sequence, that ``text`` describes."""
    children = part.children()
    if children and part.describe() == text:
        yield Group(path, "culprit", "culprit", 0, len(children) if part.in_line else 0)
    for start, stop in combinations(range(len(children) + 1), 2) if part.in_line else ():
        if 1 < stop - start < len(children) and Sequence(children[start:stop]).describe() == text:
            yield Group(path, "culprit", "culprit", start, stop)
    for i, child in enumerate(children):
        yield from _described(child, (*path, i), text)
