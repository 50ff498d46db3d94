"""Mixtures of experts that the tests of mixtures share, random parameters and states for them, and their value by a loop."""

from __future__ import annotations

import numpy as np

import controllability as ct
from controllability.components import Activation, ExpertLinear, Glu, Linear, Mixture, Routing, Share, gated
from controllability.interfaces import Param

E, K, D, H, TOKENS = 6, 2, 5, 4, 7
SILU = Activation("silu")


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


CORRECTION, PER_EXPERT = Param("correction", ("E",)), Param("per_expert", ("E",))


def experts(name: str, out: str, into: str, bias: bool = False, **options) -> ExpertLinear:
    shape = ("E", into, out) if options.get("layout") == "in_out" else ("E", out, into)
    return ExpertLinear(Param(name, shape), Param(f"{name}_bias", ("E", out)) if bias else None, **options)


ROUTER = Linear(Param("R", ("E", "d")), Param("r", ("E",)))
TOP = Routing(K, renormalise=1)
PLAIN = Mixture(ROUTER, TOP, experts("U", "h", "d") >> SILU, experts("V", "d", "h"))
MIXTURES = {
    "plain": PLAIN,
    "biases": Mixture(ROUTER, TOP, experts("U", "h", "d", True) >> SILU, experts("V", "d", "h", True)),
    "stored in_out": Mixture(
        ROUTER, TOP, experts("U", "h", "d", layout="in_out") >> SILU, experts("V", "d", "h", layout="in_out")
    ),
    "fused halves": Mixture(ROUTER, TOP, experts("U", "2h", "d", True) >> Glu(SILU), experts("V", "d", "h")),
    "gate and up": Mixture(
        ROUTER, TOP, gated(experts("G", "h", "d"), experts("U", "h", "d"), SILU), experts("V", "d", "h")
    ),
    "share first": Mixture(
        ROUTER, Routing(1, "sigmoid", after=True), Share() >> experts("U", "h", "d") >> SILU, experts("V", "d", "h"),
        weighted=False,
    ),
    "in the best groups": Mixture(
        ROUTER, Routing(K, "sigmoid", correction=CORRECTION, groups=(3, 2), renormalise=1, scaling=2.5),
        experts("U", "h", "d") >> SILU, experts("V", "d", "h"),
    ),
    "sparse mixer": Mixture(
        ROUTER, Routing(2, "sparsemixer", jitter=0.1), experts("U", "h", "d") >> SILU, experts("V", "d", "h")
    ),
    "latent": Mixture(
        ROUTER, TOP, Linear(Param("L", ("l", "d"))) >> experts("U", "h", "l") >> SILU, experts("V", "d", "h")
    ),
}  # fmt: skip


def drawn(block, seed=0, tokens=(TOKENS,)):
    return ct.sample(block, seed=seed, tokens=tokens, d=D, h=H, E=E)


def dense(name, params, x):
    """Every expert for every token, one after the other, weighted by the shares; zero for those not chosen."""
    mixture = MIXTURES[name]

    def matrix(which, e):
        w = params[which][e]
        return w.T if name == "stored in_out" else w

    def bias(which, e):
        return params[f"{which}_bias"][e] if f"{which}_bias" in params else 0

    def silu(z):
        return z * sigmoid(z)

    total = np.zeros((len(x), D))
    for t, token in enumerate(x):
        chosen, shares = mixture.routing(params, params["R"] @ token + params["r"])
        for e in range(E):
            s = dict(zip(chosen.tolist(), shares.tolist(), strict=True)).get(e, 0.0)
            read = params["L"] @ token if name == "latent" else token * s if name == "share first" else token
            hidden = matrix("U", e) @ read + bias("U", e)
            if name == "fused halves":
                hidden = silu(hidden[:H]) * hidden[H:]
            elif name == "gate and up":
                hidden = silu(params["G"][e] @ read) * hidden
            else:
                hidden = silu(hidden)
            out = matrix("V", e) @ hidden + bias("V", e)
            total[t] += out * (s > 0 if name == "share first" else s)
    return total
