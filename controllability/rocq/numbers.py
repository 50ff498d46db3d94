"""Certificates of one instance: stored numbers as exact rationals, a residual within a bound, a Farkas certificate; and refusals.

What is shown there holds of the numbers, with no rounding anywhere: rational blocks only.
"""

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from controllability.arrays import Array
from controllability.components import Activation, Sequence, SoftCap
from controllability.errors import BadInput
from controllability.interfaces import Component, Param
from controllability.prover.derivation import Derivation
from controllability.rocq.certificate import kind_of
from controllability.rocq.formula import Point, Value, Writer, value
from controllability.rocq.names import identifier, number, ratio, stated
from controllability.rocq.states import vector
from controllability.solvers.farkas_certificate import Farkas

LARGEST = 4096  # numbers in a certificate
HEAD = [
    "From Coq Require Import QArith Qabs List.",
    "From Controllability Require Import Rationals.",
    "Open Scope Q_scope.",
]


def rational(x: Any) -> str:
    """A number as it is stored, exactly."""
    exact = Fraction(x) if isinstance(x, Fraction | int) else Fraction(float(x))
    return f"({exact.numerator} # {exact.denominator})"


def listed(items: Iterable[str]) -> str:
    """A list."""
    return f"({' :: '.join((*items, 'nil'))})"


def numbers(x: Any) -> str:
    """A vector, or a matrix row by row."""
    return listed(
        numbers(row) if isinstance(row, list | tuple) or getattr(row, "ndim", 0) else rational(row) for row in x
    )


def _rational_words() -> frozenset[str]:
    """The names that formulas over the rationals may have."""
    return stated("rationals.v") | {"map", "cons", "nil", "let", "in"}


def _formulas(proof: Derivation, at: Mapping[str, Mapping[Param, str]]) -> list[str]:
    """The block at states, each with its names of the parameters.  Raises ``BadInput`` for one that is no rational map."""
    found = []
    for state, names in at.items():
        w = Writer()
        text = value(w, proof.block, Value(state, w.sizes.new()), Point(names)).text
        if odd := set(re.findall(r"[A-Za-z_]\w*'?", text)) - _rational_words() - {state, *names.values()} - w.taken:
            raise BadInput(
                f"the block is no rational map, as it has {min(odd)}: a certificate of numbers is for rational blocks"
            )
        found.append(text)
    return found


def residual_certificate(
    proof: Derivation, params: Mapping[str, Any], source: Array, target: Array, bound: Fraction
) -> str:
    """That the patch of one token, as float64 made it, misses its target by at most ``bound``, every number taken exactly.

    States are (d,).  Raises ``BadInput`` for a block that is not rational or has more than 4,096 numbers.
    """
    patch = proof.construct(params, source, target)
    taken = {*_rational_words(), "bound", "source", "target", "given", "wanted", "computed", "residual"}
    names = {p: identifier(str(p), taken) for p in proof.layout.parameters}
    values = {p: p.value(params) for p in names}
    if sum(v.size for v in values.values()) > LARGEST:
        raise BadInput(f"the block has more than {LARGEST} numbers: a certificate of numbers is for small instances")
    merged = patch.merged_into(params)
    moved = {p: p.value(merged) for p in names if p in patch.deltas}
    patched = names | {p: f"{names[p]}'" for p in moved}
    given, wanted = _formulas(proof, {"source": patched, "target": names})
    lines = [
        *HEAD, *(f"Definition {names[p]} := {numbers(v)}." for p, v in values.items()),
        *(f"Definition {patched[p]} := {numbers(v)}." for p, v in moved.items()),
        f"Definition source := {numbers(source)}.", f"Definition target := {numbers(target)}.",
        f"Definition bound := {rational(bound)}.",
        f"Definition given := {given}.", f"Definition wanted := {wanted}.",
        "Lemma computed : within bound given wanted = true.", "Proof. vm_compute. reflexivity. Qed.",
        "Theorem residual : Forall2 (fun a b => Qabs (a - b) <= bound) given wanted.",
        "Proof. exact (within_bound _ _ _ computed). Qed.", "Print Assumptions residual.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def farkas_certificate(found: Farkas) -> str:
    """That no s > 0 solves A s = q, so that no scale keeps every token's RMS: the rows and weights of ``found``, each number exactly."""
    A, width = found.coefficients, len(found.coefficients[0])
    lines = [
        *HEAD, f"Definition A := {numbers(A)}.", f"Definition q := {numbers(found.right)}.",
        f"Definition l := {numbers(found.weights)}.",
        f"Lemma computed : farkas A q l {width} = true.", "Proof. vm_compute. reflexivity. Qed.",
        f"Theorem refusal : ~ exists s, length s = {width}%nat /\\ Forall (Qlt 0) s /\\ Forall2 (fun row b => dot row s == b) A q.",
        "Proof. exact (no_scale _ _ _ _ computed). Qed.", "Print Assumptions refusal.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def refusal_certificate(branch: Component) -> str:
    """That a branch which ends in a bounded map reaches no target beyond the bound, whatever its parameters and its input are.

    For tanh, sigmoid and the soft-cap.  Raises ``BadInput`` for another end.

    >>> from controllability.components import Activation, Linear
    >>> text = refusal_certificate(Linear(Param("W", ("h", "d"))) >> Activation("tanh"))
    >>> print(text.splitlines()[-3])
      forall (W : mat h d) (x : vec d), (map tanh (apply W x)) <> w.
    """
    w = Writer()
    params = sorted(branch.parameters(), key=str)
    names = {p: identifier(str(p), w.taken) for p in params}
    size = w.sizes.new(str(branch.width or "d"))
    found = value(w, branch, Value("x", size), Point(names))
    last = branch.children()[-1] if isinstance(branch, Sequence) else branch
    limit, why = _bounded(last)
    typed = " ".join(f"({names[p]} : {kind_of(w, p)})" for p in params)
    free = "".join(f"forall {name} : {kind}, " for name, kind in w.functions.items())
    out = vector(w, found.size)
    statement = f"forall (w : {out}), (exists i, {limit} < Rabs (w i)) ->\n  forall {typed} (x : {vector(w, size)}), {found.text} <> w"
    text = f"Theorem refusal : ⟪sizes⟫{free}{statement}."
    text, sizes = w.sizes.resolve(text, w.taken)
    given = "".join(f"forall ({n} : Type) (finite_{n} : Finite {n}), " for n in sizes)
    proof = f"Proof. intros. intro E. destruct H as [i L]. rewrite <- E in L. exact (Rlt_not_le _ _ L ({why})). Qed."
    lines = ["From Coq Require Import Reals.", "From Controllability Require Import Theory.", "Open Scope R_scope."]
    return "\n".join((*lines, text.replace("⟪sizes⟫", given), proof, "Print Assumptions refusal.")) + "\n"


def _bounded(last: Component) -> tuple[str, str]:
    if isinstance(last, Activation) and last.name in ("tanh", "sigmoid") and not (last.coefficients or last.symbol):
        return "1", f"{last.name}_bounded _"
    if isinstance(last, SoftCap):
        above, below = ratio(last.cap, last.describe())
        return number(last.cap, last.describe()), f"soft_cap_bounded _ _ _ (positive_ratio {above} {below})"
    raise BadInput(f"{last.describe()} is not known to be bounded: no certificate of a refusal is written")
