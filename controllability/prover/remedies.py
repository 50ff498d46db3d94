"""What would help a refused block: the nearest changes, each tried by really proving the changed block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from controllability.components.bias import Bias
from controllability.components.linear import Linear
from controllability.components.mixture import ExpertLinear
from controllability.interfaces import Component, Param, Path, Place, Sequence, leaves, node, updates_of
from controllability.prover.edits import (
    above,
    fresh,
    last_norm,
    nodes,
    replace_param,
    shape_of,
    short,
    stem,
    width_after,
    width_before,
    with_node,
)
from controllability.rules import Failure, is_about

ALONE, FIRST, SECOND = 14, 4, 5  # changes tried alone; firsts of a pair; seconds tried after each of those
CULPRITS = 4  # failures whose places are changed
TWICE = 2  # weight of a failure because a parameter has two uses
THEOREMS = {"output": "Theorem 1b", "input-output": "Theorem 1"}


@dataclass(frozen=True)
class Remedy:
    """A question to the prover that differs from the refused one by ``change``, which has a proof.

    ``ct.prove(remedy.block, **remedy.options)`` gives it.  New parameters have names and shapes of their own.

    >>> from controllability import NotControllable, prove
    >>> from controllability.components import Activation, Linear, residual
    >>> try:
    ...     prove(residual(Linear(Param("up", ("h", "d"))) >> Activation("tanh")))
    ... except NotControllable as refused:
    ...     remedy = refused.remedy
    >>> remedy.change, prove(remedy.block, **remedy.options).rules
    ('add a bias after activation tanh', ('theorem-1', 'I-after', 'I-linear', 'O-bias'))
    """

    change: str
    block: Component
    via: str
    route: str
    frozen: frozenset[str]
    jointly: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``prove`` with which the changed block has a proof."""
        many = {"jointly": True} if self.jointly else {}
        return {"via": self.via, "route": self.route, "frozen": self.frozen} | many


Derive = Callable[[Remedy], list[Failure]]


def remedies(asked: Remedy, failures: list[Failure], derive: Derive) -> tuple[tuple[Remedy, ...], int]:
    """The nearest changes that have a proof, and how many were tried.

    The smallest way to ask otherwise, and the smallest edit of the block; if there is neither, the first two
    changes that help together.  ``derive`` gives the failures of a question, the most telling first, or [].
    """
    asked = replace(asked, change="")
    seen = [asked]  # a list: components need not have a hash

    def untried(question: Remedy, left: list[Failure]) -> Iterator[Remedy]:
        for candidate in candidates(question, left):
            if (bare := replace(candidate, change="")) not in seen:
                seen.append(bare)
                yield candidate

    found: dict[bool, Remedy] = {}
    open_: list[tuple[Remedy, list[Failure]]] = []
    for candidate in islice(untried(asked, failures), ALONE):
        kind = candidate.block is asked.block
        if kind in found:
            continue
        if left := derive(candidate):
            open_.append((candidate, left))
        else:
            found[kind] = candidate
    if found:
        return tuple(found[kind] for kind in (True, False) if kind in found), len(seen) - 1
    for one, left in open_[:FIRST]:
        for both in islice(untried(one, left), SECOND):
            if not derive(both):
                return (replace(both, change=f"{one.change}, and {both.change}"),), len(seen) - 1
    return (), len(seen) - 1


def candidates(asked: Remedy, failures: list[Failure]) -> Iterator[Remedy]:
    """Changes worth trying, the smallest first: ask otherwise, untie, add what is missing at the culprits, then at the ends."""
    yield from _asking_otherwise(asked, failures)
    seen: set[str] = set()
    for words, block in _edits(asked.block, failures):
        if words not in seen:
            seen.add(words)
            yield replace(asked, change=words, block=block)


def _asking_otherwise(asked: Remedy, failures: list[Failure]) -> Iterator[Remedy]:
    other = "output" if asked.via == "input-output" else "input-output"
    yield replace(asked, change=f"ask for via='{other}' ({THEOREMS[other]})", via=other)
    if asked.route != "auto":
        yield replace(asked, change="ask for route='auto'", route="auto")
    blamed = [p for f in failures for p in sorted(f.place.component.parameters(), key=str)]
    names = dict.fromkeys(n for p in blamed for n in (str(p), p.name) if n in asked.frozen)
    for name in islice(names, CULPRITS):
        yield replace(asked, change=f"let {name} move", frozen=asked.frozen - {name})


