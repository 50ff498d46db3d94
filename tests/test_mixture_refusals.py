"""Mixtures on which a side condition fails or that have no proof, and the near misses that have one."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import error
from mixtures import PLAIN, ROUTER, SILU, TOP, E, drawn, experts

import controllability as ct
from controllability.components import (
    XIELU,
    Activation,
    Bias,
    ExpertLinear,
    Glu,
    Identity,
    Linear,
    Mixture,
    Product,
    Routing,
    Share,
    Sum,
    Times,
    residual,
    rms_norm,
    updates,
)
from controllability.interfaces import Component, Param

# -------------------------------------------------------------------------------------- side conditions
SMALL = Mixture(
    Linear(Param("R", (3, 2))), Routing(2, "identity"), ExpertLinear(Param("U", (3, 2, 2))) >> Activation("relu"),
    ExpertLinear(Param("V", (3, 2, 2))),
)  # fmt: skip
NO_ZERO = "some active expert has a share and an activation that are not zero"
NO_TIE = "the target run's choice of experts is no near-tie"


def by_hand(router, first):
    """Parameters of SMALL: router rows, and a multiple of the identity for each expert's first map."""
    eye = np.eye(2)
    return {"R": np.array(router, dtype=float), "U": np.stack([f * eye for f in first]), "V": np.stack([eye, eye, eye])}


def refused(block, params, v, v_target, via) -> ct.SideConditionFailed:
    with pytest.raises(ct.SideConditionFailed) as failed:
        ct.prove(block, via).construct(params, v, v_target)
    return failed.value


def test_activations_that_are_all_zero_are_refused_with_their_position():
    # positive tokens go to experts 1 and 2, whose relu lets nothing through; the others to 0 and 1
    params = by_hand([[0, 0], [1, 0], [2, 0]], [1, -1, -1])
    v = np.array([[-1.0, 1.0], [1.0, 1.0], [-1.0, 2.0]])
    failure = refused(residual(SMALL), params, v, v + 1, "output")
    assert (failure.statement, failure.position, failure.margin) == (NO_ZERO, 1, 0.0)


def test_one_activation_that_is_not_zero_is_enough():
    params = by_hand([[0, 0], [1, 0], [2, 0]], [1, 1, -1])
    block, v, v_target = residual(SMALL), np.array([1.0, 2.0]), np.array([3.0, 1.0])
    merged = ct.prove(block, "output").construct(params, v, v_target).merged_into(params)
    assert error(block(merged, v), block(params, v_target)) < 1e-15
    assert (merged["V"][1] != params["V"][1]).any()
    assert merged["V"][[0, 2]].tobytes() == params["V"][[0, 2]].tobytes()


def test_shares_that_are_all_zero_are_refused_with_their_position():
    params = by_hand([[-1, 0], [0, 1], [0, 1]], [1, 1, 1])
    v = np.array([[1.0, 1.0], [1.0, 0.0]])  # the second token's chosen experts have the share 0
    failure = refused(residual(SMALL), params, v, v + 1, "output")
    assert (failure.statement, failure.position, failure.margin) == (NO_ZERO, 1, 0.0)


@pytest.mark.parametrize(("second", "dtype", "tied"), [
    (1.0, "float64", True), (1 - 2e-15, "float64", True), (1 - 1e-6, "float64", False), (1 - 1e-6, "float32", True),
])  # fmt: skip
def test_a_near_tie_in_the_target_is_refused_with_its_margin_and_position(second, dtype, tied):
    params = {n: p.astype(dtype) for n, p in by_hand([[1, 0], [0, 1], [-1, -1]], [1, 1, 1]).items()}
    block = residual(Mixture(SMALL.router, Routing(1, "identity"), SMALL.inner, SMALL.last))
    v = np.array([[1.0, 3.0], [2.0, 1.0], [1.0, 4.0]], dtype=dtype)
    v_target = np.array([[1.0, 2.0], [1.0, second], [3.0, 1.0]], dtype=dtype)
    if tied:
        failure = refused(block, params, v, v_target, "input-output")
        assert (failure.statement, failure.position) == (NO_TIE, 1)
        assert failure.margin is not None
        assert -100 * np.finfo(dtype).eps < failure.margin <= 0
        assert "via='output'" in str(failure)
    else:
        patch = ct.prove(block).construct(params, v, v_target)
        assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-14
        assert 0 < min(m.value for m in patch.journal.margins if m.condition.statement == NO_TIE) <= 1e-6
    patch = ct.prove(block, "output").construct(params, v, v_target)  # keeps what the source run chooses
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 100 * np.finfo(dtype).eps


