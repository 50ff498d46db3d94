"""A survey has the rows of every pair's own patch; what is bad is named with its line, and stops nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from commands import one_line, outcome
from family_models import build
from helpers import exactly, snapshot, unchanged
from survey_runs import draw_pairs, write_lines

import controllability as ct
from controllability.errors import BadInput, PatchError
from controllability.instrument import survey_files, surveys as module

pytest.importorskip("pyarrow", reason="surveys are Parquet files: pip install '.[tables]'")
TOKENIZER = ct.load_model("embedded")[1]
PAIRS = draw_pairs(10)


@pytest.fixture(scope="module")
def model():
    return ct.load_model("embedded", dtype="float64")[0]


@pytest.fixture(scope="module")
def small():
    return ct.load_model("embedded")[0]


def alone(model, pair, scope="each", positions="keep", **options):
    target, source = ct.encode(TOKENIZER, pair["context"], pair["query"], positions)
    found = ct.patch_model(model, target, source, scope, route="secular", **options).frame()
    return found if isinstance(found, list) else [
        {name: None if value != value else value for name, value in row.items()} for row in found.to_dict("records")
    ]  # fmt: skip


def refuse_difference(row, wanted):
    assert {name: row[name] for name in ("layer", "call", "parameter", "token", "rank", "route")} == {
        name: wanted[name] for name in ("layer", "call", "parameter", "token", "rank", "route")
    }
    for name in ("norm", "relative_norm", "cosine_to_mean", "margin"):
        assert row[name] == (None if wanted[name] is None else pytest.approx(wanted[name], rel=1e-6, abs=1e-9)), name


@pytest.mark.parametrize("options", [{}, {"scope": "last"}, {"positions": "reset"}, {"place": "mixer"}], ids=str)
def test_rows_are_those_of_each_pair_by_itself(model, options):
    before = snapshot(model)
    with exactly(torch.float64):
        found = ct.survey(model, TOKENIZER, PAIRS, batch=4, **options)
        assert unchanged(model, before) and not found.errors
        rows = found.table.to_pylist()
        for number, pair in enumerate(PAIRS):
            mine = [row for row in rows if row["sample"] == number]
            wanted = alone(model, pair, **options)
            assert len(mine) == len(wanted) and {(row["line"], row["id"]) for row in mine} == {(number + 1, pair["id"])}
            for row, other in zip(mine, wanted, strict=True):
                refuse_difference(row, other)
    assert [row["sample"] for row in rows] == sorted(row["sample"] for row in rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba"])
def test_other_families(family):
    model = build(family)
    with exactly(torch.float64):
        found = ct.survey(model, TOKENIZER, PAIRS[:4], batch=4)
        assert not found.errors
        wanted = [row for pair in PAIRS[:4] for row in alone(model, pair)]
        for row, other in zip(found.table.to_pylist(), wanted, strict=True):
            refuse_difference(row, other)


def test_padding_next_to_the_last_position_of_the_model_counts_nothing():
    """The longest context and a longer, later query in one batch: padding must not ask for positions that the model has not."""
    model = build("llama")
    limit = model.config.max_position_embeddings
    pairs = [
        {"context": "Mia " * (limit - 3), "query": "Leo ?"}, {"context": "Mia lives", "query": "Where does Leo live now ? " * 5},
    ]  # fmt: skip
    assert len(TOKENIZER(pairs[0]["context"] + " Leo ?")["input_ids"]) == limit
    with exactly(torch.float64):
        assert not ct.survey(model, TOKENIZER, pairs).errors


BAD = [
    (b'{"context": "Mia lives', "not JSON"),
    (b"\xff\xfe{}", "not UTF-8: byte 0 is 0xff"),
    (b"9" * 5000, "not JSON that can be read"),
    (b"[" * 100_000, "not JSON that can be read"),
    ([1], "no object but list"),
    ({"query": "Who ?"}, "it has no context"),
    ({"context": "Mia lives in Oslo ."}, "it has no query"),
    ({"context": 3, "query": "Who ?"}, "its context is no text"),
    ({"context": " ", "query": "Who ?"}, "the context is empty"),
    ({"context": "Mia lives in Oslo .", "query": ""}, "the query is empty"),
    (b'{"context": "\\ud800", "query": "Who ?"}', "half of a surrogate pair"),
    ({"context": "Mia lives . " * 200, "query": "Who ?"}, "beyond the model's limit of 256 positions"),
]  # fmt: skip


def test_bad_rows_are_named_and_the_others_are_as_without_them(small, tmp_path):
    lines = [PAIRS[0], b"", *(line for line, _ in BAD), PAIRS[1]]
    found = ct.survey(small, TOKENIZER, write_lines(tmp_path / "data.jsonl", lines), tmp_path / "out")
    assert [error["line"] for error in found.errors] == [*range(3, 3 + len(BAD))]
    for error, (_, words) in zip(found.errors, BAD, strict=True):
        assert words in error["error"], error
    good = ct.survey(small, TOKENIZER, PAIRS[:2])
    for row, other in zip(found.table.to_pylist(), good.table.to_pylist(), strict=True):
        assert {name: row[name] for name in ("id", "parameter", "token")} == {
            name: other[name] for name in ("id", "parameter", "token")
        }
        assert row["norm"] == pytest.approx(other["norm"], rel=1e-4, abs=1e-5)
    assert {*found.table["line"].to_pylist()} == {1, len(lines)}
    again = ct.read_survey(tmp_path / "out")
    assert (
        again.table.equals(found.table) and again.errors == found.errors and again.done == again.pairs == len(BAD) + 2
    )


def test_a_pair_that_has_no_patch_does_not_spoil_its_batch(small, monkeypatch):
    """Solving fails for one of eight: it is found in halves, and the other seven are there."""
    real, runs = module.patch_model, []

    def solve(model, target, source, **options):
        runs.append(len(target["input_ids"]))
        if bool((target["input_ids"] == wrong).any()):
            raise ct.SideConditionFailed("nothing is 0", "here", -1.0)
        return real(model, target, source, **options)

    pairs = [{"context": "Mia lives in Oslo .", "query": "Where does Mia live ?"}] * 7
    pairs.insert(3, {"context": "Leo lives in Rome .", "query": "Where does Leo live ?"})
    wrong = TOKENIZER("Rome", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(module, "patch_model", solve)
    found = ct.survey(small, TOKENIZER, pairs, batch=8)
    assert [e["sample"] for e in found.errors] == [3] and "nothing is 0" in found.errors[0]["error"]
    assert {*found.table["sample"].to_pylist()} == {*range(8)} - {3} and runs == [8, 4, 2, 2, 1, 1, 4]
    monkeypatch.setattr(module, "patch_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what is nobody's refusal is not a row
        ct.survey(small, TOKENIZER, pairs)


class Interrupted:
    """A progress that ends the run after ``count`` batches, as Ctrl-C does."""

    def __init__(self, count):
        self.count = count

    def __call__(self, stage, done, total):
        self.count -= 1
        if self.count < 0:
            raise KeyboardInterrupt


def test_an_interrupted_survey_goes_on(small, tmp_path, monkeypatch):
    whole = ct.survey(small, TOKENIZER, PAIRS, tmp_path / "whole", batch=2)
    real, runs = module.patch_model, []
    monkeypatch.setattr(module, "patch_model", lambda *a, **k: (runs.append(1), real(*a, **k))[1])
    for count in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            ct.survey(small, TOKENIZER, PAIRS, tmp_path / "out", batch=2, progress=Interrupted(count))
    part = ct.read_survey(tmp_path / "out", partial=True)
    assert part.done == 6 and "6 of 10 pairs" in repr(part)
    with pytest.raises(BadInput, match="4 of 10 pairs are not written yet"):
        ct.read_survey(tmp_path / "out")
    found = ct.survey(small, TOKENIZER, PAIRS, tmp_path / "out", batch=2)
    assert len(runs) == 5, "a batch that was written is not computed again"
    assert found.table.equals(whole.table) and found.pairs == found.done == 10
    assert sorted(p.name[:5] for p in (tmp_path / "out").iterdir()) == ["part-", "surve"]
    assert ct.survey(small, TOKENIZER, PAIRS, tmp_path / "out", batch=2).table.equals(whole.table) and len(runs) == 5


def test_several_processes_share_the_batches_and_another_number_goes_on(small, tmp_path, monkeypatch):
    whole, out = ct.survey(small, TOKENIZER, PAIRS, batch=2), tmp_path / "out"

    def process(rank, world, **options):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        return ct.survey(small, TOKENIZER, PAIRS, out, batch=2, **options)

    assert process(0, 2).done == 6
    with pytest.raises(KeyboardInterrupt):
        process(1, 2, progress=Interrupted(1))
    assert len([*out.glob("part-*")]) == 1 and len([*(out / "batches").iterdir()]) == 1
    assert process(1, 3).done == 8 and process(0, 1).done == 10
    assert ct.read_survey(out).table.equals(whole.table) and not (out / "batches").exists()
    for rank, world in (("2", "2"), ("-1", "2"), ("one", "2"), ("", "2")):
        with pytest.raises(BadInput, match="RANK"):
            process(rank, world)


def test_rows_that_stand_in_two_files_are_taken_once(small, tmp_path):
    """A process that is killed between putting batches together and letting them go."""
    out = tmp_path / "out"
    whole = ct.survey(small, TOKENIZER, PAIRS, out, batch=2).table
    (part,) = out.glob("part-*")
    (out / "batches").mkdir()
    shutil.copy(part, out / "batches" / "000001.parquet")
    assert ct.read_survey(out).table.equals(whole)
    assert ct.survey(small, TOKENIZER, PAIRS, out, batch=2).table.equals(whole) and not (out / "batches").exists()


def refused(match, error=BadInput, /, *given, **options):
    with pytest.raises(error, match=match):
        ct.survey(*given, **options)


def test_another_survey_is_left_alone(small, tmp_path):
    out = tmp_path / "out"
    ct.survey(small, TOKENIZER, PAIRS[:4], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = ct.load_model("embedded")[0]
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    refused("another survey: of model it", BadInput, other, TOKENIZER, PAIRS[:4], out)
    refused("another survey: of data, pairs it", BadInput, small, TOKENIZER, PAIRS[:3], out)
    refused("another survey: of data it", BadInput, small, TOKENIZER, PAIRS[1:5], out)
    refused("another survey: of batch, scope it", BadInput, small, TOKENIZER, PAIRS[:4], out, batch=3, scope="last")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    refused("neither empty nor a survey: it holds letter", BadInput, small, TOKENIZER, PAIRS[:4], tmp_path / "mine")
    refused(
        "cannot use .*letter: Not a directory", PatchError, small, TOKENIZER, PAIRS[:4], tmp_path / "mine" / "letter"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter"]


def test_what_no_pair_could_be_patched_with_is_refused_at_once(small, tmp_path):
    for options, words in (
        ({"batch": 0}, "batch must be"), ({"batch": True}, "batch must be"), ({"scope": "all"}, "choose each or last"),
        ({"positions": "last"}, "choose keep or reset"), ({"place": "nowhere"}, "nowhere"), ({"route": "shortest"}, "shortest"),
    ):  # fmt: skip
        refused(words, BadInput, small, TOKENIZER, PAIRS, tmp_path / "out", **options)
    refused("holds no pairs", BadInput, small, TOKENIZER, [])
    refused("list of mappings, got dict", BadInput, small, TOKENIZER, PAIRS[0])
    refused("out is empty", BadInput, small, TOKENIZER, PAIRS, "")
    for raw, words in ((b"", "holds no pairs"), (b"\n \n", "holds no pairs"), ("Mia".encode("utf-16"), "no pair that can be used; line 1: it is not UTF-8")):  # fmt: skip
        (tmp_path / "data").write_bytes(raw)
        refused(words, BadInput, small, TOKENIZER, tmp_path / "data", tmp_path / "out")
    refused("cannot read .*: No such file", BadInput, small, TOKENIZER, tmp_path / "nothing", tmp_path / "out")
    refused("it is a directory", BadInput, small, TOKENIZER, tmp_path, tmp_path / "out")
    mp = ct.patch_model(small, *ct.encode(TOKENIZER, PAIRS[0]["context"], PAIRS[0]["query"]))
    with mp.applied(small):
        refused("patches are on the model", PatchError, small, TOKENIZER, PAIRS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["survey.json", "part"])
def test_damaged_files_are_named(small, tmp_path, name):
    ct.survey(small, TOKENIZER, PAIRS[:2], tmp_path / "out")
    (file,) = (tmp_path / "out").glob(f"{name}*")
    whole = file.read_bytes()
    for raw in (whole[: len(whole) // 2], b"", b'{"format": 2, "pairs": 2}'):
        file.write_bytes(raw)
        with pytest.raises((BadInput, PatchError), match=f"{file.name}.* is damaged"):
            ct.read_survey(tmp_path / "out")
    file.unlink()
    with pytest.raises(BadInput, match="2 of 2 pairs are not written" if name == "part" else "holds no survey"):
        ct.read_survey(tmp_path / "out")
    import pyarrow
    from pyarrow.parquet import write_table

    if name == "part":
        write_table(pyarrow.table({"sample": [0, 1]}), file)
        with pytest.raises(PatchError, match="no table of a survey"):
            ct.read_survey(tmp_path / "out")


def test_without_pyarrow_it_is_named(small, monkeypatch):
    monkeypatch.setattr(survey_files, "find_spec", lambda name: None)
    refused(r"pip install '\.\[tables\]'", BadInput, small, TOKENIZER, PAIRS)


def test_the_command(capsys, tmp_path):
    data, out = write_lines(tmp_path / "data.jsonl", [*PAIRS[:3], {"query": "Who ?", "id": "x"}]), tmp_path / "out"
    given = ("survey", "embedded", "--data", data, "--out", out)
    status, found, _, err = outcome(capsys, *given, "--json")
    assert (status, err) == (0, "") and (found["pairs"], found["done"], found["processes"]) == (4, 4, 1)
    assert found["errors"] == [{"sample": 3, "line": 4, "id": "x", "error": "it has no context"}]
    assert found["rows"] == ct.read_survey(out).table.num_rows > 100
    status, _, text, _ = outcome(capsys, *given)
    assert status == 0 and "it has no context" in text and f"{found['rows']} rows of 3 of 4 pairs" in text
    status, _, text, err = outcome(capsys, *given, "--scope", "last")
    assert (status, text) == (2, "")
    one_line(err, "another survey")
    (tmp_path / "none").write_text("\n")
    status, _, text, err = outcome(capsys, "survey", "embedded", "--data", tmp_path / "none", "--out", tmp_path / "new")
    assert (status, text) == (2, "") and not (tmp_path / "new").exists()
    one_line(err, "holds no pairs")


def test_an_interrupted_command_says_where_it_goes_on(capsys, tmp_path, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "patch_model", press)
    data = write_lines(tmp_path / "data.jsonl", PAIRS[:3])
    status, _, _, err = outcome(capsys, "survey", "embedded", "--data", data, "--out", tmp_path / "out")
    assert status == 130 and "the same command goes on from there" in err


@pytest.mark.slow  # Ray starts processes of its own, a minute
def test_ray_runs_the_same_function(small, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data]'")
    data = write_lines(tmp_path / "data.jsonl", PAIRS)
    code = (  # as in docs/surveys.md
        "import sys, ray, pyarrow.parquet, controllability as ct\n"
        "class Patches:\n"
        "    def __init__(self):\n"
        "        self.model, self.tokenizer = ct.load_model('embedded')\n"
        "    def __call__(self, batch):\n"
        "        return ct.survey(self.model, self.tokenizer, batch.to_pylist()).table\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "found = ray.data.read_json(sys.argv[1], lines=True).map_batches(Patches, batch_size=5, batch_format='pyarrow', compute=ray.data.ActorPoolStrategy(size=1))\n"
        "found.write_parquet(sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(data), str(tmp_path / "out")], check=True, timeout=300)
    assert ray is not None
    from pyarrow.parquet import read_table

    found = read_table(tmp_path / "out")
    wanted = ct.survey(small, TOKENIZER, PAIRS).table
    key = lambda row: (row["id"], row["layer"], row["parameter"], row["token"])  # noqa: E731
    for one, other in zip(sorted(found.to_pylist(), key=key), sorted(wanted.to_pylist(), key=key), strict=True):
        assert key(one) == key(other) and one["norm"] == pytest.approx(other["norm"], rel=1e-3, abs=1e-5)
    assert json.dumps(sorted({*found["id"].to_pylist()})) == json.dumps(sorted(pair["id"] for pair in PAIRS))
