"""The instances on which a proof is checked: the same expression with other leaves, at small sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.components.activation import FORMULAS, Activation
from controllability.components.fixed import Fixed
from controllability.components.glu import XIELU, Glu, Swish
from controllability.components.mixture import Mixture
from controllability.components.routing import Routing
from controllability.errors import NotExact
from controllability.interfaces import Component, JointOptions, Param, Params, Product, Sequence, Sum
from controllability.prover.derivation import Derivation
from controllability.prover.search import derive
from controllability.rules import Step

DERIVED = {"2h": "h", "E+1": "E"}  # sizes that follow from others
SMALL = {"d": 2, "h": 3, "one": 1}
RATIONAL_ACTIVATIONS = ("identity", "relu", "relu2")
MANY = 2  # tokens of one patch, in symbols and fractions


@dataclass(frozen=True)
class Named(Component):
    """``inner``, its values named: what is computed from them stays small."""

    inner: Component

    def __call__(self, params: Params, x: Array) -> Array:
        value = self.inner(params, x)
        return arithmetic(value).name(value)

    def describe(self) -> str:
        return self.inner.describe()


def rebuilt(
    block: Component, change: Callable[[Component], Component], route: Callable[[Routing], Routing] = lambda r: r
) -> Component:
    """The same expression with every leaf passed through ``change`` and every routing through ``route``.

    What is put together otherwise (a class of its own) stays what it is.
    """

    def again(part: Component) -> Component:
        return rebuilt(part, change, route)

    if isinstance(block, Sequence):
        return replace(block, parts=tuple(map(again, block.parts)))
    if isinstance(block, Sum):
        return replace(block, terms=tuple(map(again, block.terms)))
    if isinstance(block, Product):
        return replace(block, factors=tuple(map(again, block.factors)))
    if isinstance(block, Mixture):
        router, inner, last = map(again, block.children())
        return replace(block, router=router, routing=route(block.routing), inner=inner, last=last)
    if isinstance(block, Glu):
        return Named(replace(block, activation=again(block.activation)))
    if isinstance(block, Fixed):
        return replace(block, inner=again(block.inner))
    return change(block)


def mixtures(block: Component) -> list[Mixture]:
    """The mixtures in an expression, the outermost first."""
    inside = [mixture for child in block.children() for mixture in mixtures(child)]
    return [block, *inside] if isinstance(block, Mixture) else inside


def transcendental(leaf: Component) -> str:
    """The name of an activation that no rational function computes; '' for everything else."""
    if isinstance(leaf, Activation):
        return leaf.name if leaf.name in FORMULAS and leaf.name not in RATIONAL_ACTIVATIONS else ""
    return "swish" if isinstance(leaf, Swish) else "xielu" if isinstance(leaf, XIELU) else ""


def renamed(given: Any, names: dict[str, str]) -> Any:
    """An expression (or anything inside one) whose parameters are called p1, p2, … in the order they are met.

    Two blocks that differ in names only become equal: what is known of one is known of the other.

    >>> from controllability.components import Linear
    >>> renamed(Linear(Param("mlp.up.weight", ("h", "d"))), {}) == renamed(Linear(Param("up", ("h", "d"))), {})
    True
    """
    if isinstance(given, Param):
        return replace(given, name=names.setdefault(given.name, f"p{len(names) + 1}"))
    if isinstance(given, tuple):
        return tuple(renamed(part, names) for part in given)
    if is_dataclass(given) and not isinstance(given, type):
        changed = {f.name: renamed(getattr(given, f.name), names) for f in fields(given)}
        return replace(given, **{n: v for n, v in changed.items() if v is not getattr(given, n)})
    return given


def replace_block(proof: Derivation, block: Component, names: Mapping[str, str] | None = None) -> Derivation:
    """The same derivation for another instance of the block (other ε, other activation, ``names`` renamed).

    Raises ``NotExact`` when the prover does not find this derivation there.
    """
    names = names or {}
    known = {name for p in block.parameters() for name in (p.name, str(p))}  # a learned activation may be gone
    frozen = {_named_as(name, names) for name in proof.frozen} & known
    found = derive(block, proof.via, proof.route, frozen, proof.jointly)  # type: ignore[arg-type]
    for root in (found.root, *found.alternatives):
        if _signature(root) == _signature(proof.root, names):
            return replace(found, root=root, alternatives=())
    raise NotExact("the derivation is not found again on the instance that is to be checked")


def tokens_of(proof: Derivation, many: int = MANY) -> tuple[int, ...]:
    """The axes of the states on which a proof is executed: none, or ``many`` tokens with one patch."""
    return (many,) if proof.jointly else ()


def options_of(proof: Derivation) -> JointOptions | None:
    """How a run solves for its tokens: exactly, with one patch, where the proof is a joint one."""
    return JointOptions() if proof.jointly else None


def _named_as(name: str, names: Mapping[str, str]) -> str:
    whole, bracket, index = name.partition("[")
    return names.get(whole, whole) + bracket + index


def _signature(root: Step, names: Mapping[str, str] | None = None) -> list[tuple[Any, ...]]:
    def one(s: Step) -> tuple[Any, ...]:
        moved = sorted(_named_as(str(p), names or {}) for p in s.moved)
        return s.rule.name, s.rule.side, s.place.path, s.place.start, s.route, moved

    return [one(step) for step in root.walk()]


def small_sizes(block: Component) -> dict[str, Any]:
    """Small numbers for the named sizes; what follows from them is left to ``sample``."""
    named = {s for p in block.parameters() for s in p.shape if isinstance(s, str)}
    inside = mixtures(block)
    small = SMALL | {"h": 2, "E": max(_experts(m.routing) for m in inside)} if inside else SMALL
    named = (named - set(DERIVED)) | {DERIVED[name] for name in named & set(DERIVED)}
    return {name: small.get(name, 2) for name in sorted(named)}


def _experts(routing: Routing) -> int:
    """One expert more than are chosen, in groups that can be compared."""
    groups = routing.groups[0] if routing.groups else 1
    members = max(-(-(routing.top_k + 1) // groups), routing.group_best if routing.groups else 1)
    return groups * members