@pytest.mark.parametrize("via", ["input-output", "output"])
@pytest.mark.parametrize(("token", "hidden", "dtype"), [
    (1e-170, 1.0, "float64"), (1e160, 1.0, "float64"), (1.0, 1e-170, "float64"), (1.0, 1e160, "float64"),
    (1e-23, 1.0, "float32"), (1e20, 1.0, "float32"), (1.0, 1e-23, "float32"), (1.0, 1e20, "float32"),
])  # fmt: skip
def test_sizes_that_cannot_be_squared(token, hidden, dtype, via):
    """What the experts' maps read is as small or as large as given; what comes out has the size of the state."""
    router = Linear(Param("R", (3, 2)), Param("r", (3,)))
    linear = Mixture(
        router, Routing(2, "sigmoid"), ExpertLinear(Param("U", (3, 2, 2))), ExpertLinear(Param("V", (3, 2, 2)))
    )
    rng = np.random.default_rng(0)
    params = {
        "R": rng.normal(size=(3, 2)) * 0.1 / token, "r": np.array([-3.0, 1.0, 3.0]),
        "U": rng.normal(size=(3, 2, 2)) * hidden / token, "V": rng.normal(size=(3, 2, 2)) / hidden,
    }  # fmt: skip
    params = {n: p.astype(dtype) for n, p in params.items()}
    v, v_target = (np.array(x, dtype=dtype) * np.dtype(dtype).type(token) for x in ([1, 2], [2, -1]))
    block = residual(linear >> Times(token))
    patched = ct.prove(block, via).construct(params, v, v_target).applied_to(params)
    assert error(block(patched, v), block(params, v_target)) < 20 * np.finfo(dtype).eps
    if via == "input-output":
        here, there = ct.Trace(block, patched, v), ct.Trace(block, params, v_target)
        assert error(here.output((1, 0, 1)), there.output((1, 0, 1))) < 20 * np.finfo(dtype).eps


def test_another_choice_than_the_targets_is_refused():
    """What a real run tells, or what a router that misses its logits would do."""
    block = residual(PLAIN)
    params, v, v_target = drawn(block, tokens=())
    run = ct.prove(block).patched_run(params, v, v_target)
    bound = dict(run.target.bound((1,)))
    run.bind((1,), bound)  # the same choice
    other = bound | {"(chosen experts)": (bound["(chosen experts)"] + 1) % E}
    with pytest.raises(ct.SideConditionFailed, match="the patched router chooses the experts of the target run"):
        run.bind((1,), other)


def test_a_router_that_misses_its_logits_is_noticed(monkeypatch):
    from controllability.deltas import LowRank

    plain = updates.rank_one_change

    def reversed_(*given):
        delta = plain(*given)
        return LowRank(-9 * delta.left, delta.right, delta.transposed)

    block = residual(Mixture(Linear(Param("R", ("E", "d"))), TOP, PLAIN.inner, PLAIN.last))
    params, v, v_target = drawn(block)
    ct.prove(block).construct(params, v, v_target)
    monkeypatch.setattr(updates, "rank_one_change", reversed_)
    failure = refused(block, params, v, v_target, "input-output")
    assert failure.statement == "the patched router chooses the experts of the target run"
    assert isinstance(failure.position, int)


# ------------------------------------------------------------------------------------------- refusals


class Ones(Component):
    """Does not see its input."""

    constant = True

    def __call__(self, params, x):
        return x * 0 + 1

    def describe(self):
        return "ones"


