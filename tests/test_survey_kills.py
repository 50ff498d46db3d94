"""Surveys that are killed at any moment, run by two processes, or meet a full disk: nothing written is lost, and the table is the same to the bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from survey_runs import BATCH, Runner, draw_pairs, write_lines

import controllability as ct

pytest.importorskip("pyarrow", reason="surveys are Parquet files: pip install '.[tables]'")
COUNT = 60


@pytest.fixture(scope="module")
def run():
    runner = Runner()
    yield runner.run
    runner.process.communicate(timeout=60)  # the end of its input is its own


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """(the data, the table of a survey that nobody disturbs, how long it took)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = write_lines(folder / "data.jsonl", [*draw_pairs(COUNT - 1), {"query": "Who ?"}])
    told, took, err = run(data, folder / "out")
    assert told == [*range(0, COUNT, BATCH), COUNT] and took > 0, err
    return data, ct.read_survey(folder / "out"), took


def part_of(found, whole):
    """The rows of ``whole`` of the pairs that ``found`` has."""
    import pyarrow

    return whole.filter(pyarrow.compute.is_in(whole["sample"], found["sample"].combine_chunks()))


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(run, undisturbed, tmp_path, kills):
    data, whole, took = undisturbed
    rng, out, before, reached = random.Random(kills), tmp_path / "out", set(), 0
    for kill in range(kills):
        told, ended, _ = run(data, out, kill_after=took * rng.random() * (2.0 / kills if kill < kills // 2 else 1.1))
        known = max(told, default=len(before))
        if told:
            assert told[0] >= reached, "what was written is not computed again"
            reached = max(reached, known)
        if (out / "survey.json").exists():
            found = ct.read_survey(out, partial=True)
            now = {*found.table["sample"].to_pylist()} | {error["sample"] for error in found.errors}
            assert before <= now and len(now) >= known, "a written row is lost"
            assert len(now) - known <= BATCH, "more than one batch was written and not yet told"
            assert found.table.equals(part_of(found.table, whole.table))
            before = now
        if ended:  # begin anew: what is finished cannot be killed
            assert ct.read_survey(out).table.equals(whole.table)
            out, before, reached = tmp_path / f"out {kill}", set(), 0
    told, _, err = run(data, out)
    found = ct.read_survey(out)
    assert told[0] >= reached and found.table.equals(whole.table) and found.errors == whole.errors, err
    assert sorted(path.name[:5] for path in out.iterdir()) == ["part-", "surve"], "nothing unfinished stays"


@pytest.mark.parametrize("most", [20_000, 300])
def test_a_full_disk(run, undisturbed, tmp_path, most):
    """No batch fits, or the header alone does not: one error, and the same survey goes on when there is room."""
    data, whole, _ = undisturbed
    told, took, err = run(data, tmp_path / "out", most=most)
    assert not took and "error PatchError cannot write to" in err and "File too large" in err
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name]
    if (tmp_path / "out" / "survey.json").exists():
        assert (
            "the same survey goes on from there" in err
            and ct.read_survey(tmp_path / "out", partial=True).done == told[-1]
        )
    run(data, tmp_path / "out")
    assert ct.read_survey(tmp_path / "out").table.equals(whole.table)


def test_two_processes(undisturbed, tmp_path):
    data, whole, _ = undisturbed
    command = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "controllability", "survey", "embedded",
        "--data", data, "--out", tmp_path / "out", "--batch", BATCH, "--json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"processes": 2') == 1, "the first process speaks alone"
    found = ct.read_survey(tmp_path / "out")
    assert found.table.equals(whole.table) and found.errors == whole.errors
    names = [path.name[:19] for path in sorted((tmp_path / "out").glob("part*"))]
    assert names == ["part-00000-of-00002", "part-00001-of-00002"]
