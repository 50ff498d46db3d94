"""Certificates that no scale exists: they hold in exact arithmetic, and nothing proves a solvable problem impossible."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from scale_instances import EPS, instance, solvable

from controllability.solvers.farkas_certificate import Farkas, Infeasible, find_farkas
from controllability.solvers.joint_scale import joint_scale


@pytest.mark.parametrize(("tokens", "d"), [(2, 3), (6, 8), (64, 96), (120, 96)])
def test_where_no_scale_exists_the_certificate_holds_exactly(tokens, d):
    refused = 0
    for seed in range(4):
        G, m, r2 = instance(tokens, d, seed)
        if solvable(G, r2):
            continue
        refused += 1
        with pytest.raises(Infeasible) as caught:
            joint_scale(G, m, r2, EPS, keep_rms=True)
        proof = caught.value.certificate
        assert proof is not None
        assert proof.holds()
        # again, in Fractions and by hand
        A, q = G * G / d, r2 / (r2 + EPS)
        columns = [sum(w * Fraction(a) for w, a in zip(proof.weights, column, strict=True)) for column in A.T.tolist()]
        right = sum(w * Fraction(b) for w, b in zip(proof.weights, q.tolist(), strict=True))
        assert min(columns) >= 0 >= right
        assert (max(columns), right) != (0, 0)
        assert "negative right side (checked in exact arithmetic)" in str(proof)
    assert refused


@pytest.mark.parametrize("seed", range(5))
def test_nothing_proves_a_solvable_problem_impossible(seed):
    G, m, r2 = instance(40, 96, seed)
    assert joint_scale(G, m, r2, EPS, keep_rms=True).resort == "kept rms"
    A, q = G**2 / 96, r2 / (r2 + EPS)
    rng = np.random.default_rng(seed)
    fakes = [rng.normal(size=40), -np.ones(40), np.ones(40), np.zeros(40), np.eye(40)[3]]
    for fake in fakes:
        assert not Farkas(A, q, tuple(Fraction(w) for w in fake.tolist())).holds()
    found = find_farkas(A, q)
    assert found is None or not found.holds()
    # the certificate of another problem is none of this one
    G2, _, r3 = instance(64, 96, seed)
    other = find_farkas(G2**2 / 96, r3 / (r3 + EPS))
    assert other is not None
    assert other.holds()
    assert not Farkas(A, q, other.weights[:40]).holds()


def test_certificates_of_fractions_are_exact():
    third = Fraction(1, 3)
    A, q = [[third, Fraction(1)], [2 * third, Fraction(2)]], [Fraction(1), Fraction(2)]
    assert not Farkas(A, q, (2, -1)).holds()  # both sides vanish: the equations agree
    assert find_farkas(A, q) is None
    barely = [Fraction(1), 2 - Fraction(1, 10**30)]  # a difference that no float sees
    assert Farkas(A, barely, (-2, 1)).holds()
    assert not Farkas(A, barely, (2, -1)).holds()


def test_a_scale_forced_to_zero_is_excluded_too():
    """s₂ = 0 would do; s > 0 does not.  The certificate has the right side 0."""
    G = np.array([[1.0, 1.0], [1.0, 0.0]])
    with pytest.raises(Infeasible) as caught:
        joint_scale(G, np.ones(2), np.ones(2), 0.0)
    proof = caught.value.certificate
    assert proof is not None
    assert proof.weights == (1, -1)
    assert proof.holds()
    assert "the right side 0" in str(proof)
    assert joint_scale(G, np.ones(2), np.ones(2), EPS).resort == "moved rms"


def test_an_unconfirmed_certificate_says_so():
    doubtful = Farkas([[1.0, 1.0], [1.0, 1.0 - 1e-9]], [1.0, 1.0], (Fraction(-1), Fraction(1)))
    assert not doubtful.holds()
    assert "to rounding: not confirmed" in str(doubtful)


def test_the_message_names_the_tokens_that_weigh_most():
    G, m, r2 = instance(64, 96)
    with pytest.raises(Infeasible, match="no scale gives all 64 tokens their RMS") as caught:
        joint_scale(G, m, r2, EPS, keep_rms=True)
    proof = caught.value.certificate
    assert proof is not None
    heaviest = max(range(64), key=lambda t: abs(proof.weights[t]))
    assert f"at token {heaviest}" in str(caught.value)
    plain = proof.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["exact"] is True
    assert tuple(map(Fraction, plain["weights"])) == proof.weights
