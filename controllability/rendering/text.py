"""A proof as a tree that fits a terminal."""

from __future__ import annotations

import textwrap

from controllability.proof import Proof
from controllability.rules import Step

WIDTH = 100


def proof_text(proof: Proof) -> str:
    """The tree, the side conditions, and what moves."""
    theorem = {"input-output": "Theorem 1", "output": "Theorem 1b"}[proof.via]
    lines = [f"patchable (derived), via {proof.via} ({theorem}), route {proof.route}", *_tree(proof.root, "", "")]
    lines += textwrap.wrap(
        "moves: " + ", ".join(sorted(map(str, proof.root.moved))), WIDTH, subsequent_indent="       "
    )
    conditions = list(dict.fromkeys(f"{c.statement}  [{c.where}]" for c in proof.conditions))
    lines.append("side conditions, tested on the numbers:" if conditions else "no side conditions")
    lines += [line for c in conditions for line in textwrap.wrap(f"- {c}", WIDTH, subsequent_indent="  ")]
    return "\n".join(lines)


def _tree(step: Step, lead: str, below: str) -> list[str]:
    text = f"{step.rule.name}: {_short(step)}"
    if step.steering is not None:
        text += f"   {step.rule.patch}"
    lines = textwrap.wrap(lead + text, WIDTH, subsequent_indent=below + "    ", drop_whitespace=False)
    for i, premise in enumerate(step.premises):
        last = i == len(step.premises) - 1
        lines += _tree(premise, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))
    return lines


def _short(step: Step) -> str:
    described = step.place.describe()
    room = WIDTH - 30
    return described if len(described) <= room else described[: room - 1] + "…"
