"""Shared models: tiny Gemma 3 with random weights, norms randomised, never at their neutral values."""

from __future__ import annotations

import os

import pytest
import torch
from commands import PATCH, status_of
from helpers import runs, tiny_gemma
from real_model import real_file as real_file, real_gemma as real_gemma

import controllability as ct


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models of the tests are tiny: a second thread would only wait, at full speed, for the first."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the model that comes along, loaded once: a test leaves it as it was."""
    return ct.load_model("embedded")


@pytest.fixture(scope="session")
def saved_patch(tmp_path_factory):
    """A patch of the embedded model, of scope "last"."""
    out = tmp_path_factory.mktemp("saved") / "patch"
    assert status_of(*PATCH, "--scope", "last", "--out", out, "--json") == 0
    return out


@pytest.fixture
def gemma():
    """A fresh two-layer model in float32: tests may break it."""
    return tiny_gemma(layers=2)


@pytest.fixture
def patched(gemma):
    """(model, patch, target, source) of scope "each", four positions."""
    target, source = runs(context=9, query=4)
    return gemma, ct.patch_model(gemma, target, source), target, source


@pytest.fixture(scope="session")
def saved_gemma(tmp_path_factory):
    """A model directory with its tokenizer, as ``save_pretrained`` writes it."""
    from train_embedded import make_tokenizer

    directory = tmp_path_factory.mktemp("gemma")
    tokenizer = make_tokenizer()
    tiny_gemma(layers=2, vocab=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
