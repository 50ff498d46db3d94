"""docs/proof.schema.json, from the annotations of the classes and the table of rules.

``python tests/proof_schema.py`` writes it anew, after a component or a rule was added.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from controllability.checks import LEVELS
from controllability.interfaces import Component
from controllability.proof_files.codec import own_classes
from controllability.proof_files.read import BESIDE, MANY
from controllability.rules import RULES
from controllability.solvers.norm_scale import ROUTES

SCHEMA = Path(__file__).parent.parent / "docs" / "proof.schema.json"


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def schema_of(hint: Any) -> dict[str, Any]:
    """An annotation of a field as JSON Schema."""
    inside = get_args(hint)
    if hint is Any or hint is float:
        return ref("constant")
    if get_origin(hint) is Literal:
        return {"enum": [*inside]}
    if get_origin(hint) in (Union, UnionType):
        return {"anyOf": [schema_of(one) for one in inside]}
    if get_origin(hint) is tuple:
        if inside[-1] is Ellipsis:
            return {"type": "array", "items": schema_of(inside[0])}
        return {
            "type": "array",
            "prefixItems": [*map(schema_of, inside)],
            "minItems": len(inside),
            "maxItems": len(inside),
        }
    plain = {int: "integer", str: "string", bool: "boolean", NoneType: "null"}
    if hint in plain:
        return {"type": plain[hint]}
    return ref({Component: "component", slice: "slice"}.get(hint) or hint.__name__)


def record(properties: dict[str, Any], *optional: str, **more: Any) -> dict[str, Any]:
    required = [k for k in properties if k not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False} | more


def schema_of_class(cls: type) -> dict[str, Any]:
    hints, found = get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        found[f.name] = schema_of(hints[f.name])
        if f.default is None and "anyOf" not in found[f.name]:
            found[f.name] = {"anyOf": [found[f.name], {"type": "null"}]}
    return record(
        {"class": {"const": cls.__name__}, "fields": record(found)}, title=str(cls.__doc__).strip().splitlines()[0]
    )


def of_class(name: str) -> dict[str, Any]:
    """One branch for each class: a validator then tells what is wrong with that one."""
    return {"if": {"properties": {"class": {"const": name}}, "required": ["class"]}, "then": ref(name)}


def written_schema() -> dict[str, Any]:
    """The whole schema: from the classes' own annotations and the table of rules."""
    text, texts = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
    natural, nodes = {"type": "integer", "minimum": 0}, {"type": "array", "items": ref("node")}
    conditions = {"type": "array", "items": ref("condition")}
    leaves = [name for name, cls in own_classes().items() if issubclass(cls, Component)]
    tagged = {tag: record({tag: text}) for tag in ("fraction", "sympy")}
    tagged |= {
        "float": record({"float": {"enum": ["inf", "-inf"]}}),
        "opaque": record({"opaque": text}, title="Could not be written: such a proof cannot be rebuilt"),
    }
    foreign = record(
        {"foreign": text, "fields": {"type": "object", "additionalProperties": ref("value")}},
        title="A class that is not of this package",
    )
    others = {"anyOf": [foreign, tagged["opaque"]]}
    known = {"if": {"required": ["class"]}, "then": {"properties": {"class": {"enum": leaves}}}, "else": others}
    plain = [{"type": t} for t in ("null", "boolean", "string", "number")]
    node = {
        "rule": {"enum": [*dict.fromkeys(r.name for r in RULES)]}, "side": {"enum": ["input", "output", "through"]},
        "statement": text, "when": text, "patch": text, "source": text, "component": text,
        "path": {"type": "array", "items": natural}, "start": natural,
        "length": {"anyOf": [{"type": "integer", "minimum": 2}, {"type": "null"}]}, "moved": texts, "conditions": conditions, "cost": natural,
        "note": text, "steering": {"anyOf": [record({"rule": text, "parameter": text}), {"type": "null"}]}, "premises": nodes,
    }  # fmt: skip
    check = record({"rule": text, "status": {"enum": ["passed", "failed", "skipped"]}, "method": text}) | {
        "additionalProperties": True
    }
    top = {
        "format": record({"name": {"const": "controllability proof"}, "version": {"const": 1}}), "verdict": {"const": "patchable"},
        "via": {"enum": ["input-output", "output"]}, "route": {"enum": [*ROUTES]}, "frozen": texts, "jointly": {"const": True},
        "most": {"type": "object", "additionalProperties": {"anyOf": [text, natural]}}, "level": {"enum": [*LEVELS]},
        "block": ref("component"), "tree": ref("node"), "conditions": conditions, "rules": texts, "alternatives": nodes,
        "name": text, "checks": {"type": "array", "items": check}, "summary": text,
        "references": {"type": "object", "additionalProperties": text},
    }  # fmt: skip
    definitions = {
        "node": record(node), "condition": record({"statement": text, "where": text}),
        "slice": record({"slice": {"type": "array", "prefixItems": [{"anyOf": [natural, {"type": "null"}]}] * 2 + [{"type": "null"}], "minItems": 3, "maxItems": 3}}),
        "constant": {"anyOf": [{"type": "number"}, *tagged.values()]},
        "component": {"type": "object", "allOf": [known, *map(of_class, leaves)]},
        "value": {"anyOf": [*plain, *tagged.values(), ref("slice"), ref("component"), ref("Param"), ref("Routing"), {"type": "array", "items": ref("value")}]},
    }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A controllability proof, version 1",
        "description": "Explained in proof-format.md. Written by python tests/proof_schema.py.",
    } | record(top, *BESIDE, *MANY) | {"$defs": definitions | {name: schema_of_class(cls) for name, cls in own_classes().items()}}  # fmt: skip


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(written_schema(), indent=1, ensure_ascii=False) + "\n")
    sys.stderr.write(f"{SCHEMA} written\n")
