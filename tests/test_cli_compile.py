"""``controllability compile``: what it writes, that it was loaded again, what a killed run leaves, and what it refuses."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import outcome
from helpers import snapshot, unchanged

from controllability.cli import compile as compiling
from controllability.cli.main import main
from controllability.compiling import write as writing
from controllability.errors import BadInput
from controllability.models import load_patch
from controllability.models.loading import embedded_directory, load_model

CONTEXT = "Jan orders some tea . Abe orders some juice . Ned orders some lemonade ."
QUERIES = "What does Abe order ?\nWhich drink does Jan want ?\nWhich drink does Ned want ?\n"
HELDOUT = "Which drink does Abe want ?\nWhat does Jan order ?\n"
RIGHT = ["juice", "tea", "lemonade"]
DOWN = "model.layers.0.mlp.down_proj.weight"

cached = functools.cache(load_model)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(compiling, "load_model", cached)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "queries.txt").write_text(QUERIES)
    (tmp_path / "heldout.txt").write_text(HELDOUT)
    return tmp_path


def command(files, *options, context=CONTEXT, out="out"):
    """The command line; an option that is among ``options`` stands there once."""
    given = {"--context": context, "--strength": "exact", "--queries": files / "queries.txt", "--out": files / out}
    kept = [word for name, value in given.items() if name not in options for word in (name, value)]
    return [*map(str, ["compile", "embedded", *kept, *options])]


def run(capsys, files, *options, json_=True, **more):
    """(exit status, JSON or text, stderr)."""
    status, data, out, err = outcome(capsys, *command(files, *options, **more), *(["--json"] if json_ else []))
    return status, out if data is None else data, err


def untouched(files):
    """Whether only what was there before is there."""
    return sorted(path.name for path in files.iterdir()) == ["heldout.txt", "queries.txt"]


@pytest.fixture
def the_model_is_kept():
    """Yields the weights of the model that the command loads; afterwards every bit of it is what it was."""
    model = cached("embedded", "float32", False)[0]
    before = snapshot(model)
    yield before
    assert unchanged(model, before)


@torch.no_grad()
def said(model, tokenizer, text):
    """The likeliest next token."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())


# ------------------------------------------------------------------------------------ what it writes


