"""One scale for many tokens: every promised equality, the least change, and certificates of impossibility, with referees."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog

from controllability.errors import BadInput
from controllability.jointly.certificates import Farkas, Infeasible, find_farkas
from controllability.jointly.scales import joint_scale

EPS = 1e-6


def instance(tokens, d, seed=0):
    rng = np.random.default_rng(seed)
    m = np.exp(0.5 * rng.normal(size=d)) * rng.choice([-1.0, 1.0], d)
    return rng.normal(size=(tokens, d)), m, np.exp(rng.normal(size=tokens))


def normalised(y, eps=EPS):
    return y / np.sqrt(np.mean(y * y, -1, keepdims=True) + eps)


def error(answer, G, eps=EPS):
    return np.abs(answer.scale * normalised(answer.before, eps) - G).max() / np.abs(G).max()


def mean_square(y):
    return np.mean(y * y, -1)


def phase_one(G, m, r2, kappa, eps=EPS):
    """The smallest total violation of "every RMS is kept" with the scale within a factor kappa: HiGHS, own formulation in 1/m'²."""
    T, d = G.shape
    A, q = G**2 / d, r2 / (r2 + eps)
    slack = np.hstack([np.eye(T), -np.eye(T)])
    bounds = [(1 / (mi * kappa) ** 2, (kappa / mi) ** 2) for mi in np.abs(m)] + [(0, None)] * (2 * T)
    cost = np.append(np.zeros(d), np.ones(2 * T))
    answer = linprog(cost, A_eq=np.hstack([A, slack]), b_eq=q, bounds=bounds, method="highs")
    assert answer.status == 0
    return answer.fun


def solvable(G, r2, eps=EPS):
    """Whether some s > 0 has A s = q, by nonnegative least squares of HiGHS (the boundary never occurs here)."""
    A, q = G**2 / G.shape[1], r2 / (r2 + eps)
    return linprog(np.zeros(G.shape[1]), A_eq=A, b_eq=q, bounds=(0, None), method="highs").status == 0


@pytest.mark.parametrize(("tokens", "d"), [(1, 8), (2, 8), (4, 16), (24, 96), (64, 256)])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_reaches_its_target_at_its_own_rms(tokens, d, seed):
    seeds = (s for s in itertools.count(10 * seed) if solvable(*instance(tokens, d, s)[::2]))
    G, m, r2 = instance(tokens, d, next(seeds))
    answer = joint_scale(G, m, r2, EPS)
    assert answer.resort == "kept rms"
    assert answer.certificate is None
    assert np.abs(mean_square(answer.unit) - r2 / (r2 + EPS)).max() < 1e-12
    assert np.allclose(mean_square(answer.before), r2, rtol=1e-12)
    assert error(answer, G) < 1e-12
    assert error(answer, 1.001 * G) > 1e-4  # the measure sees a wrong target
    assert answer.residual < 1e-12
    assert (np.sign(answer.scale) == np.sign(m)).all()
    assert np.array_equal(answer.unit, G / answer.scale)
    ratio = answer.scale / m
    assert answer.change == pytest.approx(max(ratio.max(), 1 / ratio.min()))
    assert answer.shrinkage == 1


@pytest.mark.parametrize(("tokens", "d", "seed"), [(2, 6, 2), (4, 16, 1), (24, 96, 0), (46, 96, 1), (40, 128, 1)])
def test_no_smaller_change_would_do(tokens, d, seed):
    G, m, r2 = instance(tokens, d, seed)
    answer = joint_scale(G, m, r2, EPS)
    assert answer.resort == "kept rms"
    excess = answer.change - 1
    assert phase_one(G, m, r2, 1 + excess * 1.0001) < 1e-7
    assert phase_one(G, m, r2, 1 + excess * 0.95) > 1e-6


def test_two_tokens_in_three_channels_by_enumeration():
    """The solutions are a segment; every point of a fine grid on it changes the scale at least as much."""
    G, m, r2 = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0]]), np.array([1.0, -0.5, 2.0]), np.array([1.0, 0.5])
    A, q = G**2 / 3, r2 / (r2 + EPS)
    along = np.cross(A[0], A[1])
    ends = []
    for out in itertools.combinations(range(3), 2):  # a vertex has one s_i = 0
        point = np.zeros(3)
        point[list(out)] = np.linalg.solve(A[:, list(out)], q)
        ends += [point] if (point >= 0).all() else []
    assert len(ends) == 2
    assert np.abs(np.cross(ends[1] - ends[0], along)).max() < 1e-9
    s = ends[0] + np.linspace(0, 1, 200_001)[1:-1, None] * (ends[1] - ends[0])
    sigma = s * m**2
    best = np.sqrt(np.maximum(sigma, 1 / sigma).max(1).min())
    answer = joint_scale(G, m, r2, EPS)
    assert 1 - 1e-6 <= (answer.change - 1) / (best - 1) < 1.05
    assert error(answer, G) < 1e-14


