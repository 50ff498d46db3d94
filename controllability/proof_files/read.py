"""A written proof, rebuilt and checked node by node, without search.

A node is accepted when its rule, given nothing but the accepted premises of this very node, concludes exactly
what the node says.  The rebuilt proof consists of the rules' own conclusions: a file chooses among them and adds
nothing.  ``BadInput`` is for data that is no proof, ``NotVerified`` for a proof that is wrong.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from controllability.checks import LEVELS
from controllability.errors import BadInput, NotVerified, within_depth
from controllability.interfaces import Component, Place
from controllability.proof_files.codec import decode, encode, keys, one_of, shaped, short, wrong
from controllability.proof_files.recheck import CONDITIONS, CheckOptions, checked
from controllability.proof_files.write import FORMAT, proof_dict
from controllability.prover.derivation import Derivation
from controllability.prover.search import Via
from controllability.rules import Step
from controllability.solvers.norm_scale import ROUTES
from controllability.texts import STDIN, read_text

LARGEST = 64  # MiB of a file
PROOF = {
    "format": dict, "verdict": str, "via": str, "route": str, "frozen": [str], "level": str, "block": dict, "tree": dict,
    "conditions": CONDITIONS, "rules": [str], "alternatives": list,
}  # fmt: skip
MANY = {"jointly": bool, "most": dict}  # of a joint proof only
# what the command line adds: no part of the proof
BESIDE = {"name": str, "checks": list, "summary": str, "references": dict}


@within_depth
def derivation_from_dict(data: Any, components: Iterable[type] = ()) -> Derivation:
    """The derivation that ``Proof.to_dict`` wrote, every node checked.  ``components``: the block's classes that are not ours.

    Raises ``BadInput`` with the JSON path of what is no proof, and ``NotVerified`` with the node that does not follow.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.proof import prove
    >>> data = prove(residual(Linear(Param("up")) >> Linear(Param("down")))).to_dict()
    >>> derivation_from_dict(data).rules
    ('theorem-1', 'I-linear', 'O-linear')
    >>> data["tree"]["premises"][1]["moved"] = ["up"]
    >>> derivation_from_dict(data)
    Traceback (most recent call last):
    controllability.errors.NotVerified: tree.premises[1] (O-linear at linear down): moved is ['up'], by the rule ['down']
    """
    _head(data)
    block = _block(data["block"], _by_name(components))
    known = {str(p) for p in block.parameters()} | {p.name for p in block.parameters()}
    if data["frozen"] != sorted(known & set(data["frozen"])):
        expected = f"parameters of the block, each once and in order, out of {', '.join(sorted(known))}"
        raise wrong("frozen", expected, data["frozen"])
    given = CheckOptions.of(block, data["via"], data["route"], frozenset(data["frozen"]), data.get("jointly", False))
    root = _root(data["tree"], "tree", block, given)
    others = tuple(_root(tree, f"alternatives[{i}]", block, given) for i, tree in enumerate(data["alternatives"]))
    proof = Derivation(block, root, others, given.via, given.route, given.frozen, given.jointly)
    written = proof_dict(proof)
    for key in ("conditions", "rules", "most"):
        if data.get(key) != written.get(key):
            raise NotVerified(f"{key}: the tree has {short(written.get(key))}, the file says {short(data.get(key))}")
    return proof


def _head(data: Any) -> None:
    """Is this a proof, in a format that is known, with options that there are?"""
    if isinstance(data, dict) and data.get("verdict") == "refused":
        raise wrong("verdict", "patchable (a refusal holds no proof)", "refused")
    keys(data, "", PROOF, MANY | BESIDE)
    keys(data["format"], "format", FORMAT)
    for key, value in FORMAT.items():
        if data["format"][key] != value or type(data["format"][key]) is not type(value):
            raise wrong(f"format.{key}", f"{value!r}, the only one that is known", data["format"][key])
    for key, shape in (PROOF | MANY | BESIDE).items():
        if key in data:
            shaped(data[key], shape, key)
    if not data.get("jointly", True):
        raise wrong("jointly", "true, or to be left out", False)
    for key, known in (("verdict", ("patchable",)), ("via", get_args(Via)), ("route", ROUTES), ("level", LEVELS)):
        one_of(data[key], known, key)


def _block(data: Any, foreign: Mapping[str, type]) -> Component:
    block = decode(data, "block", foreign)
    if not isinstance(block, Component):
        raise wrong("block", "a component", block)
    if _text(encode(block)) != _text(data):
        raise BadInput("block: expected the form in which it is written, in which no sequence stands inside a sequence")
    return block


def _root(data: Any, where: str, block: Component, given: CheckOptions) -> Step:
    step = checked(data, where, block, given)
    if step.place != Place(block) or step.rule.side != "input":
        about = f"the {step.rule.side} side of {short(step.place.describe())}"
        raise NotVerified(
            f"{where} ({step.rule.name}): it concludes {about}; wanted is the input side of the whole block"
        )
    return step


def _by_name(components: Iterable[type]) -> dict[str, type]:
    found: dict[str, type] = {}
    for cls in components:
        if not isinstance(cls, type) or found.setdefault(cls.__name__, cls) is not cls:
            raise BadInput(f"components takes classes of different names, got {cls!r}")
    return found


def _text(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def read_proof_file(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file, or on standard input ("-"), at most 64 MiB; not checked yet.  Raises ``BadInput``."""
    path = Path(path)
    if str(path) != STDIN and not os.path.isfile(path):
        there = os.path.exists(path)
        why = "not a file; controllability prove NAME --json writes one" if there else "there is no such file"
        raise BadInput(f"{path}: {why}")
    text = read_text(path, "the proof", LARGEST)
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {short(error)}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: expected one JSON object, got {type(data).__name__}")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(data := dict(pairs)) != len(pairs):
        raise ValueError("an object names a key twice")
    return data


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
