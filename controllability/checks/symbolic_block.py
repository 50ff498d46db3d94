"""Runs whose values are reduced as they go: for blocks of symbols, and for arrays of symbolic size."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from controllability.arrays import ARITHMETICS, Array
from controllability.arrays.lazy import sympy
from controllability.checks.cache import Cache
from controllability.checks.rebuilt_blocks import mixtures, rebuilt, renamed, replace_block, transcendental
from controllability.components.activation import Activation
from controllability.components.normalisation import Normalize
from controllability.components.routing import Routing
from controllability.components.streams import NormalizeEach
from controllability.execution.patch import Patch
from controllability.execution.sampling import sample
from controllability.execution.trace import Trace
from controllability.interfaces import Component, Path
from controllability.prover.derivation import Derivation
from controllability.rules import Step, construct
from controllability.rules.normalised import OutputNormalised
from controllability.rules.schema import SchemaRun, Unknown, UnknownRouting
from controllability.symbolic.array_names import known_array, unfold_newest, unfolded_to_zero
from controllability.symbolic.definitions import Definitions, definitions
from controllability.symbolic.indexed import IndexedArray

INDEXED = ARITHMETICS["indexed"]


class GivenArrays(Trace):
    """The target run, every value named: for the patch they are given."""

    def _compute(self, path: Path) -> Array:
        return INDEXED.name(super()._compute(path))


def recognised(table: Definitions, value: Array) -> Array:
    """A value of the target run under that value's name, if that is what it is."""
    while (known := known_array(table, value)) is value and not value.entry.is_Atom:
        shorter = unfold_newest(table, value.entry)
        if shorter == value.entry or shorter.count_ops() > value.entry.count_ops():
            break
        value = IndexedArray(value.shape, shorter)
    return known


class PlainArrays(Trace):
    """A run of the block, which knows nothing of a proof; where it has a value of the target run it goes on with its name."""

    def __init__(self, table: Definitions, *run: Any) -> None:
        super().__init__(*run)
        self.table = table

    def _compute(self, path: Path) -> Array:
        return recognised(self.table, super()._compute(path))


class RecognisedArrays(PlainArrays, SchemaRun):
    """The run in which the patch is solved."""


def any_norm(name: str) -> Component:
    """A norm of which nothing is known, in index notation."""
    return Unknown(name, out=None)


def generic(proof: Derivation, norm: Callable[[str], Component] | None = any_norm) -> Callable[[Component], Component]:
    """Leaves with ε a symbol, and undefined functions for activations; and ``norm`` for norms that nothing is steered through."""
    steered, name_of = norms_steered_through(*proof.root.walk()), Names()

    def change(leaf: Component) -> Component:
        if isinstance(leaf, Normalize):
            if norm is None or id(leaf) in steered:
                return replace(leaf, eps=sympy.Symbol(name_of("epsilon", leaf.eps), positive=True))
            return norm(name_of("n" if leaf.kind == "rms" else "n_layer", leaf))
        if isinstance(leaf, NormalizeEach) and norm is not None:
            return norm(name_of("n_each", leaf))
        name = transcendental(leaf)
        return Activation(f"phi_{name_of(name, leaf)}", symbol=True) if name else leaf

    return change


class Names:
    """Names for undefined functions: equal things share one, a second thing of a kind is numbered."""

    def __init__(self) -> None:
        self.met: dict[str, list[Any]] = {}

    def __call__(self, name: str, of: Any) -> str:
        known = self.met.setdefault(name, [])
        if of not in known:
            known.append(of)
        place = known.index(of)
        return f"{name.replace('_', '')}{place + 1}" if place else name


def norms_steered_through(*steps: Step) -> set[int]:
    """The norms (by ``id``) that a normalised output is steered through in one of ``steps``."""
    ends = [step.place.component.children()[-2:] for step in steps if isinstance(step.rule, OutputNormalised)]
    return {id(part) for end in ends for part in end if part.normalises}


def any_routings(kind: type[UnknownRouting] = UnknownRouting) -> Callable[[Routing], Routing]:
    """Undefined functions of the logits in place of routings: equal ones become the same function, others another."""
    name_of = Names()
    return lambda routing: kind(read=routing.parameters(), name=name_of("", routing))


def whole_block(proof: Derivation) -> tuple[str, str]:
    """(status, method): patched(v) − original(v') for the whole block, every size a symbol.

    Blocks that differ in the names of their parameters only are reduced once.
    """
    names: dict[str, str] = {}
    block = renamed(rebuilt(proof.block, generic(proof), any_routings()), names)
    same = replace_block(proof, block, names)
    shapes = tuple(sorted((str(p), p.shape) for p in block.parameters()))
    key = (block, shapes, same.root)
    left = _MEMORY.recall(key, block, lambda: reduced_entry(same))
    if left != 0:
        return "failed", f"residual left in entry i: {left}"
    routing = ", any routing" if mixtures(block) else ""
    return "passed", f"residual reduced to 0 in index notation: every size, entry, ε{routing} and activation a symbol"


_MEMORY = Cache()


def reduced_entry(proof: Derivation) -> Any:
    """One entry of patched(v) − original(v') in normal form: a SymPy expression in i_0."""
    params, v, v_target = sample(proof.block, "indexed")
    with definitions(Definitions()) as table:
        target = GivenArrays(proof.block, params, v_target)
        run = RecognisedArrays(table, proof.block, params, v, target)
        wanted = target.output(())  # first: its values are the ones to be recognised
        construct(proof.root, run, lambda: wanted)
        patched = PlainArrays(table, proof.block, Patch(run.deltas()).applied_to(params), v)
        return unfolded_to_zero(table, (patched.output(()) - wanted).entry)
