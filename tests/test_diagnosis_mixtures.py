"""Deliberate mistakes in the patch of a mixture of experts, each named for what it is."""

from __future__ import annotations

import numpy as np
import pytest
from other_patches import VIAS, Made, only

import controllability as ct
from controllability.components import Activation, ExpertLinear, Linear, Mixture, Routing, residual
from controllability.components.mixture import CHOSEN, SHARES
from controllability.execution.trace import Trace
from controllability.interfaces import Param


def chosen(made, position=()):
    bound = made.run.bound(made.path("mlp.experts.down_proj")[:-1])
    return bound[CHOSEN][position], bound[SHARES][position]


def same_for_each(made, left):
    """left y_jᵀ/‖y_j‖² for every chosen expert, as stored."""
    w = "mlp.experts.down_proj"
    index, _ = chosen(made)
    y, wrong = made.run.input(made.path(w)), np.zeros_like(made.params[w])
    for j, e in enumerate(index):
        wrong[e] = np.outer(left, y[j]) / (y[j] @ y[j])
    return wrong


@pytest.mark.parametrize("via", VIAS)
def test_the_gate_sum_of_a_mixture(via):
    made, w = Made("mixtral", via), "mlp.experts.down_proj"
    delta = made.delta() + (0 if via == "input-output" else made.target.output((1, 2)) - made.source.output((1, 2)))
    index, s = chosen(made)
    assert s.sum() == pytest.approx(1)  # renormalised: δ for each is right here, and [G]'s split a right patch
    assert made.verify(**{w: same_for_each(made, delta)}).ok
    problem = only(made.verify(**{w: same_for_each(made, delta / len(index))}), "gate-sum", "O-mixture", w)
    assert "gate sum taken as 2: " in problem.how
    assert "S = 1, so the output moves by 0.5 of δ" in problem.how
    only(made.verify(**{w: -made.right[w]}), "sign", "O-mixture", w)
    only(made.verify(**{w: made.right[w] / 3}), "factor", "O-mixture", w)
    only(made.verify(**{w: made.right[w].swapaxes(-1, -2)}), "orientation", "O-mixture", w)


def test_shares_that_do_not_add_up_to_1():
    up, down = ExpertLinear(Param("up", ("E", "h", "d"))), ExpertLinear(Param("mlp.experts.down_proj", ("E", "d", "h")))
    router = Linear(Param("router", ("E", "d")))
    made = Made(residual(Mixture(router, Routing(2, scaling=2.5), up >> Activation("silu"), down)))
    _, s = chosen(made)
    problem = only(
        made.verify(**{"mlp.experts.down_proj": same_for_each(made, made.delta())}),
        "gate-sum",
        "O-mixture",
        "mlp.experts.down_proj",
    )
    assert f"S = {s.sum():.4g}, so the output moves by {s.sum():.4g} of δ" in problem.how
    assert abs(s.sum() - 1) > 0.1


def test_mistakes_at_the_experts_first_maps():
    made, w = Made("mixtral"), "mlp.experts.gate_up_proj"
    index, _ = chosen(made)
    zs = {run: made.input(w, run)[0] for run in ("source", "target")}
    change = made.target.output(made.path(w)) - (made.params[w] @ zs["source"])[index]
    for kind, (sign, z) in {"target-vector": (1, zs["target"]), "sign": (-1, zs["source"])}.items():
        wrong = np.zeros_like(made.params[w])
        wrong[index] = sign * change[:, :, None] * z / (z @ z)
        only(made.verify(**{w: wrong}), kind, "I-experts", w)
    wrong = made.right[w].copy()
    wrong[index[0]] = 0
    problem = only(made.verify(**{w: wrong}), "experts", "I-experts", w)
    assert problem.how.endswith(f"there is no change of expert {index[0]}")


def test_other_experts_than_the_chosen_ones():
    made, w = Made("mixtral", "output"), "mlp.experts.down_proj"
    index, _ = chosen(made)
    others = [e for e in range(4) if e not in index]
    wrong = np.zeros_like(made.right[w])
    wrong[others] = made.right[w][index]
    only(made.verify(**{w: wrong}), "experts", "O-mixture", w)


def test_a_tie_that_rounding_decides():
    up, down = ExpertLinear(Param("up", ("E", "h", "d"))), ExpertLinear(Param("mlp.experts.down_proj", ("E", "d", "h")))
    block = residual(Mixture(Linear(Param("router", ("E", "d"))), Routing(1), up >> Activation("silu"), down))
    params, v, v_target = ct.sample(block, seed=3, E=2, d=6, h=5)
    params["router"][1] = params["router"][0] + 1e-15 * np.arange(6) / v_target
    target, source = Trace(block, params, v_target), Trace(block, params, v)

    def choice(run):
        return int(np.asarray(run.bound((1,))[CHOSEN])[0])

    there, share = choice(target), np.asarray(target.bound((1,))[SHARES])[0]
    y, change = target.input((1, 2))[0], target.output((1, 1, 0))[0] - params["up"][there] @ v
    right = {"up": np.zeros_like(params["up"]), "mlp.experts.down_proj": np.zeros_like(params["mlp.experts.down_proj"])}
    right["up"][there] = np.outer(change, v) / (v @ v)
    right["mlp.experts.down_proj"][there] = np.outer(v_target - v, y) / (y @ y) / share
    seen = set()
    for nudge in (-1, 1):
        logits = target.output((1, 0)) + nudge * 1e-14 * np.array([1, -1])
        router = np.outer(logits - source.output((1, 0)), v) / (v @ v)
        same = choice(Trace(block, params | {"router": params["router"] + router}, v)) == there
        seen.add(same)
        result = ct.verify(block, params, right | {"router": router}, v, v_target)
        assert result.ok == same
        if not same:
            problem = only(result, "experts", "O-mixture", "mlp.experts.down_proj")
            assert problem.how.endswith("(the target run chose others: the choice is a tie that rounding decides)")
    assert seen == {True, False}
