"""The main job on a trained model: Gemma 3 270M from its GGUF file (see real_model.py)."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from helpers import unchanged

import controllability as ct
from controllability.cli import patch as patching
from controllability.cli.generate import padded
from controllability.cli.main import main
from controllability.cli.protocol import INSTRUCTIONS
from controllability.models.gguf_files.head import read_head
from controllability.models.loading import encode, load_model
from controllability.models.protocol.rescale import rescaled
from controllability.models.protocol.run import run_protocol

pytestmark = pytest.mark.real

CONTEXT = "Mia lives in Oslo and works as a baker. Leo lives in Rome and paints houses."
QUERY = "Where does Leo live? Leo lives in"


def test_it_loads(real_file, real_gemma):
    model, tokenizer = real_gemma
    assert (model.config.model_type, model.config.num_hidden_layers, len(tokenizer)) == ("gemma3_text", 18, 262144)
    assert model.name_or_path == str(real_file)
    assert sum(p.numel() for p in model.parameters()) == 268_098_176
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = tokenizer("Once upon a time, there was a little", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " girl"


@pytest.mark.slow
def test_saved_as_safetensors_it_is_the_same_to_the_bit(real_gemma, tmp_path):
    model, tokenizer = real_gemma
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, words = load_model(str(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "saved")  # a gigabyte
    assert unchanged(again, model.state_dict())
    for text in (CONTEXT, "  two\tspaces\nand Zürich — 北京 🙂", "<start_of_turn>user"):
        assert words(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_command_patches_it(real_file, real_gemma, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(patching, "load_model", lambda *args: asked.append(args) or real_gemma)
    assert main(["patch", str(real_file), "--context", CONTEXT, "--query", QUERY, "--skip-sensitivity", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert asked == [(str(real_file), "float32", False, "cpu")]
    assert found["relative_error"] <= 3e-6
    assert found["max_logit_error_unpatched"] > 1e4 * found["max_logit_error"]
    assert len(found["layers"]) == 18
    assert err == ""


@pytest.mark.slow
def test_float16_is_refused_by_name(real_gemma):
    """The state of this model grows beyond 65504, with and without a patch."""
    model, tokenizer = real_gemma
    half = copy.deepcopy(model).half()
    with pytest.raises(ct.BadInput, match=r"target run: the state .* layer 8 is not finite .* the model overflows"):
        ct.patch_model(half, *encode(tokenizer, CONTEXT, QUERY))


@pytest.mark.parametrize("dtype, error, most", [
    ("float32", 3e-6, 0), pytest.param("bfloat16", 0.02, 1, marks=pytest.mark.slow),
    pytest.param("float16", 0.005, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_protocol_of_the_papers(real_gemma, dtype, error, most):
    """float16 on a copy whose states are divided by 8: as it is this model overflows (above)."""
    model, tokenizer = real_gemma
    ids, mask = padded([tokenizer(text)["input_ids"] for text in INSTRUCTIONS[:2]])
    if dtype == "float16":
        model, s = rescaled(model, {"input_ids": ids})
        assert s == 8
    elif dtype == "bfloat16":
        model = copy.deepcopy(model).to(torch.bfloat16)
    (row,) = (row.to_dict() for row in run_protocol(model, ids, mask, 4))
    assert (row["dtype"], row["tokens"], row["refused"]) == (dtype, 8, None)
    assert row["mismatches"] == row["explained"] <= most
    assert row["relative_error"] <= error
    assert row["sensitivity"] <= 4
    assert row["agreement_unpatched"] < 0.3
    assert row["max_logit_error_unpatched"] > 100 * row["max_logit_error"]


def test_an_unknown_dtype_is_refused(real_file):
    with pytest.raises(ct.BadInput, match="unknown dtype 'q4_k_m': choose one of"):
        load_model(str(real_file), "q4_k_m")


def test_a_truncated_copy_is_refused(real_file, tmp_path):
    whole = read_head(real_file)
    with real_file.open("rb") as file:
        head = file.read(whole.data_start)
    for length, size in ((100, 100), (5_000_000, 5_000_000), (len(head), whole.size // 2), (len(head), whole.size - 1)):
        with (tmp_path / "cut.gguf").open("wb") as file:
            file.write(head[:length])
            file.truncate(size)  # the rest a hole: it is not read
        with pytest.raises(ct.BadInput, match=r"cut.gguf is truncated"):
            load_model(str(tmp_path / "cut.gguf"))
