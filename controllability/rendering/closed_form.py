"""The patch in closed form: what executing the proof on symbols gives."""

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from controllability.arrays import Array
from controllability.arrays.lazy import sympy
from controllability.checks.rebuilt_blocks import rebuilt, renamed, replace_block, small_sizes
from controllability.checks.symbolic_block import INDEXED, GivenArrays, RecognisedArrays, any_routings, generic
from controllability.deltas import Delta
from controllability.errors import BadInput, ControllabilityError, within_depth
from controllability.execution.sampling import sample, sizes_of, symbolic_sizes
from controllability.interfaces import Component
from controllability.prover.derivation import Derivation
from controllability.rendering.tokens_served import matrix_formulas
from controllability.rules import construct
from controllability.symbolic.definitions import Definitions, definitions
from controllability.symbolic.indexed import IndexedArray
from controllability.symbolic.sums import heads, renamed_heads

ENTRIES = 128  # of all parameters together, that a formula writes out: SymPy takes minutes for 200
PARTS = 1 << 28  # of all entries with no name left in them; shared, or they would fill the memory


@dataclass(frozen=True)
class ClosedForm:
    """Deltas in index notation, every size a symbol, and what the names in them stand for.

    ``deltas`` maps parameters to low-rank factors or shifts of ``IndexedArray``; ``where`` maps t1, t2, … to arrays,
    each written with those before it.  A parameter whose name a state, a size or a function has is written θ.name.
    """

    deltas: dict[str, Delta]
    where: dict[str, IndexedArray]


TAKEN = re.compile(r"v\d*'?|t\d+|[ik]_?\d*|phi_.*|n\d*|n_?layer\d*|(expert|share|epsilon|mu)\d*|KroneckerDelta")


def written_names(block: Component) -> dict[str, str]:
    """Stored tensor -> how a closed form writes it: its own name, unless something else has that one.

    >>> from controllability.components import Bias, Linear
    >>> from controllability.interfaces import Param
    >>> written_names(Linear(Param("W", ("d", "d"))) >> Bias(Param("v", ("d",))))
    {'W': 'W', 'v': 'θ.v'}
    """
    names = sorted({p.name for p in block.parameters()})
    sizes = {s for p in block.parameters() for s in p.shape if isinstance(s, str)} | set(symbolic_sizes(block))
    written: dict[str, str] = {}
    for name in names:
        new = name
        if not name.isprintable():  # SymPy takes no such name
            new = name.encode("unicode_escape").decode()
        while TAKEN.fullmatch(new) or new in sizes or (new != name and new in (*names, *written.values())):
            new = f"θ.{new}"
        written[name] = new
    return written


class _Named(RecognisedArrays):
    """The patched run with a name for every value, so that formulas stay short."""

    def _compute(self, path: tuple[int, ...]) -> Array:
        return INDEXED.name(super()._compute(path))


@within_depth
def closed_form(proof: Derivation) -> ClosedForm:
    """The patch of a proof for any sizes: norms, activations and routings are undefined functions.

    A scale that no route has to choose, or the uniform route where ``auto`` would compare numbers.
    Raises ``BadInput`` for a joint proof, whose formulas are those of its rules, in matrices.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.proof import prove
    >>> form = closed_form(prove(residual(Linear(Param("W", ("d", "d")))), via="output"))
    >>> form.deltas["W"].right.entry
    v(i_0)/Sum(v(k_1)**2, (k_1, 0, d - 1))
    """
    _for_each(proof)
    names = written_names(proof.block)
    own = {str(replace(p, name=names[p.name])): str(p) for p in proof.block.parameters()}
    block = renamed(rebuilt(proof.block, generic(proof), any_routings()), dict(names))
    same = replace_block(proof, block, names)
    params, v, v_target = sample(block, "indexed")
    with definitions(Definitions()) as table:
        target = GivenArrays(block, params, v_target)
        run = _Named(table, block, params, v, target)
        wanted = target.output(())  # first: its values are the ones to be recognised
        construct(same.root, run, lambda: wanted)
        deltas = {own.get(str(param), str(param)): delta.mapped(INDEXED.tidy) for param, delta in run.deltas().items()}
        return _numbered(ClosedForm(deltas, _needed(deltas, table.arrays)))