def test_a_patch(capsys, files):
    status, data, err = run(capsys, files)
    assert (status, err) == (0, "")
    assert {"tokens", "rank", "exact", "certificate", "queries", "heldout", "unrelated", "out", "seconds"} <= set(data)
    assert (data["exact"], data["certificate"], data["heldout"], data["kind"]) == (True, None, None, "patch")
    assert data["queries"]["max_logit_error"] < 1e-3 < 5 < data["queries"]["unpatched"]["max_logit_error"]
    assert data["queries"]["top1_agreement"] == 1 > data["queries"]["unpatched"]["top1_agreement"]
    assert [row["patched"] for row in data["answers"]] == RIGHT
    assert data["verified"]["passed"] is True
    assert data["verified"]["max_logit_error"] < 1e-3
    out = Path(data["out"])
    assert (
        sorted(path.name for path in out.iterdir())
        == data["files"]
        == ["compile.json", "patch.json", "patch.safetensors"]
    )
    saved = json.loads((out / "compile.json").read_text())
    assert saved["queries"] == data["queries"]
    assert "picture" not in data
    # another command reads it
    assert main(["verify", "embedded", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_logit_error"] < 1e-3
    model, tokenizer = load_model("embedded")
    with load_patch(out).applied(model):
        assert [said(model, tokenizer, text) for text in QUERIES.splitlines()] == RIGHT
    assert said(model, tokenizer, QUERIES.splitlines()[1]) != RIGHT[1]


def test_held_out_queries_and_the_picture(capsys, files):
    status, data, err = run(
        capsys, files, "--heldout", files / "heldout.txt", "--rank", 8, "--ridge", "0.01", "--picture"
    )
    assert (status, err, data["exact"]) == (0, "", False)
    assert data["rank"] <= 8
    assert data["ridge"] == 0.01
    assert data["heldout"]["texts"] == 2
    assert [row["rank"] for row in data["by_rank"]][-1] == data["rank"]
    assert (files / "out" / "compile.png").read_bytes().startswith(b"\x89PNG")
    assert data["picture"] == str(files / "out" / "compile.png")


def test_merged_weights_for_plain_transformers(capsys, files, the_model_is_kept):
    status, data, err = run(capsys, files, "--merge")
    assert (status, err, data["kind"]) == (0, "", "merged")
    assert data["verified"]["max_logit_error"] < 1e-3
    assert "plain transformers in a process of its own" in data["verified"]["how"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(files / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "out")
    assert [said(model, tokenizer, text) for text in QUERIES.splitlines()] == RIGHT
    assert not torch.equal(model.get_parameter(DOWN), the_model_is_kept[DOWN])


def test_an_adapter_for_peft(capsys, files):
    peft = pytest.importorskip("peft")
    status, data, err = run(capsys, files, "--peft")
    assert (status, err, data["kind"]) == (0, "", "peft")
    assert data["verified"]["passed"] is True
    assert "loaded by peft" in data["verified"]["how"]
    model, tokenizer = load_model("embedded")
    adapted = peft.PeftModel.from_pretrained(model, str(files / "out")).eval()
    assert [said(adapted, tokenizer, text) for text in QUERIES.splitlines()] == RIGHT


@pytest.mark.parametrize("options", [("--answer-tokens", 2), ("--via", "input-output"), ("--dtype", "float64")])
def test_options(capsys, files, options):
    status, data, err = run(capsys, files, *options)
    assert (status, err, data["exact"]) == (0, "", True)
    assert data["queries"]["max_logit_error"] < (1e-10 if "float64" in options else 1e-3)
    assert data["answer_tokens"] == (2 if "--answer-tokens" in options else 0)
    assert data["via"] == ("input-output" if "--via" in options else "output")


def test_the_text_says_what_generalises(capsys, files):
    status, text, err = run(capsys, files, "--picture", json_=False)
    assert (status, err) == (0, "")
    for part in (
        "queries, against", "unrelated text", "unpatched", "exact:", "tokens in one set of weights, rank",
        "Exactness holds on the set of queries; the held-out queries tell what generalises.",
        "verified: the patch, read from its files", "compile.png", "lemonade",
    ):  # fmt: skip
        assert part in " ".join(text.split()), part


def test_a_repeated_query_is_a_warning(capsys, files):
    (files / "queries.txt").write_text(QUERIES + "\n" + QUERIES.splitlines()[0] + "\n")
    status, data, err = run(capsys, files)
    assert status == 0
    assert err == "controllability: the queries hold 'What does Abe order ?' 2 times: it is taken once\n"
    assert data["queries"]["texts"] == 3


# ------------------------------------------------------------------------------------ what fails


def test_a_refusal_has_its_certificate(capsys, files):
    context = (
        "Jan orders some water . Ned orders some lemonade . Gus orders some milk . Ola orders some cider . "
        "Liv orders some milk . Ana orders some tea . Yan orders some cider . Mia orders some lemonade ."
    )
    names = ("Gus", "Liv", "Mia", "Ola", "Jan", "Ned", "Yan", "Ana")
    (files / "queries.txt").write_text(
        "".join(f"What does {name} order ?\nWhich drink does {name} want ?\n" for name in names)
    )
    status, data, err = run(capsys, files, "--keep-rms", context=context)
    assert (status, data["verdict"]) == (1, "condition failed")
    assert data["certificate"]["kind"] == "farkas"
    assert err.startswith("controllability: side condition failed at layer")
    assert untouched(files)


@pytest.mark.parametrize("kind", ["--merge", "--peft", None])
def test_what_does_not_come_back_as_it_was_is_not_kept(capsys, files, monkeypatch, the_model_is_kept, kind):
    real = writing.agreement
    monkeypatch.setattr(
        writing, "agreement", lambda found, wanted: real([x + 0.1 * i for i, x in enumerate(found)], wanted)
    )
    if kind == "--merge":
        monkeypatch.setattr(writing, "in_fresh_process", lambda folder, yardstick: yardstick.wanted)
    status, data, err = run(capsys, files, *([kind] if kind else []))
    assert (status, data) == (1, "")
    assert "verification failed" in err
    assert "nothing was written" in err
    assert untouched(files)


def test_a_checkpoint_that_plain_transformers_cannot_load(capsys, files, monkeypatch):
    real = writing.in_fresh_process

    def spoiled(folder, yardstick):
        (folder / "config.json").write_text("{")
        return real(folder, yardstick)

    monkeypatch.setattr(writing, "in_fresh_process", spoiled)
    status, _, err = run(capsys, files, "--merge")
    assert status == 1
    assert "plain transformers cannot load and run the checkpoint" in err
    assert untouched(files)


def test_ctrl_c_while_writing_leaves_nothing(capsys, files, monkeypatch, the_model_is_kept):
    def interrupted(folder, yardstick):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "in_fresh_process", interrupted)
    status, data, err = run(capsys, files, "--merge")
    assert (status, data, err) == (130, "", "controllability: interrupted; nothing was changed\n")
    assert untouched(files)


def test_a_killed_run_leaves_no_directory_of_that_name(files):
    code = (
        "import os, signal, sys; from controllability.compiling import write; from controllability.cli.main import main\n"
        "write._verified = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", code, *command(files)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert not (files / "out").exists()
    left = [path.name for path in files.iterdir() if path.suffix != ".txt"]
    assert len(left) == 1
    assert left[0].startswith(".out.unfinished-")


# ------------------------------------------------------------------------------------- bad input

BAD = {
    "no queries": (None, ["--queries", "none.txt"], "cannot read the queries file none.txt: No such file or directory"),
    "empty": ("\n \n", [], "queries.txt is empty: write one text a line"),
    "not utf-8": (b"What\xff", [], "queries.txt is not UTF-8: byte 4 is 0xff"),
    "overlap": (QUERIES + HELDOUT, ["--heldout", "{}/heldout.txt"], "'Which drink does Abe want ?' (and 1 more) is one of the queries"),
    "no held-out": (None, ["--heldout", "none.txt"], "cannot read the held-out queries file none.txt"),
    "no unrelated": (None, ["--unrelated", "none.txt"], "cannot read the unrelated texts file none.txt"),
    "rank": (None, ["--rank", "97"], "the rank 97 is above the model's width"),
    "rank 0": (None, ["--rank", "0"], "the rank must be at least 1, got 0"),
    "rank word": (None, ["--rank", "x"], "argument --rank: invalid int value: 'x'"),
    "ridge": (None, ["--ridge", "-1"], "the ridge λ must be a number from 0 on, got -1"),
    "ridge inf": (None, ["--ridge", "inf"], "must be a number from 0 on"),
    "ridge word": (None, ["--ridge", "much"], "argument --ridge: invalid float value: 'much'"),
    "answer tokens": (None, ["--answer-tokens", "-1"], "answer tokens must be 0 or more, got -1"),
    "answer too long": (None, ["--answer-tokens", "999"], "and 999 answer tokens; the model has 256 positions"),
    "both": (None, ["--peft", "--merge"], "argument --merge: not allowed with argument --peft"),
    "via": (None, ["--via", "x"], "argument --via: invalid choice: 'x'"),
    "keep and fit": (None, ["--keep-rms", "--ridge", "1"], "leave one of them out"),
    "empty context": (None, ["--context", " "], "the context is empty"),
    "half a character": (None, ["--context", "Mia \udcff"], r"the argument after --context is not UTF-8: character 4 is '\udcff'"),
    "no out": (None, ["--out", ""], "--out is empty"),
    "too long": ("Mia " * 300, [], "have 316 tokens; the model has 256 positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_status_2(capsys, files, name):
    content, options, reason = BAD[name]
    if content is not None:
        (files / "queries.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, data, err = run(capsys, files, *(option.format(files) for option in options))
    assert (status, data) == (2, "")
    assert err.startswith("controllability: ")
    assert reason in err
    assert err.count("\n") == 1
    assert untouched(files)


@pytest.mark.parametrize("what", ["full", "file", "link to a full one"])
def test_what_exists_is_left_alone_and_nothing_is_computed(capsys, files, monkeypatch, what):
    out = files / "out"
    if what == "file":
        out.write_text("mine")
    else:
        (files / "full").mkdir()
        (files / "full" / "mine").write_text("mine")
        out.symlink_to(files / "full") if "link" in what else (files / "full").rename(out)
    monkeypatch.setattr(compiling, "load_model", lambda *_: pytest.fail("the model was loaded"))
    status, data, err = run(capsys, files)
    assert (status, data) == (2, "")
    assert f"{out} exists already" in err
    assert what != "file" or out.read_text() == "mine"
    assert what == "file" or (out / "mine").read_text() == "mine"


def test_a_directory_that_cannot_be_made(capsys, files):
    status, _, err = run(capsys, files, out="queries.txt/out")
    assert status == 2
    assert "queries.txt/out: Not a directory" in err
    assert untouched(files)


def test_an_unknown_kind(files):
    with pytest.raises(BadInput, match="unknown kind 'zip': choose patch, peft, merged"):
        writing.write(None, None, None, files / "out", "zip")  # type: ignore[arg-type]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as left:
        main(["compile", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "controllability compile embedded --queries" in text
    assert str(embedded_directory()) not in text
