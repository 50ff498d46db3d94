"""Numbers of one instance and refusals, shown by the kernel."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from test_kernel import SMALL, needs_coq

import controllability as ct
from controllability.components import Activation, Linear, SoftCap, residual
from controllability.interfaces import Param
from controllability.rocq.check import ask
from controllability.rocq.numbers import farkas_certificate, refusal_certificate, residual_certificate
from controllability.solvers.farkas_certificate import Farkas, Infeasible
from controllability.solvers.joint_scale_task import ScaleTask

up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
RATIONAL = residual(up >> Activation("relu2") >> down)


def instance(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {"up": rng.standard_normal((6, 4)), "down": rng.standard_normal((4, 6))}
    return params, rng.standard_normal(4), rng.standard_normal(4)


@needs_coq
def test_the_residual_of_stored_numbers_is_within_its_bound():
    proof, (params, v, target) = ct.prove(RATIONAL), instance()
    patch = proof.construct(params, v, target)
    block = lambda given, x: np.array([Fraction(n) for n in RATIONAL(given, x)])  # noqa: E731
    stored = {
        name: np.array([[Fraction(n) for n in row] for row in rows]) for name, rows in patch.merged_into(params).items()
    }
    exact = [{k: np.array([[Fraction(n) for n in row] for row in w]) for k, w in params.items()}, stored]
    v_, t_ = (np.array([Fraction(n) for n in x]) for x in (v, target))
    missed = max(abs(block(exact[1], v_) - block(exact[0], t_)))  # with fractions, by the block itself
    assert 0 < missed < 1e-12
    assert ask(residual_certificate(proof, params, v, target, missed)).accepted
    just_below = residual_certificate(proof, params, v, target, missed * Fraction(999_999, 1_000_000))
    assert not ask(just_below).accepted


@needs_coq
def test_farkas_certificates_of_joint_scales():
    """The weights that the solver found, on the equations that it could not solve, its floats as rationals."""
    rng = np.random.default_rng(0)
    right = Farkas([[1, 4], [2, 5]], [3, 2], (-1, 1))
    squares = rng.standard_normal((5, 3)) ** 2  # five tokens, three channels: generically no scale serves them
    with pytest.raises(Infeasible) as refused:
        ScaleTask(squares**0.5, np.ones(5), np.ones(3), 1e-6, lambda scale: scale).exact(1e-15, True)
    for found in (right, refused.value.certificate):
        assert ask(farkas_certificate(found)).accepted
        turned = replace(found, weights=tuple(-w for w in found.weights))
        nothing = replace(found, weights=tuple(0 for _ in found.weights))
        assert not ask(farkas_certificate(turned)).accepted
        assert not ask(farkas_certificate(nothing)).accepted


@needs_coq
@pytest.mark.parametrize("end", [Activation("tanh"), Activation("sigmoid"), SoftCap(30.0)], ids=lambda c: c.describe())
def test_a_bounded_end_is_refused_as_a_theorem(end):
    branch = up >> Activation("gelu") >> down >> end
    with pytest.raises(ct.NotControllable):
        ct.prove(residual(up >> Activation("tanh")))
    text = refusal_certificate(branch)
    verdict = ask(text)
    assert verdict.accepted, verdict.reason
    lower = text.replace("exists i, 1 <", "exists i, (1 / 2) <").replace("exists i, (30 / 1) <", "exists i, (29 / 1) <")
    assert lower != text
    assert not ask(lower).accepted


def test_what_is_not_rational_or_not_bounded_is_refused():
    params, v, target = instance()
    with pytest.raises(ct.BadInput, match="no rational map"):
        residual_certificate(ct.prove(SMALL), params, v, target, Fraction(1))
    with pytest.raises(ct.BadInput, match="not known to be bounded"):
        refusal_certificate(up >> Activation("relu"))
