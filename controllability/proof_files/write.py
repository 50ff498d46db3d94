"""A proof as JSON-ready data: everything that a checker needs to go through it again (docs/proof-format.md)."""

from collections.abc import Iterable
from typing import Any

from controllability.errors import within_depth
from controllability.interfaces import Condition, Place
from controllability.proof_files.codec import encode
from controllability.prover.derivation import Derivation
from controllability.rules import Step

FORMAT = {"name": "controllability proof", "version": 1}
SAID = ("side", "statement", "when", "patch", "source")  # of a rule


def place_dict(place: Place) -> dict[str, Any]:
    """Where a node stands: the child indices from the root, and which parts of a sequence it is about.

    ``length`` is null where the component at ``path`` cannot be cut between its parts.
    """
    length = len(place.component.children()) if place.component.sequential else None
    return {"path": list(place.path), "start": place.start, "length": length}


def node_dict(step: Step) -> dict[str, Any]:
    """What one node says itself, the nodes below it aside."""
    rule, update = step.rule, step.update
    return {
        "rule": rule.name, **{name: getattr(rule, name) for name in SAID}, "component": step.place.describe(),
        **place_dict(step.place), "moved": sorted(map(str, step.moved)), "conditions": conditions_list(step.conditions),
        "cost": step.cost, "note": step.printed_note,
        "steering": None if update is None else {"rule": update.rule(rule.side), "parameter": str(update.param)},
    }  # fmt: skip


def step_dict(step: Step) -> dict[str, Any]:
    """One node of the tree, with everything below it."""
    return node_dict(step) | {"premises": [step_dict(p) for p in step.premises]}


def conditions_list(conditions: Iterable[Condition]) -> list[dict[str, str]]:
    """Side conditions, each with where it is made."""
    return [{"statement": c.statement, "where": c.where} for c in conditions]


@within_depth
def proof_dict(proof: Derivation) -> dict[str, Any]:
    """The proof: format, block, options, the tree, every side condition of it, and the alternatives' trees."""
    return {
        "format": dict(FORMAT), "verdict": "patchable", "via": proof.via, "route": proof.route, "frozen": sorted(proof.frozen),
        **({"jointly": True, "most": proof.max_tokens} if proof.jointly else {}), "level": "derived",
        "block": encode(proof.block), "tree": step_dict(proof.root), "conditions": conditions_list(proof.conditions),
        "rules": list(proof.rules), "alternatives": [step_dict(step) for step in proof.alternatives],
    }  # fmt: skip
