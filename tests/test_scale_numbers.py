"""One scale for many tokens in numbers that are special: zeros, copies, all sizes, as stored in few bits, unusable."""

from __future__ import annotations

import numpy as np
import pytest
from scale_instances import EPS, error, instance, mean_square, normalised

from controllability.errors import BadInput
from controllability.solvers.farkas_certificate import Infeasible
from controllability.solvers.joint_scale import joint_scale


def test_entries_that_are_zero():
    G, m, r2 = instance(24, 96, 1)
    m[:4] = 0
    G[:, :2] = 0
    answer = joint_scale(G, m, r2, EPS)
    assert answer.resort == "kept rms"
    assert (answer.scale[:2] == 0).all()
    assert (answer.unit[:, :2] == 0).all()
    assert (answer.scale[2:] != 0).all()  # 2 and 3 are revived
    assert error(answer, G) < 1e-14
    typical = np.abs(m[4:]).mean()
    assert (np.abs(np.log(np.abs(answer.scale[2:4]) / typical)) < np.log(100)).all()


def test_channels_without_targets_and_tokens_without_targets_stay_out():
    G, m, r2 = instance(24, 96, 1)
    G[:, 5], G[7] = 0, 0
    answer = joint_scale(G, m, r2, EPS)
    assert answer.scale[5] == m[5]
    assert not answer.before[7].any()
    assert error(answer, G) < 1e-14
    nothing = joint_scale(0 * G, m, r2, EPS)
    assert np.array_equal(nothing.scale, m)
    assert not nothing.before.any()
    assert joint_scale(G, 0 * m, r2, EPS).resort == "kept rms"


def test_a_token_that_enters_with_nothing_gets_an_rms():
    G, m, r2 = instance(24, 96, 1)
    r2[3] = 0
    answer = joint_scale(G, m, r2, EPS)
    assert error(answer, G) < 1e-14
    assert mean_square(answer.before)[3] == pytest.approx(EPS)


@pytest.mark.parametrize("noise", [0, 1e-16, 1e-14, 1e-12, 1e-10])
@pytest.mark.parametrize("copies", [2, 6])
def test_repeated_tokens(noise, copies):
    """6·20 equations for 96 unknowns, of which 20 differ by more than rounding."""
    G, m, r2 = instance(20, 96, 1)
    once = joint_scale(G, m, r2, EPS)
    rng = np.random.default_rng(0)
    G = np.repeat(G, copies, 0) * (1 + noise * rng.normal(size=(20 * copies, 96)))
    answer = joint_scale(G, m, np.repeat(r2, copies), EPS, keep_rms=True)
    assert answer.resort == "kept rms"
    assert error(answer, G) < 1e-13
    assert np.allclose(answer.scale, once.scale, rtol=1e-4)


def test_repeated_tokens_with_other_targets_are_refused():
    G, m, r2 = instance(20, 96, 1)
    with pytest.raises(Infeasible) as caught:
        joint_scale(np.vstack([G, 2 * G[:1]]), m, np.append(r2, r2[0]), EPS, keep_rms=True)
    proof = caught.value.certificate
    assert proof is not None
    assert proof.holds()


def test_single_precision_noise_between_copies_costs_little():
    """Copies that differ by 1e-6 contradict each other exactly, and the RMS need move only a little."""
    G, m, r2 = instance(20, 96, 1)
    G = np.repeat(G, 6, 0) * (1 + 1e-6 * np.random.default_rng(0).normal(size=(120, 96)))
    answer = joint_scale(G, m, np.repeat(r2, 6), EPS)
    assert error(answer, G) < 1e-14
    assert answer.shrinkage < 10


@pytest.mark.parametrize("factor", [1e-100, 1e-9, 1e9, 1e100])
def test_targets_of_any_size(factor):
    G, m, r2 = instance(24, 96, 1)
    answer = joint_scale(factor * G, m, r2, EPS)
    assert answer.resort == "kept rms"
    assert error(answer, factor * G) < 1e-14


def test_channels_of_many_sizes():
    G, m, r2 = instance(24, 96, 1)
    sizes = np.exp(3 * np.random.default_rng(0).normal(size=96))
    for answer, target in ((joint_scale(G * sizes, m, r2, EPS), G * sizes), (joint_scale(G, m * sizes, r2, EPS), G)):
        assert answer.resort == "kept rms"
        assert error(answer, target) < 1e-14


def half(scale):
    return scale.astype(np.float16).astype(float)


def single(scale):
    return scale.astype(np.float32).astype(float)


def offset_bfloat16(scale):
    """A parameter that holds m − 1 in bfloat16."""
    bits = (scale - 1).astype(np.float32).view(np.uint32)
    return 1 + ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32).astype(float)


@pytest.mark.parametrize(("stored", "kept"), [(single, 1e-14), (half, 2e-3), (offset_bfloat16, 1e-2)])
def test_the_answer_belongs_to_the_scale_as_stored(stored, kept):
    G, m, r2 = instance(24, 96, 1)
    answer = joint_scale(G, m, r2, EPS, stored=stored)
    assert np.array_equal(answer.scale, stored(answer.scale))
    assert error(answer, G) < kept
    assert answer.residual == pytest.approx(
        np.max(np.abs(answer.scale * normalised(answer.before) - G).max(1) / np.abs(G).max(1))
    )
    G, m, r2 = instance(64, 96, 1)
    moved = joint_scale(G, m, r2, EPS, stored=stored)
    assert moved.resort == "moved rms"
    assert np.array_equal(moved.scale, stored(moved.scale))
    assert error(moved, G) < 1e-14  # mean(u²) < 1 is wide: rounding the scale costs nothing


def test_what_cannot_be_used_is_refused():
    G, m, r2 = instance(3, 8)
    for bad in ((G[0], m, r2), (G, m[:-1], r2), (G, m, r2[:-1]), (G, m, -r2), (G * np.nan, m, r2), (G * 1e200, m, r2)):
        with pytest.raises(BadInput, match="joint_scale"):
            joint_scale(*bad, EPS)
    with pytest.raises(BadInput, match="eps"):
        joint_scale(G, m, r2, -1.0)
