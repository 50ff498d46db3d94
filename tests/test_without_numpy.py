"""Proofs, refusals, their printing and the symbolic check where NumPy, SciPy, torch and matplotlib cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BLOCKED = """
import sys
for name in ("numpy", "scipy", "torch", "matplotlib"):
    sys.modules[name] = None
"""
ANSWERS = """
import json, re, sys
import architectures, controllability as ct, controllability.components as components
from controllability.components import *
from controllability.interfaces import Component, Param
from controllability.prover.edits import nodes
from controllability.rendering.html import proof_html, refusal_html

up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
first, norm = Linear(Param("first", ("d", "d"))), rms_norm("norm")
blocks = {name: architectures.block(name) for name in (
    "gemma3", "deepseek_v4", "apertus", "inkling2_text", "qwen4_exp", "bart", "falcon_mamba", "gemma3n", "hy_v4", "llama4", "dbrx", "gpt_oss",
)} | {
    "cap": residual(up >> SoftCap(30.0) >> down),
    "sparse": residual(up >> AboveMean(1.5) >> down),
    "blend": residual(Blend(first, Linear(Param("second", ("d", "d"))), Param("mix", (1, 1, "d"))) >> up >> Swish(1.702) >> down),
    "tanh": residual(up >> down >> Activation("tanh")),
    "tied": residual(first >> Activation("silu") >> first),
    "layer": residual(norm >> up >> Activation("silu") >> down >> Normalize("layer", 1e-5, "post")),
    "deep": residual(norm >> residual(up >> Activation("gelu") >> down) >> (first * Fixed(Linear(Param("gate", ("d", "d")))))),
}
asked = {"deep": {"via": "output"}, "cap": {"via": "output"}, "sparse": {"frozen": ["up"]}, "layer": {"route": "uniform"}}

def answer(name, block):
    try:
        proof = ct.prove(block, **asked.get(name, {}))
    except ct.NotControllable as refused:
        return [str(refused), refused.hint, refusal_html(name, block, refused)]
    rows = proof.check("symbolic")
    return [str(proof), proof.to_latex("symbolic"), proof_html(proof, name, "symbolic", rows), proof.to_dict(),
            rows]

found = {name: answer(name, block) for name, block in blocks.items()}
found = json.loads(re.sub(r" \\([\\d.]+ s\\)", "", json.dumps(found)))
kinds = {kind for kind in vars(components).values() if isinstance(kind, type) and issubclass(kind, Component)}
unseen = kinds - {type(part) for block in blocks.values() for _, part in nodes(block)}
joint = ct.prove(residual(up >> Activation("silu") >> down), jointly=True)
told = {}
for level, proof in (("exact", ct.prove(blocks["cap"], via="output")), ("symbolic", joint)):
    try:
        told[level] = [row["status"] for row in proof.check(level)]
    except ct.BadInput as error:
        told[level] = str(error)
loaded = [name for name in ("numpy", "scipy", "torch", "matplotlib") if sys.modules.get(name)]
print(json.dumps([found, sorted(map(str, unseen)), str(joint), told, loaded]))
"""


def answers(code: str) -> list:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def both() -> tuple[list, list]:
    return answers(BLOCKED + ANSWERS), answers(ANSWERS)


def test_the_answers_are_the_same_word_for_word(both):
    (without, unseen, joint, *_), (usual, _, usual_joint, *_) = both
    assert unseen == [], "a kind of component is in no block"
    for name, texts in usual.items():
        for one, other in zip(without[name], texts, strict=True):
            assert one == other, name
    assert joint == usual_joint


def test_each_outcome_is_among_them(both):
    """Of a comparison in which all is refused, or nothing is checked, nothing would follow."""
    found = both[0][0]
    refused = {name for name, texts in found.items() if len(texts) == 3}
    assert refused == {"tanh", "tied", "layer", "sparse"}
    rows = [row for texts in found.values() if len(texts) == 5 for row in texts[4]]
    assert len(rows) > 50
    assert {row["status"] for row in rows} == {"passed"}


def test_what_needs_arrays_says_so(both):
    told, usual = both[0][3], both[1][3]
    for level in ("exact", "symbolic"):
        assert told[level].startswith(f"level {level} of this proof computes with arrays of explicit size: ")
        assert "numpy" in told[level]
        assert set(usual[level]) == {"passed"}


def test_numpy_is_loaded_only_by_what_needs_it():
    code = "import sys\nimport controllability as ct, architectures\np = ct.prove(architectures.block('mixtral'))\np.to_latex()\np.check()\nprint([m for m in ('numpy', 'scipy', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
