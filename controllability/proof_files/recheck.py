"""The checker of one node: its rule is applied again, with the accepted premises of this node and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from controllability.errors import NotVerified
from controllability.interfaces import Component, Param, Path, Place
from controllability.proof_files.codec import one_of, shaped, short, wrong
from controllability.proof_files.write import node_dict, place_dict
from controllability.prover.search import per_expert_leaves, scales_of_norms
from controllability.rules import RULES, Attempt, Rule, Side, Step

CONDITIONS = [{"statement": str, "where": str}]
NODE = {
    "rule": str, "side": str, "statement": str, "when": str, "patch": str, "source": str, "component": str,
    "path": [int], "start": int, "length": (int, None), "moved": [str], "conditions": CONDITIONS, "cost": int,
    "note": str, "steering": ({"rule": str, "parameter": str}, None), "premises": list,
}  # fmt: skip


@dataclass
class CheckOptions:
    """What a rule may ask while one node is checked: the options, and this node's own premises."""

    via: str
    route: str
    frozen: frozenset[str]
    normalised: frozenset[Path]
    per_expert_rows: frozenset[Path]
    jointly: bool = False
    premises: tuple[Step, ...] = ()

    @staticmethod
    def of(block: Component, via: str, route: str, frozen: frozenset[str], jointly: bool = False) -> "CheckOptions":
        """The options of a proof, with what its rules ask about the whole block."""
        per_expert_rows = per_expert_leaves(block, (), False, False, 1)[0]
        return CheckOptions(via, route, frozen, frozenset(scales_of_norms(block)), frozenset(per_expert_rows), jointly)

    def is_frozen(self, param: Param) -> bool:
        """Whether a parameter must not move."""
        return param.name in self.frozen or str(param) in self.frozen

    def attempt(self, place: Place, side: Side) -> Attempt:
        """The accepted premise at this place, if there is one; never a search."""
        return Attempt([p for p in self.premises if p.rule.side == side and p.place == place])


def checked(data: Any, where: str, block: Component, given: CheckOptions) -> Step:
    """The conclusion of one node, drawn again from its premises."""
    shaped(data, NODE, where)
    rule, place = _rule(data, where), _place(data, where, block)
    if rule.jointly not in (None, given.jointly):
        served = "one patch for many tokens, and the proof is of a patch for each"
        served = served if rule.jointly else "each token with its own patch, and the proof is of one for many"
        raise NotVerified(f"{where} ({rule.name} at {short(place.describe())}): it serves {served}")
    below = enumerate(data["premises"])
    premises = tuple(checked(premise, f"{where}.premises[{i}]", block, given) for i, premise in below)
    found = rule.conclude(place, replace(given, premises=premises))
    stated = {key: value for key, value in data.items() if key != "premises"}
    differences = []
    for step in found.steps:
        if len(step.premises) == len(premises) and all(a is b for a, b in zip(step.premises, premises, strict=True)):
            differences.append(_differences(node_dict(step), stated))
            if not differences[-1]:
                return step
    objections = [f.reason for f in found.failures if f.weight]  # used twice, frozen, another route: not "no premise"
    reasons = min(differences, key=len, default=[])[:1] or dict.fromkeys(objections)
    why = "; ".join(reasons) or "the rule does not conclude this from these premises"
    raise NotVerified(f"{where} ({rule.name} at {short(place.describe())}): {why}")


def _differences(ours: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """In which words of a node the file and the rule differ."""
    different = [key for key in ours if ours[key] != stated[key]]
    return [f"{key} is {short(stated[key])}, by the rule {short(ours[key])}" for key in different]


def _rule(data: Mapping[str, Any], where: str) -> Rule:
    named = [rule for rule in RULES if rule.name == data["rule"]]
    if not named:
        raise wrong(f"{where}.rule", f"one of {', '.join(dict.fromkeys(r.name for r in RULES))}", data["rule"])
    one_of(data["side"], tuple(rule.side for rule in named), f"{where}.side")
    return next(rule for rule in named if rule.side == data["side"])


def _place(data: Mapping[str, Any], where: str, block: Component) -> Place:
    """The place that a node is about; its parts of a sequence cut out."""
    component = block
    for i, index in enumerate(data["path"]):
        parts = component.children()
        if index >= len(parts):
            raise wrong(f"{where}.path[{i}]", f"one of the {len(parts)} parts of {short(component.describe())}", index)
        component = parts[index]
    place, start, length = Place(component, tuple(data["path"])), data["start"], data["length"]
    if component.sequential:
        count = len(component.children())
        if length is None or length < 2 or start + length > count:
            raise wrong(f"{where}.length", f"at least 2 and, with start {start}, at most {count} parts", length)
        return place if length == count else place.slice(start, start + length)
    if place_dict(place) != {k: data[k] for k in ("path", "start", "length")}:
        raise wrong(f"{where}.length", "start 0 and length null, because no sequence stands here", (start, length))
    return place