def _for_each(proof: Derivation) -> None:
    """Raise ``BadInput`` for a joint proof, with its formulas in matrices: a pseudo-inverse has no entry for any number of tokens."""
    if proof.jointly:
        raise BadInput(
            "one patch for many tokens solves a system of all their inputs: no formula in entries, but in matrices whose "
            f"columns are the tokens: {'; '.join(matrix_formulas(proof))}. construct(params, source, target) gives the numbers"
        )


def _numbered(form: ClosedForm) -> ClosedForm:
    """A closed form whose intermediate values are called t1, t2, … in their order."""
    new = {name: f"t{i + 1}" for i, name in enumerate(form.where)}

    def again(x: IndexedArray) -> IndexedArray:
        return IndexedArray(x.shape, renamed_heads(x.entry, new))

    deltas = {name: delta.mapped(again) for name, delta in form.deltas.items()}
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


@within_depth
def formula(proof: Derivation, expand: bool = True, **sizes: int) -> dict[str, Any]:
    """Each ΔW as a SymPy matrix of explicit (small) size, in the entries of parameters and states.

    ``sizes`` are those of the block's shapes (d=2, h=3 unless given).  With ``expand=False`` intermediate values keep
    their names t1, t2, ….  Entries are called name_ij, by the last part of the name; where that would be said of two
    entries, name[i,j] with the whole name.  Raises ``BadInput`` for a size that the block does not have, sizes at
    which it does not compute, more than 128 entries and formulas of more than 2²⁸ parts, ``NotExact`` where symbols cannot decide (a route that compares sizes).

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.proof import prove
    >>> formula(prove(residual(Linear(Param("W", ("d", "d")))), via="output"), d=1)["W"]
    Matrix([[(W_11*v'_1 - W_11*v_1 + v'_1 - v_1)/v_1]])
    """
    _for_each(proof)
    known: dict[str, Any] = small_sizes(proof.block)
    if unknown := sorted(set(sizes) - set(known)):
        raise BadInput(f"the block has no size {', '.join(unknown)}: it has {', '.join(sorted(known)) or 'none'}")
    if wrong := [f"{k}={n!r}" for k, n in sizes.items() if isinstance(n, bool) or not isinstance(n, int) or n < 1]:
        raise BadInput(f"a size is a whole number of at least 1, got {', '.join(wrong)}")
    chosen = ", ".join(f"{k}={n}" for k, n in (known | sizes).items())
    numbers: dict[Any, Any] = dict(sizes_of(proof.block, **(known | sizes)))
    if (count := sum(prod(numbers.get(s, s) for s in p.shape) for p in proof.block.parameters())) > ENTRIES:
        raise BadInput(
            f"at {chosen or 'its sizes'} the parameters have {count:,} entries, and a formula of each is written out for at most {ENTRIES}: "
            "choose smaller sizes; closed_form() and to_latex() hold for every size"
        )
    try:
        params, v, v_target = sample(proof.block, "sympy", 0, (), **(known | sizes))
        patch = proof.construct(params, v, v_target)
    except ControllabilityError:
        raise
    except (TypeError, ValueError, AttributeError) as reason:
        raise BadInput(f"the block does not compute on symbols at {chosen or 'its sizes'}: {reason}") from reason
    found = {name: delta.dense() for name, delta in patch.items()}
    table = patch.definitions if expand else None
    parts = table.parts_of(e for dense in found.values() for e in dense.reshape(-1)) if table is not None else 0
    if parts > PARTS:
        raise BadInput(
            f"with every name replaced the formulas have {parts:.1g} parts, at most {PARTS:.1g} are written: ask for expand=False, "
            "or choose smaller sizes"
        )
    written = table.expand if table is not None else (lambda entry: entry)
    return {n: _shaped([written(e) for e in dense.reshape(-1)], dense.shape) for n, dense in found.items()}


def _shaped(entries: list[Any], shape: Any) -> Any:
    if len(shape) <= 2:
        return sympy.Matrix(shape[0], shape[1] if len(shape) == 2 else 1, entries)
    return sympy.ImmutableDenseNDimArray(entries, shape)
