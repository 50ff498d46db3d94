"""Patches made by hand, right or wrong on purpose: a block with numbers and what its two runs have at every map."""

from __future__ import annotations

from typing import Any

import architectures
import controllability as ct
from controllability.execution.trace import Trace
from controllability.interfaces import leaves, node

VIAS = ("input-output", "output")
SIZES = {"d": 6, "h": 9}

# block: (a matrix of the inner function, one of the outer); a mixture's are its router and its last maps
MATRICES = {
    "llama": ("mlp.gate_proj.weight", "mlp.down_proj.weight"),
    "gpt2": ("mlp.c_fc.weight", "mlp.c_proj.weight"),
    "gptj": ("mlp.fc_in.weight", "mlp.fc_out.weight"),
    "bert": ("intermediate.dense.weight", "output.dense.weight"),
    "gemma3": ("mlp.up_proj.weight", "mlp.down_proj.weight"),
    "mixtral": ("mlp.gate.weight", "mlp.experts.down_proj"),
}
PLAIN = ("llama", "gpt2", "gptj", "bert")  # a linear map ends the branch, nothing behind it in the sum


class Made:
    """A block with numbers, its right patch as dense arrays, and what the two runs have at every map."""

    def __init__(
        self, name: Any, via: Any = "input-output", seed=1, tokens: Any = (), route="auto", kind="numpy", **sizes
    ):
        self.block: Any = architectures.block(name) if isinstance(name, str) else name
        self.params, self.v, self.v_target = ct.sample(self.block, kind, seed, tokens, **(sizes or SIZES))
        self.patch: Any = ct.prove(self.block, via, route).construct(self.params, self.v, self.v_target)
        self.source = Trace(self.block, self.params, self.v)
        self.target = Trace(self.block, self.params, self.v_target)
        self.right = {name: self.stored(name, delta) for name, delta in self.patch.items()}
        self.run = Trace(self.block, self.patch.applied_to(self.params), self.v)  # with the right patch

    def stored(self, name, delta):
        """ΔW as the parameter is stored, token axes before it."""
        dense, shape = delta.dense(), self.params[name].shape
        return dense if dense.shape[-len(shape) :] == shape and len(dense) else dense.reshape(shape)

    def path(self, parameter):
        return next(p for p, leaf in leaves(self.block) if parameter in map(str, leaf.own_parameters()))

    def input(self, parameter, run="source"):
        return getattr(self, run).input(self.path(parameter))

    def matrix(self, parameter, left, right):
        """left rightᵀ as the parameter is stored."""
        dense = left[..., :, None] * right[..., None, :]
        return dense.swapaxes(-1, -2) if getattr(self.leaf(parameter), "layout", "") == "in_out" else dense

    def leaf(self, parameter):
        return node(self.block, self.path(parameter))

    def change(self, parameter):
        """W(z' − z) in numbers of the runs."""
        return self.target.output(self.path(parameter)) - self.source.output(self.path(parameter))

    def delta(self):
        """δ = s(v') − s(v)."""
        if isinstance(self.v, tuple):
            return sum(b - a for a, b in zip(self.v, self.v_target, strict=True))
        return self.v_target - self.v

    def verify(self, **wrong) -> Any:
        return self.check(self.right | wrong)

    def check(self, patch) -> Any:
        return ct.verify(self.block, self.params, patch, self.v, self.v_target)


def only(result, kind, rule, parameter) -> Any:
    """The one problem of a result, which must be this one; anything else only follows from it."""
    assert not result.ok
    assert result.residual > result.rounding
    assert [(p.kind, p.rule, p.parameter) for p in result.problems] == [(kind, rule, parameter)], str(result)
    return result.problems[0]


def square(x):
    """‖x‖² of every token, keeping the axis."""
    return (x * x).sum(-1, keepdims=True)


def inner_mistakes(made, w):
    """kind: the wrong ΔW of a matrix of the inner function."""
    z, z_target, change = made.input(w), made.input(w, "target"), made.change(w)
    whole = made.target.output(made.path(w))
    mistakes = {
        "target-vector": (change, z_target / square(z_target)),
        "target-vector, norm of z": (change, z_target / square(z)),
        "norm": (change, z / square(z_target)),
        "norm, not squared": (change, z / square(z) ** 0.5),
        "norm, none": (change, z),
        "norm, mean": (change, z / square(z) * z.shape[-1]),
        "whole": (whole, z / square(z)),
        "sign": (-change, z / square(z)),
        "epsilon": (change, z / (square(z) * (1 + 1e-3))),
        "factor": (change, 0.25 * z / square(z)),
        "tap-point": (change, (z_target - z) / square(z_target - z)),
    }
    return {kind: made.matrix(w, left, right) for kind, (left, right) in mistakes.items()}
