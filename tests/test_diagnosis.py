"""Every deliberate mistake in a patch is named for what it is: the rule, the parameter, the kind."""

from __future__ import annotations

import numpy as np
import pytest
from other_patches import MATRICES, PLAIN, VIAS, Made, inner_mistakes, only, square

import controllability as ct
from controllability.execution.trace import Trace

# -------------------------------------------------------------------------------- mistakes at inner maps

INNER = [(name, MATRICES[name][0]) for name in MATRICES]


@pytest.mark.parametrize("tokens", [pytest.param((), marks=pytest.mark.slow), (3,)])
@pytest.mark.parametrize(("name", "w"), INNER)
def test_mistakes_at_an_inner_matrix_are_named(name, w, tokens):
    made = Made(name, tokens=tokens)
    for kind, wrong in inner_mistakes(made, w).items():
        problem = only(made.verify(**{w: wrong}), kind.partition(",")[0], "I-linear", w)
        assert problem.relative > 1e-7
        assert len(problem.position) == len(tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_an_inner_matrix_that_is_left_out(name):
    made, w = Made(name), MATRICES[name][0]
    patch = {n: x for n, x in made.right.items() if n != w}
    problem = only(made.check(patch), "not-moved", "I-linear", w)
    assert problem.how == f"the patch does not move {w}"


@pytest.mark.parametrize("name", ["gpt2", "gptj", "bert"])
def test_the_only_inner_matrix_is_left_out(name):
    """What is left moves the parameters of Theorem 1b, with the numbers of Theorem 1."""
    made, w = Made(name), MATRICES[name][1]
    problem = only(made.check({w: made.right[w]}), "target-vector", "O-linear", w)
    assert "δ is that of Theorem 1: the patch of the inner maps that goes with it is missing" in problem.how


@pytest.mark.parametrize(("name", "w"), INNER)
def test_a_matrix_of_the_transposed_shape(name, w):
    made = Made(name)
    problem = only(made.verify(**{w: made.right[w].swapaxes(-1, -2)}), "orientation", "I-linear", w)
    assert problem.how.endswith("turned over it does what the rule demands")
    z = made.input(w, "target")
    also = made.matrix(w, made.change(w), z / square(z)).swapaxes(-1, -2)
    assert only(made.verify(**{w: also}), "orientation", "I-linear", w).how.endswith("turned over it is still wrong")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma3"])
def test_a_square_matrix_turned_over(name):
    made = Made(name, d=6, h=6)
    w = MATRICES[name][0]
    problem = only(made.verify(**{w: made.right[w].swapaxes(-1, -2)}), "orientation", "I-linear", w)
    assert problem.remedy == "transpose it"


@pytest.mark.parametrize(("name", "node_name"), [
    ("llama", "the block's input"), ("gemma3", "the block's input"), ("mixtral", "the block's input"),
    ("gpt2", "the block's input"), ("gptj", "the output of input hidden state"),
])  # fmt: skip
def test_tapped_before_the_norm_instead_of_after_it(name, node_name):
    made = Made(name)
    w = MATRICES[name][0]
    for which, run in (("source", made.v), ("target", made.v_target)):
        tap = run[0] if isinstance(run, tuple) else run
        wrong = made.matrix(w, made.change(w), tap / square(tap))
        problem = only(made.verify(**{w: wrong}), "tap-point", "I-linear", w)
        assert f"the right factor is {node_name} in the {which} run;" in problem.how
        assert "the rule takes z, the output of " in problem.how


def test_tapped_at_the_attention_output_before_it_is_added():
    made = Made("gptj")
    w = "mlp.fc_in.weight"
    attention = made.v[1]
    wrong = made.matrix(w, made.change(w), attention / square(attention))
    problem = only(made.verify(**{w: wrong}), "tap-point", "I-linear", w)
    assert "the output of input attention output in the source run" in problem.how


def test_another_positions_patch():
    made = Made("llama", tokens=(4,))
    w = "mlp.up_proj.weight"
    problem = only(made.verify(**{w: made.right[w][[0, 3, 2, 1]]}), "other-position", "I-linear", w)
    other = {(1,): 3, (3,): 1}[problem.position]
    assert f"the right factor is the input at position {other}, and the left factor is not the rule's" in problem.how


def test_one_matrix_for_all_tokens_is_right_at_one():
    made = Made("llama", "output", tokens=(3,))
    w = "mlp.down_proj.weight"
    problem = only(made.verify(**{w: made.right[w][1]}), "other-position", "O-linear", w)
    assert problem.position != (1,)
    assert "the input at position 1" in problem.how


# -------------------------------------------------------------------------------- mistakes at outer maps


@pytest.mark.parametrize("tokens", [pytest.param((), marks=pytest.mark.slow), (3,)])
@pytest.mark.parametrize("name", PLAIN)
def test_mistakes_at_an_outer_matrix_are_named(name, tokens):
    made, w = Made(name, tokens=tokens), MATRICES[name][1]
    y, y_target, delta = made.input(w), made.input(w, "target"), made.delta()
    branch = made.change(w)
    mistakes = {
        "source-vector": (delta, y / square(y)),
        "source-vector, all of 1b": (delta + branch, y / square(y)),
        "source-output": (delta + branch, y_target / square(y_target)),
        "norm": (delta, y_target / square(y)),
        "sign": (-delta, y_target / square(y_target)),
        "epsilon": (delta, y_target / (square(y_target) + 1e-3)),
        "factor": (delta, y_target / square(y_target) / 8),
    }
    for kind, (left, right) in mistakes.items():
        only(made.verify(**{w: made.matrix(w, left, right)}), kind.partition(",")[0], "O-linear", w)


@pytest.mark.parametrize("name", PLAIN)
def test_the_skip_is_forgotten_with_theorem_1(name):
    made, w = Made(name), MATRICES[name][1]
    patch = {n: x for n, x in made.right.items() if n != w}
    problem = only(made.check(patch), "not-moved", "O-linear", w)
    assert problem.how == f"the patch does not move {w}: nothing makes up for s(v') − s(v), the change of the skip"


@pytest.mark.parametrize("tokens", [pytest.param((), marks=pytest.mark.slow), (3,)])
@pytest.mark.parametrize("name", PLAIN)
def test_mistakes_with_theorem_1b_are_named(name, tokens):
    made, w = Made(name, "output", tokens=tokens), MATRICES[name][1]
    assert list(made.right) == [w]
    y, y_target, delta, branch = made.input(w), made.input(w, "target"), made.delta(), made.change(w)
    mistakes = {
        "skip": (branch, y / square(y)),
        "target-output": (delta, y / square(y)),
        "target-vector": (delta + branch, y_target / square(y_target)),
        "target-vector, all of theorem 1": (delta, y_target / square(y_target)),
        "sign": (-delta - branch, y / square(y)),
        "norm": (delta + branch, y / square(y_target)),
        "epsilon": (delta + branch, y / (square(y) + 1e-3)),
    }
    for kind, (left, right) in mistakes.items():
        only(made.check({w: made.matrix(w, left, right)}), kind.partition(",")[0], "O-linear", w)


def test_biases_as_outer_parameters():
    made = Made("gpt2")
    right = made.right["mlp.c_proj.weight"]
    y = made.input("mlp.c_proj.weight", "target")
    bias = y @ right
    inner = {"mlp.c_fc.weight": made.right["mlp.c_fc.weight"]}
    assert made.check(inner | {"mlp.c_proj.bias": bias}).ok
    for kind, wrong in {
        "sign": -bias,
        "factor": bias / 2,
        "source-output": bias + made.change("mlp.c_proj.weight"),
    }.items():
        only(made.check(inner | {"mlp.c_proj.bias": wrong}), kind, "O-bias", "mlp.c_proj.bias")


# ------------------------------------------------------------------------ scales, offsets, normalised outputs


def gemma_scale_only(made):
    """G and n(y) of the last norm when its scale alone moves and the inner maps are patched."""
    return made.v_target - made.v + made.target.output((1, 5)), made.target.input((1, 5))


@pytest.mark.parametrize("tokens", [pytest.param((), marks=pytest.mark.slow), (3,)])
def test_the_forgotten_offset_of_gemma(tokens):
    made, w = Made("gemma3", route="scale", tokens=tokens), "post_feedforward_layernorm.weight"
    G, n = gemma_scale_only(made)
    stored = made.params[w]
    assert np.allclose(made.right[w], G / n - 1 - stored)
    only(made.verify(**{w: G / n - stored}), "offset", "O-scale", w)
    only(made.verify(**{w: -made.right[w]}), "sign", "O-scale", w)
    only(made.verify(**{w: G / n}), "whole", "O-scale", w)
    only(made.verify(**{w: (G - (1 + stored) * n) / made.input(w)}), "source-vector", "O-scale", w)


def test_the_forgotten_offset_in_the_target_branch():
    made, w = Made("gemma3", "output", route="scale"), "post_feedforward_layernorm.weight"
    n, n_target, stored = made.input(w), made.input(w, "target"), made.params[w]
    wrong = (made.v_target - made.v + stored * n_target - stored * n) / n
    only(made.check({w: wrong}), "offset", "O-scale", w)


def test_the_forgotten_offset_of_the_norm_before():
    made, w = Made("gemma3"), "mlp.gate_proj.weight"
    n = made.input("pre_feedforward_layernorm.weight")
    z = made.params["pre_feedforward_layernorm.weight"] * n
    problem = only(made.verify(**{w: made.matrix(w, made.change(w), z / square(z))}), "offset", "I-linear", w)
    assert "scale pre_feedforward_layernorm.weight without its offset 1 in the source run" in problem.how


@pytest.mark.parametrize("route", ["uniform", "secular"])
@pytest.mark.parametrize("via", VIAS)
def test_a_normalised_output_with_one_half_wrong(via, route):
    made, w = Made("gemma3", via, route=route), "mlp.down_proj.weight"
    scale = "post_feedforward_layernorm.weight"
    only(made.verify(**{w: -made.right[w]}), "sign", "O-linear", w)
    only(made.verify(**{w: made.right[w] / 2}), "factor", "O-linear", w)
    only(made.verify(**{scale: made.right[scale] + 1}), "offset", "O-normalised", scale)
    only(made.check({n: x for n, x in made.right.items() if n != scale}), "not-moved", "O-normalised", scale)
    both = made.verify(**{scale: made.right[scale] + 1, w: made.right[w] / 2})
    assert [(p.kind, p.parameter) for p in both.problems] == [("factor", w), ("offset", scale)]
    y = made.run.input(made.path(w))
    other = made.input(w, "target" if via == "output" else "source")
    wrong = made.matrix(w, made.right[w] @ y, other / square(other))
    only(made.verify(**{w: wrong}), "target-vector" if via == "output" else "source-vector", "O-linear", w)


def test_the_matrix_before_a_normalised_output_is_left_out():
    made, w = Made("gemma3", route="uniform"), "mlp.down_proj.weight"
    patch = {n: x for n, x in made.right.items() if n != w}
    only(made.check(patch), "not-moved", "O-linear", w)


@pytest.mark.parametrize("name", MATRICES)
def test_no_patch_at_all(name):
    made, w = Made(name), MATRICES[name][1]
    result = made.check({})
    assert result.residual == result.unpatched
    assert result.problems[0].kind == "not-moved"
    # the scale of the last norm alone can do it
    assert result.problems[0].parameter == ("post_feedforward_layernorm.weight" if name == "gemma3" else w)
    assert result.derivation.startswith("theorem-1b")


def test_the_skip_is_forgotten_before_a_normalised_output():
    made = Made("gemma3", route="uniform")
    inner = {n: x for n, x in made.right.items() if "gate" in n or "up" in n}
    problem = made.check(inner).problems[0]
    assert problem.kind == "not-moved"
    assert "nothing makes up for s(v') − s(v)" in problem.how


# ------------------------------------------------------------------------------------------- what else there is


def test_a_parameter_that_no_rule_moves():
    made = Made("llama")
    extra = "post_attention_layernorm.weight"
    problem = only(made.verify(**{extra: 0.1 * made.params[extra]}), "moved-too", "stays fixed", extra)
    assert problem.relative == pytest.approx(0.1)
    assert made.verify(**{extra: 0 * made.params[extra]}).ok


@pytest.mark.parametrize("via", VIAS)
@pytest.mark.parametrize("name", MATRICES)
def test_random_changes_are_none_of_the_known_mistakes(name, via):
    rng = np.random.default_rng(0)
    made = Made(name, via, tokens=(2,))
    for w in MATRICES[name] if via == "input-output" else MATRICES[name][1:]:
        wrong = rng.normal(size=made.right[w].shape)
        problem = only(
            made.verify(**{w: wrong}),
            "unknown",
            {True: "I-linear", False: None}[w == MATRICES[name][0]]
            or ("O-mixture" if name == "mixtral" else "O-linear"),
            w,
        )
        assert problem.how.startswith("none of the known mistakes: ")


@pytest.mark.parametrize("via", VIAS)
@pytest.mark.parametrize("name", ["qwen2_moe", "llama4", "gpt_oss", "deepseek_v3", "phi3", "cohere", "olmo2", "falcon"])
def test_each_part_of_other_families_patches(name, via):
    made = Made(name, via, d=8, h=12)
    assert made.check(made.right).ok
    for w, right in made.right.items():
        result = made.verify(**{w: -right})
        assert [(p.kind, p.parameter) for p in result.problems] == [("sign", w)], str(result)


def test_an_unknown_right_factor():
    made, w = Made("llama"), "mlp.gate_proj.weight"
    tap = np.random.default_rng(1).normal(size=6)
    problem = only(made.verify(**{w: made.matrix(w, made.change(w), tap / (tap @ tap))}), "other-vector", "I-linear", w)
    assert "nor a value at another node of this block" in problem.how


def test_two_mistakes_are_two_problems_and_the_rest_follows():
    made = Made("llama")
    gate, up, down = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
    result = made.verify(**{gate: -made.right[gate], down: made.right[down] / 2})
    assert [(p.kind, p.parameter) for p in result.problems] == [("sign", gate), ("factor", down)]
    result = made.verify(**{gate: -made.right[gate], up: 3 * made.right[up]})
    assert [(p.kind, p.parameter) for p in result.problems] == [("sign", gate), ("factor", up)]
    assert result.follows == (f"O-linear at {down}",)


def test_a_later_map_that_makes_up_for_an_earlier_mistake_is_right():
    made = Made("llama")
    wrong = made.right | {"mlp.gate_proj.weight": -made.right["mlp.gate_proj.weight"]}
    params = made.params | {n: made.params[n] + x for n, x in wrong.items() if "down" not in n}
    down = ct.prove(made.block, "output").construct(params, made.v, made.v_target)["mlp.down_proj.weight"]
    run, target = Trace(made.block, params, made.v), made.block(made.params, made.v_target)
    y = run.input(made.path("mlp.down_proj.weight"))
    gap = target - run.output(())
    assert made.check(wrong | {"mlp.down_proj.weight": np.outer(gap, y) / (y @ y)}).ok
    assert not made.check(wrong | {"mlp.down_proj.weight": down}).ok


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_mistakes_in_float32_are_named_too(name):
    made, w = Made(name, kind="torch", tokens=(2,), d=12, h=16), MATRICES[name][0]
    for kind, wrong in inner_mistakes(made, w).items():
        only(made.verify(**{w: wrong}), kind.partition(",")[0], "I-linear", w)


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 30), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize(("name", "via"), [("llama", "input-output"), ("gpt2", "output"), ("mixtral", "output")])
def test_noise_is_never_taken_for_a_known_mistake(name, via, seeds):
    made = Made(name, via, tokens=(2,))
    w = MATRICES[name][0 if via == "input-output" else 1]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        shape = made.right[w].shape
        rank_1 = rng.normal(size=(*shape[:-1], 1)) * rng.normal(size=(*shape[:-2], 1, shape[-1]))
        for wrong in (rng.normal(size=shape), rank_1, made.right[w] + 1e-3 * rng.normal(size=shape)):
            assert [(p.kind, p.parameter) for p in made.verify(**{w: wrong}).problems] == [("unknown", w)]