def test_one_token_takes_the_uniform_factor():
    G, m, r2 = instance(1, 32)
    answer = joint_scale(G, m, r2, EPS)
    c = np.sqrt(np.mean((G / m) ** 2) * (r2 + EPS) / r2)
    assert np.allclose(answer.scale, c * m, rtol=1e-12)
    assert phase_one(G, m, r2, 1 + (answer.change - 1) * 0.99) > 1e-6


def test_what_is_reached_already_stays_as_it_is():
    rng = np.random.default_rng(0)
    y, m = rng.normal(size=(24, 96)), 1 + rng.random(96)
    r2 = mean_square(y)
    answer = joint_scale(m * normalised(y), m, r2, EPS)
    assert np.array_equal(answer.scale, m)
    assert np.allclose(answer.before, y, rtol=1e-12)
    nudged = joint_scale(m * normalised(y + 1e-6 * rng.normal(size=y.shape)), m, r2, EPS)
    assert 0 < nudged.change - 1 < 1e-4  # a small step asks for a small change


def test_expectation_of_the_theory_at_96_channels():
    """About half as many tokens as channels fit: 48 often (4 of 5 in the theory's trial), 64 never."""
    fits = {
        T: [joint_scale(*instance(T, 96, seed), EPS).resort == "kept rms" for seed in range(5)] for T in (40, 48, 64)
    }
    assert all(fits[40])
    assert any(fits[48])
    assert not any(fits[64])
    for T, seen in fits.items():
        assert seen == [solvable(*(instance(T, 96, seed)[i] for i in (0, 2))) for seed in range(5)]


# --- certificates


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


# --- the other resorts


@pytest.mark.parametrize(("tokens", "d"), [(3, 3), (52, 96), (64, 96), (150, 96)])
@pytest.mark.parametrize("eps", [1e-2, 1e-6, 1e-12])
def test_where_the_rms_has_to_move_the_target_is_reached_all_the_same(tokens, d, eps):
    G, m, r2 = instance(tokens, d, 1)
    answer = joint_scale(G, m, r2, eps)
    assert answer.resort == "moved rms"
    assert error(answer, G, eps) < 1e-14
    p = mean_square(answer.unit)
    assert (p < 1).all()
    assert np.allclose(mean_square(answer.before), eps * p / (1 - p), rtol=1e-6)
    assert answer.certificate is not None
    assert answer.certificate.holds()
    fell = np.sqrt((r2 + eps) / (mean_square(answer.before) + eps))
    assert answer.shrinkage == pytest.approx(max(1, fell.max()), rel=1e-6)
    assert np.abs(fell - 1).max() > 0.01  # it did have to move


@pytest.mark.parametrize(("tokens", "d", "seed"), [(52, 96, 0), (52, 96, 1), (64, 96, 0), (40, 32, 2)])
def test_no_scale_of_that_change_shrinks_much_less(tokens, d, seed):
    """HiGHS on the same question: the least h with 1 − h·w ≤ A s < 1 within the change that was used."""
    G, m, r2 = instance(tokens, d, seed)
    answer = joint_scale(G, m, r2, EPS)
    w = EPS / (r2 + EPS)
    A = (G / m) ** 2 / d
    bounds = [(answer.change**-2, answer.change**2)] * d + [(0, None)]
    system = np.vstack([np.hstack([-A, -w[:, None] * 1e6]), np.hstack([A, np.zeros((tokens, 1))])])
    right = np.concatenate([-np.ones(tokens), 1 - w / 4])
    least = linprog(np.append(np.zeros(d), 1), A_ub=system, b_ub=right, bounds=bounds, method="highs")
    assert least.status == 0
    best = np.sqrt(1e6 * least.x[-1])
    assert best * 0.999 < answer.shrinkage < 1.15 * best
    # m' = c·m, which always works, shrinks more
    room = 1 - 0.999 * A.sum(1) / A.sum(1).max()
    assert answer.shrinkage < np.sqrt((room / w).max())


def test_a_solver_that_fails_leaves_the_enlarged_scale(monkeypatch):
    from controllability.jointly import programs

    monkeypatch.setattr(programs, "least_shrinkage", lambda *_: None)
    G, m, r2 = instance(64, 96)
    answer = joint_scale(G, m, r2, EPS)
    assert answer.resort == "enlarged"
    assert np.allclose(answer.scale / m, (answer.scale / m)[0])
    assert (answer.scale / m)[0] > np.sqrt(mean_square(G / m).max())
    assert error(answer, G) < 1e-14


def test_without_epsilon_there_is_no_other_resort():
    G, m, r2 = instance(64, 96)
    with pytest.raises(Infeasible) as caught:
        joint_scale(G, m, r2, 0.0)
    assert caught.value.certificate is not None
    assert caught.value.certificate.holds()
    answer = joint_scale(G[:30], m, r2[:30], 0.0)
    assert error(answer, G[:30], 0.0) < 1e-14


# --- special numbers


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
    assert answer.change - 1 < 1.05 * (once.change - 1)


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
