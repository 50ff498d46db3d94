"""A comparison that cannot fail proves nothing."""

import numpy as np
import pytest
import torch
from helpers import error, hook_count, snapshot, tiny_gemma, unchanged


def test_error_sees_differences_shapes_and_nan():
    assert error(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5
    with pytest.raises(AssertionError):
        error(np.zeros(2), np.zeros(3))
    with pytest.raises(AssertionError):
        error(np.array([np.nan]), np.array([1.0]))


def test_unchanged_sees_one_bit():
    model = tiny_gemma()
    before = snapshot(model)
    assert unchanged(model, before)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0].add_(1e-7)
    assert not unchanged(model, before)


def test_hook_count_sees_a_hook():
    model = tiny_gemma()
    assert hook_count(model) == 0
    model.model.layers[0].register_forward_hook(lambda m, a, o: None)
    assert hook_count(model) == 1
