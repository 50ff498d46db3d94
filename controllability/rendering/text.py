"""A proof as a tree that fits the terminal."""

import os
import sys
import textwrap
from typing import TextIO

from controllability.errors import printable as printable, within_depth
from controllability.prover.derivation import Derivation
from controllability.rendering.tokens_served import reach
from controllability.rules import Step
from controllability.rules.references import references

WIDTH, NARROWEST = 100, 20  # columns of a line: also on wider, and on narrower terminals


@within_depth
def proof_text(proof: Derivation, width: int | None = None, level: str = "derived") -> str:
    """The tree, what moves, and the side conditions; ``width`` columns, those of the terminal if None; ``level`` as reached.

    >>> from controllability import prove
    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> print(proof_text(prove(residual(Linear(Param("W"))), via="output"), width=40))
    patchable (derived), via output (Theorem
    1b), route auto
    theorem-1b: identity + linear W
    └─ O-linear: linear W   ΔW = δ yᵀ/‖y‖²
    moves: W
    side conditions, tested on the numbers:
    - the input of W is not zero  [linear W]
    """
    width = terminal_width() if width is None else max(width, NARROWEST)
    theorem = {"input-output": "Theorem 1", "output": "Theorem 1b"}[proof.via]
    many = ", one patch for T tokens" if proof.jointly else ""
    lines = wrapped(f"patchable ({level}), via {proof.via} ({theorem}), route {proof.route}{many}", width)
    lines += _tree(proof.root, "", "", width)
    lines += wrapped("moves: " + ", ".join(sorted(map(str, proof.root.moved))), width, "", "       ")
    claims = dict.fromkeys(step.rule.claim for step in proof.root.walk() if step.rule.claim)
    lines += [line for claim in claims for line in wrapped(claim, width, "", "  ")]
    served = reach(proof)
    lines += wrapped("tokens in general position that one patch serves:", width) if served else []
    lines += [line for one in served for line in wrapped(f"- {one}", width, "", "  ")]
    conditions = list(dict.fromkeys(f"{c.statement}  [{c.where}]" for c in proof.conditions))
    lines += wrapped("side conditions, tested on the numbers:" if conditions else "no side conditions", width)
    lines += [line for c in conditions for line in wrapped(f"- {c}", width, "", "  ")]
    return "\n".join(lines)


def cited(proof: Derivation) -> dict[str, str]:
    """What the rules of a proof cite, by its key."""
    steps = [step for root in (proof.root, *proof.alternatives) for step in root.walk()]
    return references(" ".join(f"{step.rule.when} {step.rule.source}" for step in steps))


def terminal_width(stream: TextIO | None = None) -> int:
    """Columns that COLUMNS says, or of the terminal that ``stream`` (stdout) is, at most 100; 100 if neither is known."""
    columns = os.environ.get("COLUMNS", "")
    found = int(columns) if columns.isascii() and columns.isdigit() else 0
    if not found:
        try:
            stream = stream if stream is not None else sys.stdout
            if stream is not None and stream.isatty():
                found = os.get_terminal_size(stream.fileno()).columns
        except (ValueError, OSError):  # closed, or without a size
            found = 0
    return max(NARROWEST, min(found or WIDTH, WIDTH))


def wrapped(text: str, width: int, lead: str = "", below: str = "", whole: bool = False) -> list[str]:
    """The lines of ``text``, the first after ``lead``, the others after ``below``; names are not cut at hyphens, nor at all if ``whole``."""
    wrapper = textwrap.TextWrapper(width, lead, below, break_on_hyphens=False, break_long_words=not whole)
    return [line.rstrip() for line in wrapper.wrap(printable(text)) or [lead]]


def _tree(step: Step, lead: str, below: str, width: int, depth: int = 0) -> list[str]:
    rest = _cut(below, width, depth) + ("│   " if step.premises else "    ")
    lines = wrapped(f"{step.rule.name}: {_short(step, width)}", width, _cut(lead, width, depth), rest)
    if step.update is not None:
        formula = f"   {step.rule.patch}"
        if len(lines[-1]) + len(formula) <= width:
            lines[-1] += formula
        else:
            lines += wrapped(step.rule.patch, width, rest, rest)
    for i, premise in enumerate(step.premises):
        last = i == len(step.premises) - 1
        branch, bar = ("└─ ", "   ") if last else ("├─ ", "│  ")
        lines += _tree(premise, below + branch, below + bar, width, depth + 1)
    return lines


def _cut(lead: str, width: int, depth: int) -> str:
    """What stands before a step; where it would fill the line, its depth and the branches next to it."""
    room = width * 3 // 5
    if len(lead) <= room:
        return lead
    level = f"{depth}… "
    return level + lead[len(lead) - (room - len(level)) // 3 * 3 :]


def _short(step: Step, width: int) -> str:
    described, room = printable(step.place.describe()), max(width - 30, width // 2)
    return described if len(described) <= room else described[: room - 1] + "…"
