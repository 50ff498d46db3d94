"""A proof as JSON-ready data."""

from __future__ import annotations

from typing import Any

from controllability.proof import Proof
from controllability.rules import Step


def step_dict(step: Step) -> dict[str, Any]:
    """One node of the tree, with everything below it."""
    return {
        "rule": step.rule.name,
        "statement": step.rule.statement,
        "when": step.rule.when,
        "patch": step.rule.patch,
        "source": step.rule.source,
        "component": step.place.describe(),
        "path": list(step.place.path),
        "moved": sorted(map(str, step.moved)),
        "conditions": [{"statement": c.statement, "where": c.where} for c in step.conditions],
        "note": step.note,
        "premises": [step_dict(p) for p in step.premises],
    }


def proof_dict(proof: Proof) -> dict[str, Any]:
    """The proof: verdict, options, the tree, every side condition, and the alternatives' parameters."""
    return {
        "verdict": "patchable",
        "via": proof.via,
        "route": proof.route,
        "level": "derived",
        "tree": step_dict(proof.root),
        "conditions": [{"statement": c.statement, "where": c.where} for c in proof.conditions],
        "rules": list(proof.rules),
        "alternatives": [sorted(map(str, step.moved)) for step in proof.alternatives],
    }
