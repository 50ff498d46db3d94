"""The transformer of ``train_regression.py`` for some steps: its training answers what its prompts ask, and its patches sum up."""

from __future__ import annotations

import pytest
import torch
import train_regression as regression

import controllability as ct


@pytest.fixture(scope="module")
def trained():
    return regression.train(steps=60)


def test_a_run_in_training_is_the_prompt_by_itself(trained):
    """What is learned in one run over all lengths is what the model does with a prompt of its own."""
    model, states, losses = trained
    assert losses[-1] < losses[0] - 0.5
    x, y = regression.draw_prompts(1, torch.Generator().manual_seed(5))
    ids = regression.make_tokenizer()(" ".join(f"z{i}" for i in range(regression.MOST)) + " q", return_tensors="pt")
    regression.put_prompt(model, states, x[0], y[0])
    with torch.no_grad():
        together = regression.answers(model, states, x, y)[0, -1]
        assert torch.allclose(model(ids["input_ids"]).logits[0, -1], together, atol=1e-4)


def test_its_curve_is_that_of_its_own_losses(trained):
    model, states, _ = trained
    x, y = regression.draw_prompts(1, torch.Generator().manual_seed(5))
    regression.put_prompt(model, states, x[0], y[0])
    context, answer = " ".join(f"z{i}" for i in range(regression.MOST)), int(regression.bins(y[0, -1]))
    curve = ct.dynamics(model, regression.make_tokenizer(), context, "q", answer=f"b{answer}", gradients=False)
    assert curve.norms.shape == (2, regression.MOST) and curve.attribution.residual < 1e-12
    prompts = regression.make_tokenizer()
    for count in (0, 1, regression.MOST):
        ids = prompts(" ".join([*(f"z{i}" for i in range(count)), "q"]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            said = model(ids).logits[0, -1].log_softmax(-1)
        assert float(curve.loss[count]) == pytest.approx(-float(said[answer]), abs=1e-3)


def test_the_gradient_of_a_demonstration_lowers_its_loss(trained):
    model, states, _ = trained
    x, y = (held[0] for held in regression.draw_prompts(1, torch.Generator().manual_seed(5)))
    name = "model.layers.1.mlp.down_proj.weight"
    found = regression.gradients(model, states, x[0], y[0], [name])[name]

    def loss():
        with torch.no_grad():
            logits = model(inputs_embeds=states(regression.vectors(x[0], y[0], True))[None, None]).logits[0, -1]
        return float(torch.nn.functional.cross_entropy(logits.double(), regression.bins(y[0])))

    before, weight, step = loss(), model.get_parameter(name), 1e-2
    with torch.no_grad():
        weight -= step * found
        after = loss()
        weight += step * found
    assert (before - after) / step == pytest.approx(float(found.norm()) ** 2, rel=0.05)
