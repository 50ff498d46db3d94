"""Parts of the blocks that refusals are about, blocks and questions drawn at random, and asking for a proof in vain."""

from __future__ import annotations

import random

import pytest
from trees import Grower

import controllability as ct
from controllability.components import Activation, Linear
from controllability.interfaces import Param, leaves


def linear(name: str, out: str | int = "d", into: str | int = "d", bias: str = "") -> Linear:
    return Linear(Param(name, (out, into)), Param(bias, (out,)) if bias else None)


up, down = linear("up", "h", "d"), linear("down", "d", "h")
silu, tanh, relu, sigmoid = (Activation(name) for name in ("silu", "tanh", "relu", "sigmoid"))


def nodes(part: ct.Component) -> list[ct.Component]:
    return [part, *(node for child in part.children() for node in nodes(child))]


def refused(block: ct.Component, **options) -> ct.NotControllable:
    with pytest.raises(ct.NotControllable) as failed:
        ct.prove(block, **options)
    return failed.value


def drawn(seed: int):
    rng = random.Random(seed)
    grower = Grower(rng)
    block = grower.block(rng.randint(1, 4))
    frozen = frozenset(name for name in grower.values if rng.random() < 0.15)
    via = rng.choice(("input-output", "output"))
    if any(leaf.mixes for _, leaf in leaves(block)):
        via = "output"  # what mixes positions is not steered
    route = rng.choice(("auto", "auto", "scale", "secular", "uniform", "ball"))
    return grower, block, {"via": via, "route": route, "frozen": frozen & {p.name for p in block.parameters()}}
