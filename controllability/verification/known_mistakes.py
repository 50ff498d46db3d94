"""What a wrong change looks like: known mistakes, each held against the numbers of one token.

A mistake is named only if it fits to rounding.  All vectors are NumPy arrays, of floats or of objects.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from controllability.arrays import Array
from controllability.verification.plain_numbers import largest
from controllability.verification.rule_words import demanded, formula, letter

Vector = Array  # (n,)
FLOAT32 = 1.2e-7
DIVIDING = ("I-scale", "O-scale", "O-normalised", "O-centred")  # rules that divide by what a scale reads
SMALL_EPSILON = 0.1  # what an ε in the denominator may cost at most, or it is no ε


@dataclass(frozen=True)
class Slip:
    """A vector that might have been taken for a map's input, one for each row: what it is called, what that means."""

    kind: str
    name: str
    vectors: tuple[Vector, ...]


@dataclass(frozen=True)
class Row:
    """One map at one token: its input x, what its change gives there, what the rule demands.

    ``left`` and ``right`` are the factors of a change of rank 1, ``vector`` a change of a scale or bias,
    ``turned`` what the transposed matrix gives.  ``mistaken`` are outputs that a mistake would give.
    """

    x: Vector
    given: Vector
    demand: Vector
    left: Vector | None = None
    right: Vector | None = None
    vector: Vector | None = None
    turned: Vector | None = None
    inputs: tuple[tuple[str, Vector], ...] = ()
    mistaken: tuple[tuple[str, str, Vector], ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Case:
    """A violated rule at one token.  ``shares`` belong to the rows of a mixture, which answer for one sum together."""

    rule: str
    parameter: str
    reads: str
    rows: tuple[Row, ...]
    given: Vector
    demand: Vector
    moved: bool = True
    transposed: bool = False
    shares: Vector | None = None
    candidates: tuple[Slip, ...] = ()
    lacks: str = ""  # what the whole sum lacks exactly, if it is one of its parts
    offset: float = 0.0
    relative: float = 0.0  # fit to rounding: relative to the vectors
    tolerance: float = 0.0  # and absolutely
    epsilon: float = 0.0
    noisy: bool = False
    strayed: bool = False  # the token goes to other experts than in the target run, though the router's rule holds

    @property
    def letter(self) -> str:
        """What the rule calls its input."""
        return letter(self.rule)

    @property
    def by_rule(self) -> str:
        """What to do instead: the rule's formula."""
        return f"{formula(self.rule)}, {self.letter} being {self.reads} in the patched run"

    def close(self, a: Vector, b: Vector) -> bool:
        """Whether two vectors agree to rounding."""
        room = self.relative * (largest(a) + largest(b)) + self.tolerance
        return a.shape == b.shape and bool(largest(a - b) <= room)

    def parallel(self, a: Vector, b: Vector) -> bool:
        """Whether a is a multiple of b ≠ 0, to rounding."""
        size = b @ b
        if size == 0 or a.shape != b.shape:
            return False
        return bool(largest(a - b * ((a @ b) / size)) <= self.relative * largest(a))


@dataclass(frozen=True)
class Mistake:
    """A mistake that fits: its kind, how the change looks, what to do."""

    kind: str
    how: str
    remedy: str = field(default="")


def recognise(case: Case) -> Mistake:
    """The first known mistake that fits.

    >>> import numpy as np
    >>> z, demand = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    >>> row = Row(z, -demand, demand, left=-demand / 25, right=z)
    >>> recognise(Case("I-linear", "W", "the block's input", (row,), -demand, demand, relative=1e-12)).kind
    'sign'
    """
    for hypothesis in HYPOTHESES:
        if (found := hypothesis(case)) is not None:
            return found
    off = largest(case.given - case.demand) / (largest(case.demand) or 1)
    held = demanded(case.rule).partition(" = ")[0]
    how = f"none of the known mistakes: {held} is {float(off):.2g} of what the rule demands away from it"
    return Mistake("unknown", how, case.by_rule)


def _rounding(case: Case) -> Mistake | None:
    if not case.noisy:
        return None
    how = "rounding: the rule may hold, but on these numbers rounding alone costs more than half of the digits"
    return Mistake("rounding", how, "take more precision, or another route (route='auto')")


def _not_moved(case: Case) -> Mistake | None:
    if case.moved and (any(map(_changes, case.rows)) or case.rows[0].label):
        return None
    where = " at this position" if case.moved else ""
    lost = f": nothing makes up for {case.lacks}" if case.lacks else ""
    how = f"the patch does not move {case.parameter}{where}{lost}"
    return Mistake("not-moved", how, f"add {case.by_rule}")


def _changes(row: Row) -> bool:
    return row.right is not None or bool(largest(row.given))


def _orientation(case: Case) -> Mistake | None:
    if case.transposed:
        fits = _holds(case, [row.given for row in case.rows])
        rest = "turned over it does what the rule demands" if fits else "and turned over it is still wrong"
        how = f"wrong orientation: the change has the shape of {case.parameter} transposed; {rest}"
        return Mistake("orientation", how, "transpose it" if fits else f"transpose it, and {case.by_rule}")
    if any(row.turned is None for row in case.rows) or not _holds(case, [row.turned for row in case.rows]):
        return None
    return Mistake("orientation", "wrong orientation: its transpose does what the rule demands", "transpose it")


def _holds(case: Case, effects: list[Any]) -> bool:
    """Whether the rule would hold if the rows gave ``effects``."""
    if case.shares is not None:
        return case.close(sum(s * e for s, e in zip(case.shares, effects, strict=True)), case.demand)
    return all(case.close(e, row.demand) for e, row in zip(effects, case.rows, strict=True))


def _skip(case: Case) -> Mistake | None:
    if not case.lacks:
        return None
    how = f"the output lacks exactly {case.lacks}: δ was computed without it"
    return Mistake("skip", how, f"put {case.lacks} into δ")


def _sign(case: Case) -> Mistake | None:
    if not _holds(case, [-row.given for row in case.rows]):
        return None
    return Mistake("sign", "the sign is flipped: it does the opposite of what the rule demands", "negate it")


def _mistaken(case: Case) -> Mistake | None:
    """One of the outputs that a known slip in δ or in the left factor would give."""
    if case.shares is not None or not all(row.mistaken for row in case.rows):
        return None
    for i, (kind, how, _) in enumerate(case.rows[0].mistaken):
        if all(case.close(row.given, row.mistaken[i][2]) for row in case.rows):
            return Mistake(kind, how, case.by_rule)
    return None


def _offset(case: Case) -> Mistake | None:
    """Gemma stores m − 1: the change was computed as if the stored numbers were the scale."""
    if not case.offset or any(row.vector is None for row in case.rows):
        return None
    for row in case.rows:
        target = dict(row.inputs).get("target", row.x)
        slips = [row.demand + case.offset * row.x, row.demand + case.offset * (row.x - target)]
        if not any(case.close(row.given, slip) for slip in slips):
            return None
    scale = f"{case.offset:g} + {case.parameter}"
    how = f"forgotten offset: the scale is {scale}, the change takes the stored numbers for it"
    return Mistake("offset", how, f"compute with the effective scale m = {scale}")


def _gate_sum(case: Case) -> Mistake | None:
    """Each moved expert got δ/S' with one S', and Σ s_j of the moved ones is not S'."""
    if case.shares is None or largest(case.demand) == 0:
        return None
    size = case.demand @ case.demand
    moved = [(s, row) for s, row in zip(case.shares, case.rows, strict=True) if largest(row.given) > 0]
    if not moved:
        return None
    factor = (moved[0][1].given @ case.demand) / size
    if factor == 0 or not all(case.close(row.given, factor * case.demand) for _, row in moved):
        return None
    total, taken = float(sum(s for s, _ in moved)), float(1 / factor)
    if len(moved) == 1 and not _same(case, factor, 1):
        return None  # any factor would fit one expert
    how = (
        f"gate sum taken as {taken:.4g}: every moved expert got δ/{taken:.4g}, the shares of these experts add up to "
        f"S = {total:.4g}, so the output moves by {total / taken:.4g} of δ"
    )
    return Mistake("gate-sum", how, f"δ/S with S = {total:.4g}, or {formula(case.rule)}")


def _experts(case: Case) -> Mistake | None:
    """Experts that the token goes to have no change; in a sum one of them may carry all of it."""
    idle = [row for row in case.rows if row.label and not _changes(row)]
    needed = [row for row in idle if largest(row.demand) > 0] if case.shares is None else idle
    if not needed or (case.shares is not None and len(idle) < len(case.rows)):
        return None
    names = ", ".join(row.label for row in needed)
    how = f"the token goes to {', '.join(row.label for row in case.rows)}; there is no change of {names}"
    if case.strayed:
        how += " (the target run chose others: the choice is a tie that rounding decides)"
    return Mistake("experts", how, "move the experts that the patched run chooses")


def _vector(case: Case) -> Mistake | None:
    """The right factor is another vector than the map's input, or a scale was divided by another one."""
    live = [i for i, row in enumerate(case.rows) if row.right is not None]
    if not live:
        return _divisor(case)
    if all(case.parallel(case.rows[i].right, case.rows[i].x) for i in live):
        return None
    fits = [c for c in case.candidates if all(case.parallel(case.rows[i].right, c.vectors[i]) for i in live)]
    if not fits:
        return None

    def reaches(c: Slip) -> bool:
        return _holds(case, [_outer(row, w) for row, w in zip(case.rows, c.vectors, strict=True)])

    best = next(filter(reaches, fits), fits[0])
    left = "" if reaches(best) else _left(case, best)
    how = f"the right factor is {best.name}{left}; the rule takes {case.letter}, {case.reads} in the patched run"
    return Mistake(best.kind, how, case.by_rule)


def _left(case: Case, candidate: Slip) -> str:
    """What the left factor is, where it is not the rule's."""
    if case.shares is None:
        outer = [_outer(row, w) for row, w in zip(case.rows, candidate.vectors, strict=True)]
        for i, (kind, _, _) in enumerate(case.rows[0].mistaken):
            if kind in LEFT and all(case.close(o, r.mistaken[i][2]) for o, r in zip(outer, case.rows, strict=True)):
                return LEFT[kind]
        if all(case.parallel(row.left, row.demand) for row in case.rows if row.left is not None):
            return ", and not divided by its own norm squared"
    return ", and the left factor is not the rule's either"


LEFT = {
    "whole": ", and the left factor is the whole wanted output, not the change",
    "source-output": ", and δ counts from the output in the source run",
    "target-output": ", and δ is that of Theorem 1: the patch of the inner maps that goes with it is missing",
}


def _outer(row: Row, w: Vector) -> Vector:
    if row.left is None or row.right is None:
        return row.given
    return row.left * (row.right @ w)


def _divisor(case: Case) -> Mistake | None:
    if any(row.vector is None for row in case.rows) or case.rule not in DIVIDING:
        return None
    for c in case.candidates:
        if all(case.close(row.vector * w, row.demand) for row, w in zip(case.rows, c.vectors, strict=True)):
            how = f"it was divided by {c.name}; the rule divides by {case.letter}, {case.reads} in the patched run"
            return Mistake(c.kind, how, case.by_rule)
    return None


def _factors(case: Case) -> list[Any] | None:
    """c of every row with given = c · demand; None where they are not parallel, or nothing is demanded."""
    pairs = [(case.given, case.demand)] if case.shares is not None else [(r.given, r.demand) for r in case.rows]
    found = []
    for given, demand in pairs:
        size = demand @ demand
        c = (given @ demand) / size if size else 0
        if c == 0 or not case.close(given, c * demand):
            return None
        found.append(c)
    return found


def _norm(case: Case) -> Mistake | None:
    """The right factor is the input, divided by the wrong number."""
    factors = _factors(case)
    if factors is None or case.shares is not None or not all(_on_input(case, row) for row in case.rows):
        return None
    z, n = case.letter, case.rows[0].x.size
    slips: list[tuple[str, Callable[[Row], Any], int]] = [
        (f"‖{z}‖", lambda row: row.x @ row.x, 2),
        ("1 (it was not divided)", lambda row: row.x @ row.x, 1),
        (f"the mean of {z}²", lambda row: n, 1),
    ]
    for run in ("target", "source"):
        mark = "'" if run == "target" else ""
        slips.append((f"‖{z}{mark}‖² of the {run} run", lambda row, run=run: _ratio(row, run), 1))
    for name, value, power in slips:
        if all(_same(case, c**power, value(row)) and c > 0 for c, row in zip(factors, case.rows, strict=True)):
            reached = f"it reaches {float(factors[0]):.4g} of the change"
            return Mistake("norm", f"divided by {name} where the rule divides by ‖{z}‖²: {reached}", case.by_rule)
    return None


def _on_input(case: Case, row: Row) -> bool:
    return row.right is not None and case.parallel(row.right, row.x)


def _ratio(row: Row, run: str) -> Any:
    other = dict(row.inputs).get(run)
    return 0 if other is None or not largest(other) else (row.x @ row.x) / (other @ other)


def _same(case: Case, a: Any, b: Any) -> bool:
    # a number that was measured through the demand cannot be known better than the demand is
    room = case.relative + case.tolerance / float(largest(case.demand) or 1)
    return bool(abs(a - b) <= room * (abs(a) + abs(b))) and b != 0


def _small_epsilon(case: Case) -> Mistake | None:
    factors = _factors(case)
    if factors is None or case.shares is not None or not all(_on_input(case, row) for row in case.rows):
        return None
    if not all(1 - SMALL_EPSILON < c < 1 for c in factors):
        return None
    z, c, x = case.letter, factors[0], case.rows[0].x
    eps = float((x @ x) * (1 - c) / c)
    how = (
        f"as if ε = {eps:.2g} were added to ‖{z}‖² in the denominator: it reaches 1 − {float(1 - c):.1e} of the change, "
        "approximately right by design"
    )
    return Mistake("epsilon", how, f"leave ε out: {case.letter} ≠ 0 is the rule's only condition")


def _factor(case: Case) -> Mistake | None:
    factors = _factors(case)
    if factors is None:
        return None
    reached = ", ".join(dict.fromkeys(f"{float(c):.4g}" for c in factors))
    share = f"moves by {reached}" if any(abs(c) > 1 for c in factors) else f"reaches only {reached}"
    live = [row for row in case.rows if row.right is not None]
    if live and not all(_on_input(case, row) for row in live):
        how = (
            f"the left factor is right, the right factor is not {case.letter}, {case.reads}, nor a value at another "
            f"node of this block: it reaches {reached} of the change"
        )
        return Mistake("other-vector", how, case.by_rule)
    return Mistake("factor", f"the right direction, but it {share} of the change", case.by_rule)


def _precision(case: Case) -> Mistake | None:
    if not 0 < case.epsilon < 1e-10:
        return None
    error, size = largest(case.given - case.demand), largest(case.demand)
    if not (error <= case.tolerance * (FLOAT32 / case.epsilon) and error <= 100 * FLOAT32 * size):
        return None
    how = "right to about seven digits: it is off by as much as computing it in float32 would make it"
    return Mistake("precision", how, "compute it in float64")


HYPOTHESES: tuple[Callable[[Case], Mistake | None], ...] = (
    _rounding, _not_moved, _orientation, _skip, _sign, _mistaken, _offset, _experts, _gate_sum,
    _vector, _norm, _small_epsilon, _factor, _precision,
)  # fmt: skip
