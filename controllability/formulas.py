"""The patch in closed form: what executing the proof on symbols gives."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from controllability.arrays import Array
from controllability.arrays.indexed import IndexedArray
from controllability.checks.generic import INDEXED, GivenArrays, RecognisedArrays, any_routing, generic
from controllability.checks.instances import rebuilt, replace_block, small_sizes
from controllability.deltas import Delta
from controllability.errors import BadInput
from controllability.index_notation import heads, renamed_heads
from controllability.rules import construct
from controllability.sampling import sample
from controllability.symbols import Definitions, definitions

if TYPE_CHECKING:
    from controllability.proof import Proof


@dataclass(frozen=True)
class ClosedForm:
    """Deltas in index notation, every size a symbol, and what the names in them stand for.

    ``deltas`` maps parameters to low-rank factors or shifts of ``IndexedArray``; ``where`` maps t1, t2, … to arrays,
    each written with those before it.
    """

    deltas: dict[str, Delta]
    where: dict[str, IndexedArray]


class _Named(RecognisedArrays):
    """The patched run with a name for every value, so that formulas stay short."""

    def _compute(self, path: tuple[int, ...]) -> Array:
        return INDEXED.name(super()._compute(path))


def closed_form(proof: Proof) -> ClosedForm:
    """The patch of a proof for any sizes: norms, activations and routings are undefined functions.

    A scale that no route has to choose, or the uniform route where ``auto`` would compare numbers.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.prover import prove
    >>> form = closed_form(prove(residual(Linear(Param("W", ("d", "d")))), via="output"))
    >>> form.deltas["W"].right.entry
    v(i_0)/Sum(v(k_1)**2, (k_1, 0, d - 1))
    """
    block = rebuilt(proof.block, generic(proof), any_routing)
    same = replace_block(proof, block)
    params, v, v_target = sample(block, "indexed")
    with definitions(Definitions()) as table:
        target = GivenArrays(block, params, v_target)
        run = _Named(table, block, params, v, target)
        wanted = target.output(())  # first: its values are the ones to be recognised
        construct(same.root, run, lambda: wanted)
        deltas = {str(param): _tidy(delta) for param, delta in run.deltas().items()}
        return _numbered(ClosedForm(deltas, _needed(deltas, table.arrays)))


def _tidy(delta: Delta) -> Delta:
    arrays = {f.name: getattr(delta, f.name) for f in fields(delta)}
    return replace(delta, **{n: INDEXED.tidy(x) for n, x in arrays.items() if isinstance(x, IndexedArray)})


def _numbered(form: ClosedForm) -> ClosedForm:
    """The same with t1, t2, … for the names that are left."""
    new = {name: f"t{i + 1}" for i, name in enumerate(form.where)}

    def again(x: Any) -> Any:
        return IndexedArray(x.shape, renamed_heads(x.entry, new)) if isinstance(x, IndexedArray) else x

    deltas = {
        name: replace(delta, **{f.name: again(getattr(delta, f.name)) for f in fields(delta)})
        for name, delta in form.deltas.items()
    }
    return ClosedForm(deltas, {new[name]: again(array) for name, array in form.where.items()})


def _needed(deltas: dict[str, Delta], arrays: dict[str, IndexedArray]) -> dict[str, IndexedArray]:
    """The definitions that the deltas use, directly or through others, in the order in which they were made."""
    pending = [x.entry for delta in deltas.values() for x in vars(delta).values() if isinstance(x, IndexedArray)]
    needed: set[str] = set()
    while pending:
        for name in heads(pending.pop()) & set(arrays) - needed:
            needed.add(name)
            pending.append(arrays[name].entry)
    return {name: array for name, array in arrays.items() if name in needed}


def formula(proof: Proof, expand: bool = True, **sizes: int) -> dict[str, Any]:
    """Each ΔW as a SymPy matrix of explicit (small) size, in the entries of parameters and states.

    ``sizes`` are those of the block's shapes (d=2, h=3 unless given).  With ``expand=False`` intermediate values keep
    their names t1, t2, ….  Raises ``BadInput`` for a size that the block does not have, ``NotExact`` where symbols
    cannot decide (a route that compares sizes).

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.prover import prove
    >>> formula(prove(residual(Linear(Param("W", ("d", "d")))), via="output"), d=1)["W"]
    Matrix([[(W_11*v'_1 - W_11*v_1 + v'_1 - v_1)/v_1]])
    """
    import sympy

    known: dict[str, Any] = small_sizes(proof.block)
    if unknown := sorted(set(sizes) - set(known)):
        raise BadInput(f"the block has no size {', '.join(unknown)}: it has {', '.join(sorted(known)) or 'none'}")
    params, v, v_target = sample(proof.block, "sympy", 0, (), **(known | sizes))
    patch = proof.construct(params, v, v_target)
    found: dict[str, Any] = {}
    for name, delta in patch.items():
        dense = delta.dense()
        entries = list(dense.reshape(-1))
        if expand and patch.definitions is not None:
            entries = [patch.definitions.expand(e) for e in entries]
        found[name] = _shaped(sympy, entries, dense.shape)
    return found


def _shaped(sympy: Any, entries: list[Any], shape: Any) -> Any:
    if len(shape) <= 2:
        return sympy.Matrix(shape[0], shape[1] if len(shape) == 2 else 1, entries)
    return sympy.ImmutableDenseNDimArray(entries, shape)