def test_a_constant_beside_a_mixture_needs_nothing():
    block = residual(rms_norm("pre") >> (PLAIN + Ones()))
    params, v, v_target = drawn(block)
    proof = ct.prove(block)
    assert "I-constant" in proof.rules
    assert error(block(proof.construct(params, v, v_target).applied_to(params), v), block(params, v_target)) < 1e-12


def between(k: int) -> Component:
    """One map for all chosen experts, each of which reads its share of the token."""
    inner = Share() >> Linear(Param("M", ("h", "d"))) >> SILU
    return residual(Mixture(ROUTER, Routing(k), inner, experts("V", "d", "h"), weighted=False))


def test_one_map_for_all_chosen_experts_is_not_steered_for_each_of_them():
    with pytest.raises(ct.NotControllable, match="one row for each chosen expert") as refusal:
        ct.prove(between(2))
    assert refusal.value.culprit == "linear M"
    params, v, v_target = drawn(between(1), tokens=())
    alone = ct.prove(between(1))  # one expert, one row
    assert "M" in {str(p) for p in alone.root.moved}
    merged = alone.construct(params, v, v_target).merged_into(params)
    assert error(between(1)(merged, v), between(1)(params, v_target)) < 1e-12


TIED = {
    "last and first maps": Mixture(ROUTER, TOP, experts("V", "d", "d") >> SILU, experts("V", "d", "d")),
    "router and experts' scale": Mixture(
        Identity() >> Bias(Param("p", ("d",))), Routing(1, "identity", per_expert=Param("p", ("d",))),
        ExpertLinear(Param("U", ("d", "h", "d"))) >> SILU, ExpertLinear(Param("V", ("d", "d", "h"))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_what_the_mixture_itself_reads_is_not_moved(name):
    with pytest.raises(ct.NotControllable, match="used twice"):
        ct.prove(residual(TIED[name]))


def test_a_skip_whose_routing_reads_a_moved_parameter_is_refused():
    """A skip may read its patch, but only in a map that computes with one patch for each token."""
    gain = Param("gain", ("d",))
    skip = Mixture(
        Linear(Param("R", ("d", "d"))), Routing(1, per_expert=gain),
        ExpertLinear(Param("U", ("d", "h", "d"))) >> SILU, ExpertLinear(Param("V", ("d", "d", "h"))),
    )  # fmt: skip
    tied = Sum((skip, Bias(gain) >> SILU >> Linear(Param("W", ("d", "d")))))
    with pytest.raises(ct.NotControllable, match="gain is used twice"):
        ct.prove(tied, frozen=["U", "V"])


def test_what_an_activation_inside_a_gated_pair_reads_counts():
    names = [Param(n, ("one",)) for n in ("alpha_p", "alpha_n", "beta", "eps")]
    block = residual(Linear(Param("U", ("2h", "d"))) >> Glu(XIELU(*names)) >> Linear(Param("W", ("d", "h"))))
    assert {p.name for p in block.parameters()} >= {p.name for p in names}
    params, v, v_target = drawn(block)
    patch = ct.prove(block).construct(params, v, v_target)
    assert error(block(patch.applied_to(params), v), block(params, v_target)) < 1e-13
    first, last = Linear(Param("g", ("one", "d")), names[0]), Linear(Param("W", ("d", "one")))
    with pytest.raises(ct.NotControllable, match="alpha_p is used twice"):
        ct.prove(residual(first >> Glu(XIELU(*names)) >> last), frozen=["g"])


@pytest.mark.parametrize("put_together", [Product, Sum])
def test_one_number_for_all_features_cannot_give_each_its_own(put_together):
    """They broadcast, so that a patch of the wrong shape would seem to work."""
    block = residual(put_together((Linear(Param("g", ("one", "d"))), SILU)))
    params, v, v_target = drawn(block)
    failure = refused(block, params, v, v_target, "output")
    assert failure.statement == "there is a number for every feature that must change"


def test_experts_that_do_not_end_in_their_own_map_are_refused_on_the_output_side():
    block = residual(Mixture(ROUTER, TOP, experts("U", "h", "d"), experts("V", "d", "h") >> SILU))
    with pytest.raises(ct.NotControllable, match="the experts do not end in their own linear map"):
        ct.prove(block, "output")
