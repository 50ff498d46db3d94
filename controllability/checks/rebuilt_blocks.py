"""The instances on which a proof is checked: the same expression with other leaves, at small sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.components.activation import FORMULAS, Activation
from controllability.components.bias import Bias
from controllability.components.glu import XIELU, Swish
from controllability.components.linear import Linear
from controllability.components.mixture import ExpertLinear, Mixture
from controllability.components.routing import Routing
from controllability.components.scale import Scale
from controllability.errors import BadInput, NotExact
from controllability.execution.sampling import stem
from controllability.interfaces import Component, Param, Params, Size
from controllability.prover.derivation import Derivation
from controllability.prover.edits import nodes
from controllability.prover.search import derive
from controllability.rules import Step
from controllability.rules.schema import sympy_size

SMALL = {"d": 2, "h": 3, "one": 1}
RATIONAL_ACTIVATIONS = ("identity", "relu", "relu2", "relu6", "leaky_relu", "hardswish")
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

    def inputs_read(self) -> dict[int, Size]:
        return self.inner.inputs_read()


def rebuilt(
    block: Component, change: Callable[[Component], Component], route: Callable[[Routing], Routing] = lambda r: r
) -> Component:
    """The same expression with every leaf passed through ``change`` and every routing through ``route``.

    A combinator that cannot be made anew from other parts stays what it is.
    """

    def again(held: Any) -> Any:
        return rebuilt(held, change, route) if isinstance(held, Component) else route(held)

    if block.children():
        try:
            return block.map_held(again).map_children(lambda _, part: again(part))
        except BadInput:
            return block
    held = block.map_held(again)
    if held is block:
        return change(block)
    return held if held.own_parameters() else Named(held)


def mixtures(block: Component) -> list[Mixture]:
    """The mixtures in an expression, the outermost first."""
    return [part for _, part in nodes(block) if isinstance(part, Mixture)]


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
    return each_param(given, lambda p: replace(p, name=names.setdefault(p.name, f"p{len(names) + 1}")))


def each_param(given: Any, change: Callable[[Param], Param]) -> Any:
    """An expression (or anything inside one) with ``change(param)`` in place of every parameter."""
    if isinstance(given, Param):
        return change(given)
    if isinstance(given, tuple):
        return tuple(each_param(part, change) for part in given)
    if is_dataclass(given) and not isinstance(given, type):
        changed = {f.name: each_param(getattr(given, f.name), change) for f in fields(given)}
        return replace(given, **{n: v for n, v in changed.items() if v is not getattr(given, n)})
    return given


def resized(leaf: Component, out: Size, into: Size, experts: Size, width: Size) -> Component:
    """A linear map, of experts or of all, from ``into`` to ``out``, or a scale or bias of size ``width``; other leaves as they are."""
    if isinstance(leaf, Scale | Bias):
        return each_param(leaf, lambda p: replace(p, shape=(width,)))
    if not isinstance(leaf, Linear | ExpertLinear):
        return leaf
    rows: tuple[Any, ...] = (out, into) if leaf.layout == "out_in" else (into, out)
    weight, bias = rows, (out,)
    if isinstance(leaf, ExpertLinear):
        weight, bias = (experts, *rows), (experts, out)
        if leaf.stacked is not None:
            leaf = replace(leaf, stacked=experts if isinstance(experts, int) else leaf.stacked)
            weight = (leaf.stacked * sympy_size(rows[0]), rows[1])
    return each_param(leaf, lambda p: replace(p, shape=weight if p == leaf.weight else bias))


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
    return {name: small.get(name, 2) for name in sorted({*map(stem, named)})}


def _experts(routing: Routing) -> int:
    """One expert more than are chosen, in groups that can be compared."""
    groups = routing.groups[0] if routing.groups else 1
    members = max(-(-(routing.top_k + 1) // groups), routing.group_best if routing.groups else 1)
    return groups * members
