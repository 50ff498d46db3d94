"""Blocks that one patch for many tokens is proved for, every joint rule on every side, and their joint proofs."""

from __future__ import annotations

import architectures
import controllability as ct
from controllability.components import Activation, Bias, ExpertLinear, Linear, Mixture, Routing, residual, rms_norm
from controllability.interfaces import Param
from controllability.rules import Step

up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
square, silu, tanh = Linear(Param("W", ("d", "d"))), Activation("silu"), Activation("tanh")
EXPERTS = Mixture(
    Linear(Param("R", ("E", "d"))), Routing(2), ExpertLinear(Param("U", ("E", "h", "d"))) >> silu, ExpertLinear(Param("V", ("E", "d", "h")))
)  # fmt: skip
BLOCKS = {  # every joint rule on every side
    "theorem 1": (residual(up >> silu >> down), {}),
    "vectors": (residual(rms_norm("pre") >> silu >> Bias(Param("b", ("d",)))), {}),
    "input bias": (residual(Linear(Param("up", ("h", "d")), Param("c", ("h",))) >> silu >> down), {"frozen": ["up"]}),
    "scale": (residual(square >> rms_norm("post")), {"via": "output", "frozen": ["W"]}),
    "experts": (residual(EXPERTS), {}),
    "experts, 1b": (residual(EXPERTS), {"via": "output"}),
    "normalised": (residual(square >> rms_norm("post")), {"via": "output"}),
    "normalised, through": (residual(EXPERTS >> rms_norm("post")), {}),
}
FAMILIES = ["llama", "gemma3", "gptj", "bert", "olmo2", "mixtral"]


def joint(name: str, via: str = "input-output") -> ct.Proof:
    return ct.prove(architectures.block(name), via=via, jointly=True)


def joint_steps(name: str) -> list[Step]:
    """The steps of one of ``BLOCKS``' proofs in which a joint rule stands."""
    block, options = BLOCKS[name]
    return [step for step in ct.prove(block, jointly=True, **options).root.walk() if step.rule.jointly]
