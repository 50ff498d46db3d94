"""Every leaf rule on every arithmetic: steer, then look at what the component really gives."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import partial

import mpmath
import numpy as np
import pytest
import torch

from controllability.arrays import ARITHMETICS, arithmetic
from controllability.components import (
    Activation,
    Bias,
    Identity,
    Linear,
    Normalize,
    Scale,
    SoftCap,
    Times,
    layer_norm,
    rms_norm,
)
from controllability.deltas import added
from controllability.errors import BadInput, NotExact, SideConditionFailed
from controllability.execution.sampling import sample
from controllability.interfaces import Component, InputControllable, OutputControllable, Param

IN, OUT = 3, 4
STEERABLE: dict[str, Component] = {
    "linear": Linear(Param("W", (OUT, IN))),
    "linear with bias": Linear(Param("W", (OUT, IN)), Param("b", (OUT,))),
    "linear in_out": Linear(Param("W", (IN, OUT)), layout="in_out"),
    "bias": Bias(Param("b", (IN,))),
    "scale": Scale(Param("m", (IN,))),
    "scale, stored m - 1": Scale(Param("m", (IN,)), offset=1),
}
KINDS = ("numpy", "torch", "rational", "mpmath", "sympy")
TOLERANCE = {"numpy": 1e-14, "torch": 1e-5, "rational": 0, "mpmath": 1e-48}


def difference(a, b):
    xp = arithmetic(a, b)
    if xp.kind == "sympy":
        assert all(e == 0 for e in xp.tidy(a - b).reshape(-1))
        return 0.0
    return max(abs(float(e)) for e in (a - b).reshape(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEERABLE)
@pytest.mark.parametrize("tokens", [(), (2, 5)])
def test_steering_reaches_what_it_promises(name, kind, tokens):
    component = STEERABLE[name]
    with mpmath.workdps(50):
        params, x, x_target = sample(component, kind, tokens=tokens)
        for patch, wanted in (
            (component.steer_input(params, x, x_target), component(params, x_target)),
            (
                component.steer_output(params, x, component(params, x_target)),
                component(params, x) + component(params, x_target),
            ),
        ):
            patched = dict(params) | {key: added(params[key], delta) for key, delta in patch.items()}
            found = component(patched, x)
            assert difference(found, wanted) <= TOLERANCE.get(kind, 0)
            if kind != "sympy":
                assert difference(component(params, x), wanted) > 1e-3


@pytest.mark.parametrize("name", STEERABLE)
def test_dense_and_factored_patches_agree(name):
    component = STEERABLE[name]
    params, x, x_target = sample(component, "numpy")
    patch = component.steer_input(params, x, x_target)
    dense = dict(params) | {key: params[key] + delta.dense() for key, delta in patch.items()}
    assert difference(component(dense, x), component(params, x_target)) < 1e-14


def test_rank_one_patch_is_the_least_norm_solution():
    linear = Linear(Param("W", (OUT, IN)))
    params, x, x_target = sample(linear, "numpy", seed=3)
    gap = params["W"] @ (x_target - x)
    # every solution of ΔW x = gap, from a solver that knows nothing of rank-1 formulas
    system = np.kron(np.eye(OUT), x[None])
    least = np.linalg.lstsq(system, gap, rcond=None)[0].reshape(OUT, IN)
    found = linear.steer_input(params, x, x_target)["W"]
    assert np.allclose(found.dense(), least, atol=1e-13)
    assert np.isclose(found.norms(), np.linalg.norm(least))


def test_bias_serves_where_the_input_is_zero():
    linear = Linear(Param("W", (OUT, IN)), Param("b", (OUT,)))
    params, _, x_target = sample(linear, "numpy")
    assert set(linear.steer_input(params, np.zeros(IN), x_target)) == {"b"}


def test_zero_input_without_bias_is_named_with_its_position():
    linear = Linear(Param("W", (OUT, IN)))
    params, x, x_target = sample(linear, "numpy", tokens=(3,))
    x[1] = 0
    with pytest.raises(SideConditionFailed) as failed:
        linear.steer_input(params, x, x_target)
    assert str(failed.value) == (
        "side condition failed at linear W, position 1: the input of W is not zero (margin 0)\n"
        "  hint:  give linear W a bias: it moves the output whatever the input is"
    )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["linear", "scale", "bias"])
def test_a_vector_of_another_length_is_one_error_with_both_lengths(name, kind):
    """Also of length 1, or none, which arithmetic would spread without a word."""
    component = {"linear": Linear(Param("p")), "scale": Scale(Param("p")), "bias": Bias(Param("p"))}[name]
    one = np.ones if kind == "numpy" else partial(torch.ones, dtype=torch.float64)
    fits, params = one(IN), {"p": one((OUT, IN) if name == "linear" else IN)}
    out = OUT if name == "linear" else IN
    for wrong in (one(IN + 2), one(1), one(())):
        shape = re.escape(f"has shape {tuple(wrong.shape)}, ")
        takes = shape + f"which {name} p does not take: p has shape {re.escape(str(tuple(params['p'].shape)))}$"
        for call in (
            lambda: component.steer_input(params, wrong, fits),  # noqa: B023
            lambda: component.steer_input(params, wrong, wrong),  # noqa: B023
            lambda: component.steer_output(params, wrong, one(out)),  # noqa: B023
        ):
            with pytest.raises(BadInput, match="^x(_target)? " + takes):
                call()
        with pytest.raises(BadInput, match="^x_target " + takes):
            component.steer_input(params, fits, wrong)
        with pytest.raises(BadInput, match=f"^delta {shape}but {name} p gives vectors of length {out}$"):
            component.steer_output(params, fits, wrong)
    assert component.steer_input(params, fits, 2 * fits) and component.steer_output(params, fits, one(out))


def test_scale_condition_is_about_the_coordinates_that_must_change():
    scale = Scale(Param("m", (2,)))
    params = {"m": np.array([2.0, 3.0])}
    x = np.array([0.0, 1.0])
    assert scale.steer_output(params, x, np.array([0.0, 6.0]))["m"].value.tolist() == [0.0, 6.0]
    with pytest.raises(SideConditionFailed, match="no input coordinate of m is zero where its output must change"):
        scale.steer_output(params, x, np.array([1.0, 6.0]))


@pytest.mark.parametrize("kind", ["numpy", "torch", "mpmath"])
@pytest.mark.parametrize("name", ["identity", "relu", "relu2", "silu", "gelu", "gelu_tanh", "tanh"])
def test_activations_agree_with_torch(name, kind):
    reference = {
        "identity": lambda x: x, "relu": torch.relu, "relu2": lambda x: torch.relu(x) ** 2, "tanh": torch.tanh,
        "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[name]  # fmt: skip
    grid = torch.linspace(-4, 4, 33, dtype=torch.float64)
    x = {"numpy": grid.numpy(), "torch": grid, "mpmath": ARITHMETICS["mpmath"].array(grid.numpy())}[kind]
    found = Activation(name)({}, x)
    assert max(abs(float(a) - float(b)) for a, b in zip(found, reference(grid), strict=True)) < 1e-14


def test_rational_arithmetic_refuses_what_is_not_rational():
    x = ARITHMETICS["rational"].array([Fraction(1, 2)])
    with pytest.raises(NotExact, match=r"is not rational"):
        Activation("silu")({}, x)
    assert Activation("p", coefficients=(1, 0, 2))({}, x).tolist() == [Fraction(3, 2)]
    assert Activation("relu")({}, -x).tolist() == [0]


def test_a_declared_symbol_has_values_in_sympy_only():
    with pytest.raises(BadInput, match="it has values in SymPy only, not in numpy"):
        Activation("phi", symbol=True)({}, np.ones(2))
    with pytest.raises(BadInput, match="unknown activation 'swoosh'"):
        Activation("swoosh")


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_compositions_and_agree_with_torch(kind):
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(5, 6)), rng.normal(size=6), rng.normal(size=6)
    params = {"n.weight": w, "n.bias": b}
    norm = rms_norm("n", 6, eps=1e-3) if kind == "rms" else layer_norm("n", 6, eps=1e-3)
    xt, wt, bt = (torch.as_tensor(a) for a in (x, w, b))
    reference = (
        torch.nn.functional.rms_norm(xt, (6,), wt, 1e-3)
        if kind == "rms"
        else torch.nn.functional.layer_norm(xt, (6,), wt, bt, 1e-3)
    )
    assert np.allclose(norm(params, x), reference.numpy(), atol=1e-14)
    assert [type(p) for p in norm.parts][:2] == [Normalize, Scale]


@pytest.mark.parametrize(
    "bijection", [SoftCap(2.0), Times(0.3), Identity(), Scale(Param("m", (3,))), Bias(Param("m", (3,)))]
)
def test_bijections_are_undone(bijection):
    params = {"m": np.array([0.5, -2.0, 3.0])}
    x = np.array([0.1, -1.5, 3.0])
    assert np.allclose(bijection.invert(params, bijection(params, x)), x, atol=1e-12)


def test_abstract_interfaces_cannot_be_built_half():
    for interface in (InputControllable, OutputControllable, Component):
        with pytest.raises(TypeError):
            interface()


def test_slices_of_one_tensor_are_disjoint_parameters():
    whole, gate, up = Param("w"), Param("w", index=(slice(0, 4),)), Param("w", index=(slice(4, 8),))
    assert not gate.overlaps(up)
    assert gate.overlaps(whole)
    assert whole.overlaps(up)
    stored = np.arange(8.0)
    assert up.value({"w": stored}).tolist() == [4, 5, 6, 7]
    with pytest.raises(BadInput, match="parameter x is missing; given are: w"):
        Param("x").value({"w": stored})


@pytest.mark.parametrize("bad", [[1.0], np.array([1, 2]), np.array(["a"], dtype=object)])
def test_wrong_arrays_are_refused(bad):
    with pytest.raises(BadInput):
        arithmetic(bad)
