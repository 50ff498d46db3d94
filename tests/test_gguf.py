"""A GGUF file is a model like any other, and a bad one is refused in a line: before it is opened, read or allocated for."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from gguf_files import LAYERS, WORDS, numbers, write
from helpers import error, unchanged

import controllability as ct
from architectures import registry
from controllability.cli.main import main
from controllability.models.gguf_files.head import read_head
from controllability.models.gguf_files.load import one_reading
from controllability.models.gguf_files.sound import refuse_unsound
from controllability.models.loading import encode, load_model
from controllability.models.transformers_parts import reports_misfits

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not reports_misfits(), reason="not there: GGUF needs transformers 5.23")
QUANT = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llama") / "llama.gguf")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf", "gemma3", QUANT.Q8_0)


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_unpacked_weights_are_those_of_the_file(gemma3, dtype):
    model, tokenizer = load_model(str(gemma3), dtype)
    packed = gguf.quantize(numbers("gemma3")["blk.1.ffn_up.weight"], QUANT.Q8_0)
    wanted = torch.from_numpy(gguf.dequantize(packed, QUANT.Q8_0)).to(getattr(torch, dtype))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, wanted)
    norm = numbers("gemma3")["blk.0.ffn_norm.weight"] - 1  # the file has 1 + w
    found = model.model.layers[0].pre_feedforward_layernorm.weight
    assert torch.equal(found, torch.from_numpy(norm).to(getattr(torch, dtype)))
    assert len(tokenizer) == len(WORDS)
    assert tokenizer.decode(tokenizer("an ab")["input_ids"], skip_special_tokens=True) == "an ab"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_it_is_an_ordinary_model(request, kind, tmp_path):
    """Patched, merged, unmerged and saved like one that never was packed."""
    file = request.getfixturevalue(kind)
    model, tokenizer = load_model(str(file))
    assert not any(hasattr(model, mark) for mark in ("hf_quantizer", "is_quantized", "quantization_method"))
    assert not hasattr(model.config, "quantization_config")
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in model.parameters())
    assert not model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target, source = encode(tokenizer, "an ab an", "ab an b")
    mp = ct.patch_model(model, target, source, scope="last")
    mp.merge(model)
    with torch.no_grad():
        assert error(model(**source).logits[:, -1], mp.target_logits.reshape(1, -1)) < 1e-5
    mp.unmerge(model)
    assert unchanged(model, before)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_model(str(tmp_path))
    assert unchanged(again, before)
    assert words("ab an.")["input_ids"] == tokenizer("ab an.")["input_ids"]
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        text = (tmp_path / name).read_text()
        assert "gguf" not in text and str(file.parent) not in text, name


def test_a_saved_patch_remembers_the_file(gemma3, tmp_path):
    model, tokenizer = load_model(str(gemma3))
    mp = ct.patch_model(model, *encode(tokenizer, "an ab an", "ab an b"))
    mp.save(tmp_path / "patch", model)
    assert ct.load_patch(tmp_path / "patch").model_name == str(gemma3)
    again, _ = load_model(str(gemma3))
    with torch.no_grad(), ct.load_patch(tmp_path / "patch").applied(again):
        assert error(again(**mp.inputs["source"]).logits, mp.target_logits) < 1e-5


def test_the_export_finds_the_file_that_a_patch_remembers(gemma3, tmp_path, capsys):
    model, tokenizer = load_model(str(gemma3))
    mp = ct.patch_model(model, *encode(tokenizer, "an ab an", "ab an b"), scope="last")
    mp.save(tmp_path / "patch", model)
    assert main(["export", str(tmp_path / "patch"), "--peft", str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(gemma3)


def test_a_directory_with_one_file(tmp_path):
    write(tmp_path / "one.gguf")
    model, _ = load_model(str(tmp_path))
    assert model.name_or_path == model.config._name_or_path == str(tmp_path)
    write(tmp_path / "two.GGUF")
    with pytest.raises(
        ct.BadInput, match=r"holds 2 GGUF files: name one of them, as .*one.gguf \(one.gguf, two.GGUF\)"
    ):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path / "two.GGUF"))[0].name_or_path == str(tmp_path / "two.GGUF")


def test_safetensors_win_over_a_file_beside_them(llama, saved_gemma, tmp_path):
    for path in (*saved_gemma.iterdir(), llama):
        (tmp_path / path.name).symlink_to(path)
    assert load_model(str(tmp_path))[0].config.model_type == "gemma3_text"
    assert load_model(str(tmp_path / "llama.gguf"))[0].config.model_type == "llama"


def test_nothing_beside_the_file_is_read(llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "llama.gguf").write_bytes(b"GGUF another of this name")
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "llama.gguf").symlink_to(llama)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "adapter_config.json",
        "generation_config.json",
    ):
        (folder / name).write_text("{")
    assert load_model("../model/llama.gguf")[0].config.num_hidden_layers == LAYERS


# ------------------------------------------------------------------------------------------------- what is refused


def refused(path, *options, match):
    with pytest.raises(ct.BadInput, match=match) as error:
        load_model(str(path), *options)
    assert "\n" not in str(error.value)


def test_an_unknown_dtype(llama):
    refused(llama, "int8", match="unknown dtype 'int8': choose one of float64, float32, bfloat16, float16")


def test_what_is_no_such_file(tmp_path):
    refused(tmp_path / "no.gguf", match="the GGUF file .*no.gguf does not exist")
    (tmp_path / "dir.gguf").mkdir()
    refused(tmp_path / "dir.gguf", match="dir.gguf holds no model: config.json is missing, and so is a GGUF file")
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    refused(tmp_path / "model.bin", match=r"model.bin is not a directory, and no GGUF file by its name \(NAME.gguf\)")
    (tmp_path / "empty.gguf").touch()
    refused(tmp_path / "empty.gguf", match="empty.gguf is no GGUF file that can be read: it is empty")
    (tmp_path / "text.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    refused(tmp_path / "text.gguf", match="text.gguf is no .*: it does not begin with the letters GGUF")
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "gone")
    refused(tmp_path / "dangling.gguf", match="does not exist")


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", match="pipe.gguf: it is a pipe and no regular file")
    refused(tmp_path, match="pipe.gguf: it is a pipe and no regular file")
    (tmp_path / "null.gguf").symlink_to("/dev/zero")
    refused(tmp_path / "null.gguf", match="null.gguf: it is a device and no regular file")


def test_the_extra_is_named(llama, monkeypatch):
    import importlib.util

    usual = importlib.util.find_spec
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patching:
            patching.setattr(importlib.util, "find_spec", lambda n, *a, p=package: None if n == p else usual(n, *a))
            refused(llama, match=rf'needs the package {package}: in a checkout, pip install "\.\[gguf\]"')


def test_a_file_cut_short_anywhere(llama, tmp_path):
    """Every length of the head, and several within the tensors."""
    whole, cut = llama.read_bytes(), tmp_path / "cut.gguf"
    start = read_head(llama).data_start
    for length in [*range(1, start, 7), start, start + 1, start + 9999, len(whole) - 33]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ct.BadInput, match=r"truncated|does not begin"):
            refuse_unsound(cut, read_head(cut))
    for length in (3, 20, 400, start // 2, start + 1, len(whole) // 2):
        cut.write_bytes(whole[:length])
        refused(cut, match="truncated|does not begin")


def head(*pieces, version=3, tensors=0, entries=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(pieces)


def text(word):
    return struct.pack("<Q", len(word)) + word


HUGE = 1 << 60
IMPOSSIBLE = {
    "tensors": (head(tensors=HUGE), "announces 1,152,921,504,606,846,976 tensors, more than its 24 bytes can hold"),
    "entries": (head(entries=HUGE), "announces 1,152,921,504,606,846,976 entries"),
    "many": (head(bytes(1 << 22), entries=1 << 17), "announces 131,072 entries; at most 65,536 are read"),
    "version": (head(version=1), "its version is 1; 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
    "key": (head(struct.pack("<Q", HUGE), bytes(99), entries=1), "is truncated"),
    "list": (head(text(b"k"), struct.pack("<IIQ", 9, 6, HUGE), entries=1), "'k' announces .* items, more than its"),
    "texts": (head(text(b"k"), struct.pack("<IIQ", 9, 8, HUGE), entries=1), "'k' announces .* items, more than its"),
    "lists": (head(text(b"k"), struct.pack("<IIQ", 9, 9, 1), bytes(99), entries=1), "'k' is a list of lists"),
    "long list": (head(text(b"k"), struct.pack("<IIQ", 9, 0, 1 << 23), bytes(1 << 23), entries=1), "more than 4,194,304 items"),
    "long text": (head(text(b"k"), struct.pack("<I", 8), text(bytes(1 << 21)), entries=1), "a text of 2,097,152 bytes"),
    "type": (head(text(b"k"), struct.pack("<I", 77), bytes(99), entries=1), "'k' has the unknown type 77"),
    "twice": (head(*[text(b"k") + struct.pack("<II", 4, 1)] * 2, entries=2), "the key 'k' stands in it twice"),
    "letters": (head(text(b"\xff\xfe"), struct.pack("<II", 4, 1), entries=1), "the text at byte 32 is not UTF-8"),
    "axes": (head(text(b"w"), struct.pack("<I", 1 << 30), bytes(99), tensors=1), "'w' has 1,073,741,824 axes"),
    "alignment": (head(text(b"general.alignment"), struct.pack("<II", 4, 48), entries=1), "48, which is no power of two"),
    "nothing": (head(bytes(64)), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_heads(name, tmp_path):
    data, message = IMPOSSIBLE[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    tracemalloc.start()
    began = time.perf_counter()
    refused(tmp_path / "bad.gguf", match=message)
    assert time.perf_counter() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


def tensor(name, sizes, kind, offset):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor(b"w", (8,), 0, HUGE)], "the tensor 'w' ends at byte"),
        ([tensor(b"w", (1 << 40, 1 << 40), 0, 0)], "the tensor 'w' ends at byte"),
        ([tensor(b"w", (8, 0), 0, 0)], r"'w' has the shape \[8, 0\]"),
        ([tensor(b"w", (33,), 8, 0)], r"'w' has the shape \[33\]"),
        ([tensor(b"w", (8,), 26, 0)], "'w' is of the type I32, which the reader cannot unpack; convert"),
        ([tensor(b"w", (8,), 9999, 0)], "'w' is of the type number 9999, which the reader cannot unpack"),
        ([tensor(b"w", (8,), 0, 0)] * 2, "the tensor 'w' stands in it twice"),
        ([tensor(b"%d" % i, (64,), 0, 0) for i in range(9)], "its tensors overlap"),
        ([tensor(b"w", (8,), 0, 0)], r"does not say its architecture \(general.architecture\)"),
    ],
)
def test_impossible_tensors(tensors, message, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(head(*tensors, bytes(512), tensors=len(tensors)))
    refused(tmp_path / "bad.gguf", match=message)


ELSEWHERE = {
    "architecture": ({"kind": "clip"}, "is of the architecture 'clip', which transformers does not read from GGUF"),
    "half a model": ({"kind": "mamba"}, "the file lacks backbone"),
    "tokenizer": ({"tokenizer": False}, r"holds no tokenizer \(tokenizer.ggml.model and .tokens\)"),
    "mark": ({"facts": {"tokenizer.ggml.eos_token_id": 999}}, "its eos token has the number 999 of 39"),
    "parts": ({"facts": {"split.count": 3}}, r"is one of 3 parts of a model; join them first"),
    "scaled": ({"facts": {"llama.rope.scaling.factor": 8}}, r"scales its rotary frequencies \(llama.rope.scaling.factor = 8\)"),
    "scales": ({"tensors": numbers("llama") | {"rope_freqs.weight": np.ones(4, np.float32)}}, r"\(rope_freqs.weight\), which"),
    "layers": ({"facts": {"llama.block_count": 1 << 31}}, "announces 2,147,483,648 layers and holds 21 tensors"),
    "experts": ({"facts": {"llama.expert_count": 1 << 31}}, "announces 2,147,483,648 experts"),
    "width": ({"facts": {"llama.embedding_length": 1 << 20}}, "its model has .* numbers, and its tensors hold"),
    "vocabulary": ({"facts": {"llama.vocab_size": 1 << 30}}, "its model has .* numbers, and its tensors hold"),
    "heads": ({"facts": {"llama.attention.head_count": 0}}, "cannot load the model"),
    "another width": ({"facts": {"llama.feed_forward_length": 96}}, "has another shape for model.layers"),
    "no layers": ({"facts": {"llama.block_count": 0}}, "its llama.block_count is 0, not a number from 1 on"),
    "a layer less": ({"facts": {"llama.block_count": 3}}, "the file lacks model.layers.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_files_that_are_no_model_of_ours(name, tmp_path):
    options, message = ELSEWHERE[name]
    refused(write(tmp_path / "bad.gguf", **options), match=message)


def test_a_family_that_is_not_registered(llama, monkeypatch):
    monkeypatch.delitem(registry._REGISTERED, "llama")
    refused(llama, match="unknown architecture or model type 'llama'")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    tensors = numbers("llama")
    tensors["blk.1.ffn_up.weight"][3, 3] = value
    file = write(tmp_path / "bad.gguf", tensors=tensors)
    refused(file, match=r"not finite in float32: model.layers.1.mlp.up_proj.weight")


def test_weights_that_are_not_finite_in_the_dtype_asked_for(tmp_path):
    tensors = numbers("llama")
    tensors["blk.1.ffn_up.weight"][3, 3] = 1e6
    file = write(tmp_path / "large.gguf", tensors=tensors)
    load_model(str(file), "bfloat16")
    refused(file, "float16", match="not finite in float16: model.layers.1.mlp.up_proj.weight")


def test_any_changed_byte_of_the_head_loads_or_is_refused(llama, tmp_path):
    """Nothing else is raised, and nothing takes long."""
    whole = bytearray(llama.read_bytes())
    random = np.random.default_rng(0)
    start = read_head(llama).data_start
    outcomes = []
    began = time.perf_counter()
    for _ in range(60):
        data = bytearray(whole)
        data[int(random.integers(4, start))] ^= 1 << int(random.integers(8))
        (tmp_path / "changed.gguf").write_bytes(data)
        try:
            load_model(str(tmp_path / "changed.gguf"))
            outcomes.append("loaded")
        except (ct.BadInput, ct.ReadingError) as error:
            assert "\n" not in str(error)
            outcomes.append("refused")
    assert {*outcomes} == {"loaded", "refused"}
    assert time.perf_counter() - began < 60


# --------------------------------------------------------------------------------------------- how, and on the command line


def test_the_quick_reader_reads_what_the_usual_one_reads(llama):
    usual = gguf.GGUFReader
    with one_reading(llama):
        quick = gguf.GGUFReader(llama)
        assert gguf.GGUFReader(llama) is quick
        other = gguf.GGUFReader(str(llama), "r")
    assert gguf.GGUFReader is usual
    assert {*other.fields} - {*quick.fields} == {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
    for name, field in quick.fields.items():
        assert field.types == other.fields[name].types, name
        assert field.contents() == other.fields[name].contents(), name
    for a, b in zip(quick.tensors, other.tensors, strict=True):
        assert a.name == b.name and np.array_equal(a.data, b.data)


def test_the_reader_is_put_back_after_a_failure(tmp_path):
    usual = gguf.GGUFReader
    refused(write(tmp_path / "bad.gguf", facts={"llama.attention.head_count": 0}), match="cannot load")
    assert gguf.GGUFReader is usual


def test_the_command_prints_json_and_nothing_else(gemma3, capfd):
    assert main(["patch", str(gemma3), "--context", "an ab an b", "--query", "ab an", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["relative_error"] < 3e-6
    assert err == ""


def test_the_command_refuses_in_a_line(tmp_path, capfd):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert main(["patch", str(tmp_path / "bad.gguf"), "--context", "a", "--query", "b"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "bad.gguf is truncated" in err
