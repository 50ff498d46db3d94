"""A proof as a file for Coq (Rocq): the block as a formula, the derivation as a node, the patch, and the theorem that the kernel checks."""

import re
from dataclasses import replace
from importlib import import_module
from typing import Any

from controllability.components.convolution import Window
from controllability.errors import BadInput, within_depth
from controllability.interfaces import Param
from controllability.prover.derivation import Derivation
from controllability.rocq.formula import Value, Writer, value
from controllability.rocq.names import BOUND, KEYWORDS, LOGIC, identifier, stated
from controllability.rocq.nodes import Nested, Run, Tree, pair, tree
from controllability.rocq.reduction import Reduction
from controllability.rocq.sizes import Size
from controllability.rocq.states import Level, vector

for module in ("leaf_nodes", "composed_nodes", "undone_nodes", "mixture_nodes", "stream_nodes"):
    import_module(f"controllability.rocq.{module}")  # each registers its lemmas

WORD = re.compile(r"[A-Za-z_]\w*'?")
KINDS = {"vec": "vec {}", "mat": "mat {} {}", "experts": "{} -> mat {} {}", "stack": "mat ({} * {}) {}"}


@within_depth
def certificate(proof: Derivation) -> str:
    """The certificate of a proof, a text that ``coqc`` accepts together with the theory.

    Raises ``BadInput`` with the name of a component, rule or number for which there is no lemma or no formula.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.prover.search import derive
    >>> text = certificate(derive(residual(Linear(Param("W", ("d", "d")))), "output", "auto"))
    >>> print(text.split("(* 2")[0].strip().splitlines()[-1])
    Definition block (W : mat d d) (x : vec d) : vec d := (add x (apply W x)).
    """
    w = Writer()
    tokens = w.sizes.new("T") if proof.jointly else None
    params = proof.layout.parameters
    _refuse_overlaps(proof, params)
    names = {p: identifier(str(p), w.taken) for p in params}
    run, level = Run(w, names), Level(tokens, positions=_positions(w, proof))
    sizes = tuple(w.sizes.new(str(size or "n")) for size in proof.layout.inputs)
    size: Any = sizes if len(sizes) > 1 else next(iter(sizes))
    for _ in range(2):  # once for the sizes, which what follows knows then
        formula = value(w, proof.block, Value(level.at("x"), size), level.point(names))
    text = _assembled(run, tree(run, proof.root, level, size), formula, size, level)
    avoid = w.taken | BOUND | KEYWORDS | LOGIC | stated()
    text, sizes_ = w.sizes.resolve(text, set(avoid))
    context = " ".join(f"{{{n} : Type}} {{finite_{n} : Finite {n}}}" for n in sizes_)
    return text.replace("⟪sizes⟫", f"Context {context}." if sizes_ else "", 1)


def _positions(w: Writer, proof: Derivation) -> Size | None:
    """The positions of a block that reads a window."""
    windows = [node for node in proof.layout.nodes.values() if isinstance(node, Window)]
    if windows and proof.jointly:
        raise BadInput(f"{windows[0].describe()} in a joint proof have no formula in Coq: no certificate is written")
    return w.positions(windows[0].count) if windows else None


def _new_values(params: Nested, moved: Any) -> dict[Param, Any]:
    """The new value of each parameter that a node moves."""
    if params is None or isinstance(params, Param):
        return {} if params is None else {params: moved}
    return {
        p: one for nested, part in zip(params, moved.items, strict=True) for p, one in _new_values(nested, part).items()
    }


def _used(definitions: dict[str, str], read: set[str]) -> list[str]:
    """The definitions that what is read rests on, by name: what nothing reads could say anything."""
    kept = []
    for body, name in reversed(definitions.items()):
        if name in read:
            read.update(WORD.findall(body))
            kept.append(f"Definition {name} := {body}.")
    return kept[::-1]


def _refuse_overlaps(proof: Derivation, params: tuple[Param, ...]) -> None:
    for moved in proof.root.moved:
        for other in params:
            if moved != other and moved.overlaps(other):
                raise BadInput(
                    f"{moved} and {other} share entries: a certificate takes them as two, so none is written"
                )


def kind_of(w: Writer, param: Param) -> str:
    """The type of a parameter.  Raises ``BadInput`` for one that no formula reads."""
    if param not in w.types:
        raise BadInput(f"no formula reads {param}: no certificate is written")
    kind, sizes = w.types[param]
    return KINDS[kind].format(*map(w.sizes.mark, sizes))


def product_of(w: Writer, nested: Nested) -> str:
    """The type of parameters as a node pairs them."""
    if nested is None:
        return "unit"
    if isinstance(nested, Param):
        return f"({kind_of(w, nested)})"
    return f"({' * '.join(product_of(w, one) for one in nested)})"


def _assembled(run: Run, found: Tree, formula: Value, size: Any, level: Level) -> str:
    w, names, reduction = run.w, run.names, Reduction(run.w)
    params = pair(found.params, names.__getitem__)
    given = f"{found.text} {params} v v'"
    new = {p: reduction.text(one) for p, one in _new_values(found.params, reduction.at(f"input_move {given}")).items()}
    proof = reduction.proof(reduction.at(f"input_can {given}"))
    patches = [f"Definition {names[p]}' := {text}." for p, text in new.items()]
    defined = _used(reduction.definitions, set(WORD.findall(" ".join((*reduction.hypotheses, *new.values())))))
    variable = {p: f"Variable {names[p]} : {kind_of(w, p)}." for p in names}
    state, out = level.kind(w, vector(w, size)), replace(level, positions=None).kind(w, vector(w, formula.size))
    equal = " ".join(f"{names[p]}'" if p in new else names[p] for p in names)
    equal = f"block {equal} v = block {' '.join(names.values())} v'"
    move = [p for p in names if p in new]
    exists = "".join(f"exists {names[p]}' : {kind_of(w, p)}, " for p in move)
    witness = (
        f"({' '.join(('patch', *reduction.hypotheses.values()))})" if reduction.hypotheses or not move else "patch"
    )
    for p in reversed(move):
        witness = f"(ex_intro _ {names[p]}' {witness})"
    assumed = "".join(f"\n  ({name} : {body})" for body, name in reduction.hypotheses.items())
    lines = [
        "From Coq Require Import Reals.", "From Controllability Require Import Theory.", "Open Scope R_scope.", "Section certificate.",
        "⟪sizes⟫", *(f"Variable {name} : {kind}." for name, kind in w.functions.items()), "",
        "(* 1. The block as a formula. *)",
        f"Definition block {' '.join(f'({v[9:-1]})' for v in variable.values())} (x : {state}) : {out} := {level.over(w, formula.text)}.", "",
        "(* 2. The derivation: lemmas of the theory, from the leaves up. What stays is held fixed. *)",
        *(variable[p] for p in names if p not in new), f"Definition tree : input {product_of(w, found.params)} ({state}) ({out}) := {found.text}.", "",
        "(* 3. The patch at a source state v and a target state v'. *)",
        *(variable[p] for p in move), f"Variables v v' : {state}.", *defined, *patches, "",
        "(* 4. Where the side conditions hold, the patched block gives at v what the block gave at v'. *)",
        f"Theorem patch{assumed} :\n  {equal}.",
        f"Proof. exact (input_ok tree {params} v v' {proof}). Qed.",
        f"Theorem perfect{assumed} :\n  {exists}{equal}.", f"Proof. exact {witness}. Qed.",
        "End certificate.", "", "(* 5. What all of it rests on. *)", "Print Assumptions perfect.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
