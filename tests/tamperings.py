"""What can be wrong with a written proof: the changes, the node or path that must be named, and what is said of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import controllability as ct


def through_text(proof: ct.Proof) -> Any:
    return json.loads(json.dumps(proof.to_dict(), allow_nan=False))


def at(data: Any, *path: int) -> Any:
    """The node that stands below the root at these premises."""
    node = data["tree"]
    for index in path:
        node = node["premises"][index]
    return node


def branch(data: Any) -> Any:
    return data["block"]["fields"]["terms"][1]["fields"]["parts"]


GATE, UP, NORMED, DOWN = (0, 0, 0, 0), (0, 0, 1), (1,), (1, 0)  # of Gemma 3: gate, up, m∘n∘down, down


def renamed(data: Any, old: str, new: str) -> None:
    text = json.dumps(data).replace(old, new)
    data.clear()
    data.update(json.loads(text))
    for node in walk(data["tree"], *data["alternatives"]):
        node["moved"] = sorted(set(node["moved"]))


def walk(*nodes: Any) -> Any:
    for node in nodes:
        yield node
        yield from walk(*node["premises"])


WRONG = {  # name: (how the JSON of Gemma 3's proof is changed, the node that is named, what is said)
    "a condition is dropped": (lambda d: at(d, *DOWN)["conditions"].pop(), r"tree\.premises\[1\]\.premises\[0\] \(O-linear", r"conditions is \[\]"),
    "a condition is weakened": (lambda d: at(d, *DOWN)["conditions"][0].update(statement="true"), r"premises\[1\]\.premises\[0\] \(O-linear", "conditions is"),
    "a condition stands elsewhere": (lambda d: at(d, *GATE)["conditions"][0].update(where="linear x"), r"premises\[0\]\.premises\[0\]\.premises\[0\]\.premises\[0\] \(I-linear", "conditions is"),
    "another parameter moves": (lambda d: at(d, *DOWN).update(moved=["mlp.up_proj.weight"]), r"premises\[1\]\.premises\[0\] \(O-linear", r"moved is \['mlp.up"),
    "a move is not told at the root": (lambda d: d["tree"]["moved"].remove("mlp.up_proj.weight"), r"^tree \(theorem-1", "moved is"),
    "a move is not told on the way": (lambda d: at(d, *NORMED)["moved"].remove("mlp.down_proj.weight"), r"^tree\.premises\[1\] \(O-normalised", "moved is"),
    "premises in another order": (lambda d: d["tree"]["premises"].reverse(), r"^tree \(theorem-1", "does not conclude"),
    "a premise too few": (lambda d: at(d, 0, 0)["premises"].pop(), r"^tree\.premises\[0\]\.premises\[0\] \(I-combine", "does not conclude"),
    "a premise twice": (lambda d: at(d, *NORMED)["premises"].append(at(d, *DOWN)), r"^tree\.premises\[1\] \(O-normalised", "does not conclude"),
    "a premise of another place": (lambda d: at(d, 0, 0)["premises"].__setitem__(1, copy.deepcopy(at(d, *GATE))), r"\(I-combine", "does not conclude"),
    "a premise too many": (lambda d: at(d, *DOWN)["premises"].append(at(d, *UP)), r"\(O-linear", "does not conclude"),
    "another rule": (lambda d: at(d, *DOWN).update(rule="O-bias"), r"premises\[1\]\.premises\[0\] \(O-bias", "does not conclude"),
    "a rule of the same shape": (lambda d: at(d, 0).update(rule="I-after"), r"^tree\.premises\[0\] \(I-after", "does not conclude"),
    "a theorem for the other route": (lambda d: d["tree"].update(rule="theorem-1b"), r"^tree \(theorem-1b", "does not conclude"),
    "another theorem was asked for": (lambda d: d.update(via="output"), r"^tree \(theorem-1 ", "does not conclude"),
    "a route that moves the scale alone": (lambda d: d.update(route="scale"), r"^tree\.premises\[1\] \(O-normalised", "does not conclude"),
    "a route that leaves the scale": (lambda d: d.update(route="ball"), r"^tree\.premises\[1\] \(O-normalised", "moved is"),
    "a route with another condition": (lambda d: d.update(route="uniform"), r"^tree\.premises\[1\] \(O-normalised", "conditions is"),
    "a frozen matrix moves": (lambda d: d.update(frozen=["mlp.down_proj.weight"]), r"\(O-linear", "may not move"),
    "a frozen scale moves": (lambda d: d.update(frozen=["post_feedforward_layernorm.weight"]), r"\(O-normalised", "moved is"),
    "gate and up are tied": (lambda d: renamed(d, "up_proj", "gate_proj"), r"^tree\.premises\[0\]\.premises\[0\] \(I-combine", "is used twice"),
    "up and down are tied": (lambda d: renamed(d, "up_proj", "down_proj"), r"^tree \(theorem-1 ", "is used twice"),
    "the skip reads what moves": (lambda d: renamed(d, "mlp.gate_proj.weight", "pre_feedforward_layernorm.weight"), r"^tree\.premises\[0\] \(I-before", "is used twice"),
    "another steering": (lambda d: at(d, *DOWN)["steering"].update(parameter="mlp.up_proj.weight"), r"\(O-linear", "steering is"),
    "no steering": (lambda d: at(d, *GATE).update(steering=None), r"\(I-linear", "steering is None"),
    "a lower cost": (lambda d: d["alternatives"][-1].update(cost=0), r"^alternatives\[\d+\] \(theorem-1 ", "cost is 0"),
    "another note": (lambda d: at(d, *NORMED).update(note="route ball"), r"\(O-normalised", "note is route ball"),
    "the rule's words": (lambda d: at(d, *DOWN).update(when="always"), r"\(O-linear", "when is always"),
    "the component's words": (lambda d: at(d, *DOWN).update(component="linear W"), r"\(O-linear", "component is linear W"),
    "another place": (lambda d: at(d, *GATE).update(path=at(d, *UP)["path"]), r"\(I-linear", "component is linear mlp.gate"),
    "another part of the sequence": (lambda d: at(d, *NORMED).update(start=2), r"\(O-normalised", "does not conclude"),
    "a split elsewhere": (lambda d: at(d, 0).update(length=2), r"^tree\.premises\[0\] \(I-before", "does not conclude"),
    "a map with a bias": (lambda d: branch(d)[3]["fields"].update(bias={"class": "Param", "fields": {"name": "b", "shape": [], "index": []}}) or at(d, *DOWN).update(rule="O-bias"), r"\(O-bias", "is"),
    "a norm that is no RMSNorm": (lambda d: branch(d)[4]["fields"].update(kind="layer"), r"\(O-normalised", "does not conclude"),
    "a proof of a part": (lambda d: d.update(tree=at(d, 0)), r"^tree \(I-before\): it concludes the input side of normalise", "the whole block"),
    "a proof of the output side": (lambda d: d["alternatives"].append(at(d, *NORMED)), r"^alternatives\[\d+\] \(O-normalised\): it concludes the output side", "the whole block"),
    "an alternative is changed": (lambda d: d["alternatives"][1]["premises"][1].update(note="g"), r"^alternatives\[1\]\.premises\[1\] \(", "note is"),
    "the list of conditions": (lambda d: d["conditions"].pop(), r"^conditions: the tree has", "the file says"),
    "the list of rules": (lambda d: d["rules"].append("O-bias"), r"^rules: the tree has", "the file says"),
}  # fmt: skip

ILL_FORMED = {  # name: (the change, the JSON path, what was expected)
    "no such rule": (lambda d: at(d, 0).update(rule="I-magic"), r"tree\.premises\[0\]\.rule: ", "expected one of I-linear, "),
    "no such side of a rule": (lambda d: at(d, *DOWN).update(side="input"), r"tree\.premises\[1\]\.premises\[0\]\.side: ", "expected output"),
    "a later version": (lambda d: d["format"].update(version=2), r"format\.version: ", "expected 1, the only one"),
    "another format": (lambda d: d["format"].update(name="proof"), r"format\.name: ", "expected 'controllability proof'"),
    "no format": (lambda d: d.pop("format"), "format: ", "missing"),
    "a refusal": (lambda d: d.update(verdict="refused"), "verdict: ", "expected patchable"),
    "a verdict of one's own": (lambda d: d.update(verdict="proved"), "verdict: ", "expected patchable"),
    "a level of one's own": (lambda d: d.update(level="certain"), "level: ", "expected derived or symbolic"),
    "no such theorem": (lambda d: d.update(via="magic"), "via: ", "expected input-output or output"),
    "no such route": (lambda d: d.update(route="short"), "route: ", "expected auto or balanced"),
    "no such frozen parameter": (lambda d: d.update(frozen=["x"]), "frozen: ", "parameters of the block"),
    "a surplus key": (lambda d: d["tree"].update(trust=True), r"tree\.trust: ", "not expected"),
    "a missing key": (lambda d: at(d, *DOWN).pop("cost"), r"tree\.premises\[1\]\.premises\[0\]\.cost: ", "missing"),
    "true for a number": (lambda d: at(d, *DOWN).update(cost=True), r"\.cost: ", "expected an integer"),
    "a negative cost": (lambda d: at(d, *DOWN).update(cost=-1), r"\.cost: ", "expected an integer from 0"),
    "a text for a list": (lambda d: d["tree"].update(moved="w"), r"tree\.moved: ", "expected a list"),
    "a number among texts": (lambda d: d["tree"].update(moved=[1]), r"tree\.moved\[0\]: ", "expected a text"),
    "a premise that is none": (lambda d: d["tree"]["premises"].append(None), r"tree\.premises\[2\]: ", "expected an object"),
    "a path to nowhere": (lambda d: at(d, *GATE)["path"].append(7), r"\.path\[\d\]: ", "one of the 0 parts"),
    "a slice that is too long": (lambda d: at(d, *NORMED).update(length=9), r"tree\.premises\[1\]\.length: ", "at most 6 parts"),
    "a slice of no sequence": (lambda d: at(d, *DOWN).update(length=2), r"\.length: ", "start 0 and length null"),
    "no such class": (lambda d: branch(d)[3].update({"class": "os.system"}), r"block\.fields\.terms\[1\]\.fields\.parts\[3\]\.class: ", "expected a class of this package"),
    "a foreign class": (lambda d: branch(d).__setitem__(3, {"foreign": "Linear", "fields": {}}), r"parts\[3\]\.foreign: ", "passed in components="),
    "a missing field": (lambda d: branch(d)[3]["fields"].pop("layout"), r"parts\[3\]\.fields\.layout: ", "missing"),
    "a surplus field": (lambda d: branch(d)[3]["fields"].update(gain=1), r"parts\[3\]\.fields\.gain: ", "not expected"),
    "a number for a parameter": (lambda d: branch(d)[3]["fields"].update(weight=1), r"parts\[3\]\.fields\.weight: ", "expected a Param"),
    "no such layout": (lambda d: branch(d)[3]["fields"].update(layout="out"), r"\.layout: ", "expected one of out_in, in_out"),
    "no such activation": (lambda d: branch(d)[2]["fields"]["factors"][0]["fields"]["parts"][1]["fields"].update(name="magic"), r"factors\[0\]\.fields\.parts\[1\]: ", "unknown activation 'magic'"),
    "a text for a constant": (lambda d: branch(d)[0]["fields"].update(eps="1e-6"), r"parts\[0\]\.fields\.eps: ", "expected a number"),
    "a number that is none": (lambda d: branch(d)[0]["fields"].update(eps=float("nan")), r"parts\[0\]\.fields\.eps: ", "expected a number"),
    "code for a constant": (lambda d: branch(d)[0]["fields"].update(eps={"sympy": "__import__('os').getpid()"}), r"\.eps\.sympy: ", "a constant built of"),
    "a power without end": (lambda d: branch(d)[0]["fields"].update(eps={"sympy": "Pow(Integer(9), Integer(999999999))"}), r"\.eps\.sympy: ", "a constant built of"),
    "a fraction that can be reduced": (lambda d: branch(d)[0]["fields"].update(eps={"fraction": "2/4"}), r"\.eps\.fraction: ", "lowest terms"),
    "a fraction over nothing": (lambda d: branch(d)[0]["fields"].update(eps={"fraction": "1/0"}), r"\.eps\.fraction: ", "lowest terms"),
    "an unknown tag": (lambda d: branch(d)[0]["fields"].update(eps={"eval": "1"}), r"\.eps: ", "an object with one of class, foreign"),
    "a slice from behind": (lambda d: branch(d)[3]["fields"]["weight"]["fields"].update(index=[{"slice": [-4, 0, None]}]), r"\.index\[0\]\.slice: ", "integers from 0 on"),
    "a sequence in a sequence": (lambda d: branch(d).__setitem__(slice(0, 2), [{"class": "Sequence", "fields": {"parts": branch(d)[:2]}}]), "block: ", "no sequence stands inside"),
    "a block that is a parameter": (lambda d: d.update(block=branch(d)[3]["fields"]["weight"]), "block: ", "expected a component"),
}  # fmt: skip