def _edits(block: Component, failures: list[Failure]) -> Iterator[tuple[str, Component]]:
    """(words, changed block)."""
    for failure in failures[:1]:
        yield from _at_culprit(block, failure)
    for path in _ends(block):
        yield from _with_bias(block, path)
    for failure in failures[1:CULPRITS]:
        yield from _at_culprit(block, failure)


def _at_culprit(block: Component, failure: Failure) -> Iterator[tuple[str, Component]]:
    place, path = failure.place, failure.place.path
    if failure.weight == TWICE:
        yield from _untied(block, path)
    if failure.side != "input":
        yield from _with_bias(block, place.outlet)
    if failure.side != "output":
        yield from _with_linear(block, place.inlet)
    yield from _own_maps(block, path)


def _ends(block: Component) -> Iterator[Path]:
    """The ends of the branches, or of a block without branches; the last norm."""
    inlet = Place(block).inlet
    first = Place(node(block, inlet), inlet)
    if is_about("theorem-1", first.component):
        yield from (term.path for term in reversed(first.parts()) if not term.component.is_skip)
    else:
        yield ()
    if norm := last_norm(block):
        yield norm


def _with_bias(block: Component, path: Path) -> Iterator[tuple[str, Component]]:
    """A bias after the component at ``path``: its own, where a linear map has none."""
    path = Place(node(block, path), path).outlet
    part = node(block, path)
    bias = Param(fresh(block, f"{stem(part)}bias"), shape_of(width_after(block, path)))
    name = short(part.describe())
    words, new = f"give {name} a bias", part.with_bias(bias)
    if new is None:
        last = path == last_norm(block)
        words = f"give the last norm a bias, after {name}" if last else f"add a bias after {name}"
        new = Sequence.of(part, Bias(bias))
    if (changed := with_node(block, path, new)) is not None:
        yield words, changed


def _with_linear(block: Component, path: Path) -> Iterator[tuple[str, Component]]:
    first = node(block, path)
    if first.reads_input is not None:  # there are several inputs before it
        return
    width, name = width_before(block, path), f"before_{stem(first)}weight" if stem(first) else "before.weight"
    weight = Param(fresh(block, name), shape_of(width, width))
    if (changed := with_node(block, path, Sequence.of(Linear(weight), first))) is not None:
        yield f"put a linear map before {short(first.describe())}", changed


def _own_maps(block: Component, path: Path) -> Iterator[tuple[str, Component]]:
    """A map that all chosen experts of a mixture share, replaced by one for each expert."""
    shared = node(block, path)
    mixtures = [m for i, m in above(block, path) if i in m.binds]
    shape = next((way.param.shape for way in updates_of(shared, "output") if way.kind == "linear"), None)
    if shape is None or not mixtures:
        return
    known = [c.own_parameters()[0].shape for _, c in leaves(mixtures[-1]) if c.per_expert and c.own_parameters()]
    count: int | str = known[-1][0] if known and known[-1] else "E"
    weight = Param(fresh(block, f"{stem(shared)}experts"), (count, *shape) if shape else ())
    changed = with_node(block, path, ExpertLinear(weight, layout=getattr(shared, "layout", "out_in")))
    if changed is not None:
        yield f"give each expert a map of its own in place of {short(shared.describe())}", changed


def _untied(block: Component, inside: Path) -> Iterator[tuple[str, Component]]:
    """A parameter of its own for one of two uses of a parameter, the last use first."""
    uses = [(path, part, p) for path, part in nodes(block) for p in part.own_parameters()]
    for i, (path, part, param) in reversed([*enumerate(uses)]):
        others = [j for j, (_, _, p) in enumerate(uses) if j != i and p.overlaps(param)]
        if not others or path[: len(inside)] != inside:
            continue
        alone = Param(fresh(block, param.name), param.shape)
        own = replace_param(part, param, alone)
        if own is None or (changed := with_node(block, path, own)) is None:
            continue
        before = sum(j < i for j in others)
        which = ("first", "second", "third")[before] if before < 3 else f"{before + 1}th"
        yield f"untie {param}: a parameter of its own for its {which} use ({short(part.describe())})", changed
