"""What the rules print is what they do: each printed formula, computed by hand, against the executed patch."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import error

import controllability as ct
from controllability.components import Bias, ExpertLinear, Linear, Scale, Taps
from controllability.components.mixture import CHOSEN
from controllability.interfaces import JointOptions, Param
from controllability.rules import RULES

D, H, E = 3, 4, 5
rng = np.random.default_rng(0)
W, b, m, V = rng.normal(size=(H, D)), rng.normal(size=H), rng.normal(size=D), rng.normal(size=(E, H, D))
z, z2, δ, long = rng.normal(size=D), rng.normal(size=D), rng.normal(size=H), rng.normal(size=D)
CHOICE = np.array([1, 3])
rows, rows2 = rng.normal(size=(2, D)), rng.normal(size=(2, D))
LINEAR = Linear(Param("W", (H, D)), Param("b", (H,)))

# printed formula -> (component, what it is computed with, the formula in NumPy, its delta in the patch)
FORMULAS = {
    "ΔW = W(z'−z) zᵀ/‖z‖²": (LINEAR, "input", lambda: np.outer(W @ (z2 - z), z) / (z @ z)),
    "Δb = f(z') − f(z)": (Bias(Param("m", (D,))), "input", lambda: (z2 + m) - (z + m)),
    "Δm = m∘(z'−z)/z": (Scale(Param("m", (D,))), "input", lambda: m * (z2 - z) / z),
    "ΔW_e = W_e(z'_j−z_j) z_jᵀ/‖z_j‖²": (
        ExpertLinear(Param("V", (E, H, D))), "experts",
        lambda: np.stack([
            sum((np.outer(V[e] @ (rows2[j] - rows[j]), rows[j]) / (rows[j] @ rows[j]) for j in range(2) if CHOICE[j] == e), np.zeros((H, D)))
            for e in range(E)
        ]),
    ),
    "ΔW = δ yᵀ/‖y‖²": (LINEAR, "output", lambda: np.outer(δ, z) / (z @ z)),
    "Δb = δ": (Bias(Param("m", (D,))), "output", lambda: long),
    "Δm = δ/y": (Scale(Param("m", (D,))), "output", lambda: long / z),
    "Δc_k = δ∘z_k/Σ_j z_j²": (  # one channel that reads D positions
        Taps(Param("c", (1, 1, D))), "output", lambda: long[:1] * z / (z @ z),
    ),
}  # fmt: skip
PARAMS = {"W": W, "b": b, "m": m, "V": V, "c": rng.normal(size=(1, 1, D))}

# the same for two tokens with one patch: rows of Z are tokens
Z, Z2, Δ, shift = rng.normal(size=(2, D)), rng.normal(size=(2, D)), rng.normal(size=(2, H)), rng.normal(size=D)
Δm = rng.normal(size=D)
CHOSEN_BY = np.array([[1], [3]])
JOINT_FORMULAS = {
    "ΔW = W(Z'−Z)Z⁺": ("I-linear", LINEAR, Z, (Z2 - Z) @ W.T, lambda: W @ (Z2 - Z).T @ np.linalg.pinv(Z.T)),
    "Δb = f(z'_t) − f(z_t)": ("I-bias", Bias(Param("m", (D,))), Z, np.stack([shift, shift]), lambda: shift),
    "Δm = m∘(z'_t−z_t)/z_t": ("I-scale", Scale(Param("m", (D,))), Z, Δm * Z, lambda: Δm),
    "ΔW_e = W_e(Z'_e−Z_e)Z_e⁺": (
        "I-experts", ExpertLinear(Param("V", (E, H, D))), Z[:, None], Δ[:, None],
        lambda: np.stack([
            sum((np.outer(Δ[t], Z[t]) / (Z[t] @ Z[t]) for t in range(2) if CHOSEN_BY[t, 0] == e), np.zeros((H, D))) for e in range(E)
        ]),
    ),
    "ΔW = D Y⁺": ("O-linear", LINEAR, Z, Δ, lambda: Δ.T @ np.linalg.pinv(Z.T)),
    "Δb = δ_t": ("O-bias", Bias(Param("m", (D,))), Z, np.stack([shift, shift]), lambda: shift),
    "Δm = δ_t/y_t": ("O-scale", Scale(Param("m", (D,))), Z, Δm * Z, lambda: Δm),
}  # fmt: skip


def printed() -> set[str]:
    return {rule.patch for rule in RULES if type(rule).__name__ == "LeafRule"}


def test_every_formula_of_a_leaf_is_here():
    assert printed() == set(FORMULAS) | set(JOINT_FORMULAS)


@pytest.mark.parametrize("formula", JOINT_FORMULAS)
def test_the_printed_joint_formula_is_what_the_component_does(formula):
    rule, component, x, gap, by_hand = JOINT_FORMULAS[formula]
    assert next(r.patch for r in RULES if r.name == f"{rule} jointly") == formula
    way = next(s.jointly for s in component.updates() if s.kind == rule[2:])
    solved = way.solve(JointOptions(), PARAMS | {CHOSEN: CHOSEN_BY}, x, gap, gap * 0)
    assert error(solved.delta.dense(), by_hand()) < 1e-13
    assert (solved.margin > 0).all()


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_printed_formula_is_what_the_component_does(formula):
    component, side, by_hand = FORMULAS[formula]
    if side == "input":
        patch = component.steer_input(PARAMS, z, z2)
    elif side == "experts":
        patch = component.steer_input(PARAMS | {CHOSEN: CHOICE}, rows, rows2)
    else:
        sizes = {Linear: δ, Taps: long[:1]}
        patch = component.steer_output(PARAMS, z, sizes.get(type(component), long))
    (delta,) = patch.values()
    assert error(delta.dense(), by_hand()) < 1e-14
    assert error(delta.dense(), -by_hand()) > 1


def test_the_mixture_formula_is_what_the_proof_does():
    """ΔW_j = s_j δ y_jᵀ / Σ_k s_k²‖y_k‖², by hand, on the whole block."""
    from controllability.components import Activation, Mixture, Routing, residual

    rule = next(r for r in RULES if r.name == "O-mixture")
    assert rule.patch == "ΔW_j = s_j δ y_jᵀ / Σ_k s_k²‖y_k‖²"
    inner = ExpertLinear(Param("U", (E, H, D))) >> Activation("silu")
    block = residual(Mixture(Linear(Param("R", (E, D))), Routing(2), inner, ExpertLinear(Param("V", (E, D, H)))))
    params, v, v_target = ct.sample(block, seed=1)
    patch = ct.prove(block, "output").construct(params, v, v_target)
    logits = params["R"] @ v
    scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    chosen = np.sort(np.argsort(-scores)[:2])
    y = {e: params["U"][e] @ v for e in chosen}
    y = {e: x / (1 + np.exp(-x)) for e, x in y.items()}
    delta = block(params, v_target) - block(params, v)
    size = sum(scores[e] ** 2 * (y[e] @ y[e]) for e in chosen)
    wanted = np.zeros((E, D, H))
    for e in chosen:
        wanted[e] = scores[e] * np.outer(delta, y[e]) / size
    assert error(patch["V"].dense().reshape(wanted.shape), wanted) < 1e-13
