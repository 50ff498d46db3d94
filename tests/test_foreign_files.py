"""Files from outside: what they are and how large is looked at first, each is opened once; what a killed run left is removed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import struct
import time
from contextlib import contextmanager

import pytest
import torch
from helpers import runs, tiny_gemma
from safetensors.torch import save_file

import controllability as ct
from controllability.models.files import folders
from controllability.models.files.folders import written
from controllability.models.gguf_files.head import read_head
from controllability.models.loading import load_model

HUGE = 60 << 30


@contextmanager
def seconds(limit):
    """Whatever still waits or reads after so many seconds fails."""

    def late(*_):
        raise AssertionError(f"still reading after {limit} s")

    usual = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_link(path, to):
    path.unlink()
    path.symlink_to(to)


def as_directory(path):
    path.unlink()
    path.mkdir()


KINDS = {
    "pipe": (as_pipe, "a pipe and no regular file"),
    "device": (lambda path: as_link(path, "/dev/zero"), "a device and no regular file"),
    "link to a pipe": (
        lambda path: (os.mkfifo(path.parent / "pipe"), as_link(path, "pipe")), "a pipe and no regular file"
    ),
    "directory": (as_directory, "a directory and no regular file"),
    "sparse": (lambda path: os.truncate(path, HUGE), r"64,424,509,440 bytes"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_gemma()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder with a patch and an adapter."""
    folder = tmp_path_factory.mktemp("saved")
    mp = ct.patch_model(model, *runs(context=9, query=2), scope="last")
    mp.save(folder / "patch")
    mp.export_peft(folder / "adapter")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file",
    ["patch/patch.safetensors", "patch/patch.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
)
def test_what_is_no_ordinary_file_is_refused_before_it_is_read(kind, file, saved, model, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    change, why = KINDS[kind]
    change(tmp_path / "copy" / file)
    with seconds(20), pytest.raises(ct.PatchError, match=why) as said:
        if file.startswith("patch/"):
            ct.load_patch(tmp_path / "copy" / "patch")
        else:
            ct.import_peft(tmp_path / "copy" / "adapter", model)
    assert file.rpartition("/")[2] in str(said.value)


def test_links_to_ordinary_files_are_read(saved, tmp_path):
    """Caches of downloaded models consist of them."""
    (tmp_path / "linked").mkdir()
    for name in ("patch.json", "patch.safetensors"):
        (tmp_path / "linked" / name).symlink_to(saved / "patch" / name)
    assert ct.load_patch(tmp_path / "linked").entries


@pytest.mark.parametrize("announced", [100, 101 << 20, 1 << 63])
def test_a_head_that_announces_more_or_less_than_there_is_is_refused(announced, saved, tmp_path):
    shutil.copytree(saved / "patch", tmp_path / "patch")
    tensors = tmp_path / "patch" / "patch.safetensors"
    head = json.dumps({"x": {"dtype": "F32", "shape": [1 << 34], "data_offsets": [0, 4 << 34]}}).encode()
    raw = struct.pack("<Q", len(head) if announced == 100 else announced) + head
    tensors.write_bytes(raw)
    with seconds(20), pytest.raises(ct.PatchError, match=r"corrupt or truncated: .*(announces|bytes long)"):
        ct.load_patch(tmp_path / "patch")


def test_a_file_that_is_exchanged_while_it_is_checked_is_not_read(saved, tmp_path, monkeypatch):
    """What was checked is what is used: no second look at the same path."""
    shutil.copytree(saved / "patch", tmp_path / "patch")
    tensors, usual = tmp_path / "patch" / "patch.safetensors", hashlib.sha256
    wanted = ct.load_patch(tmp_path / "patch").entries[0].delta.left

    def exchanged(data=b""):
        if len(data) == tensors.stat().st_size:
            other = {k: torch.zeros_like(v) for k, v in _tensors(tensors).items()}
            save_file(other, tmp_path / "other")
            os.replace(tmp_path / "other", tensors)
        return usual(data)

    monkeypatch.setattr(hashlib, "sha256", exchanged)
    found = ct.load_patch(tmp_path / "patch").entries[0].delta.left
    monkeypatch.undo()
    assert not any(value.any() for value in _tensors(tensors).values()), "it was exchanged"
    assert torch.equal(found, wanted)


def _tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "sparse"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer_config.json", "generation_config.json", "config.json"]
)
def test_a_model_directory_with_such_a_file_is_refused(kind, file, saved_gemma, tmp_path):
    shutil.copytree(saved_gemma, tmp_path / "model")
    if not (tmp_path / "model" / file).exists():
        (tmp_path / "model" / file).write_text("{}")
    KINDS[kind][0](tmp_path / "model" / file)
    with seconds(60), pytest.raises(ct.BadInput):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_that_is_none_is_refused_before_it_is_read(kind, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    KINDS[kind][0](file)
    with seconds(20), pytest.raises(ct.BadInput, match=r"model\.gguf"):
        read_head(file)


# ------------------------------------------------------------------------------------- what killed runs leave behind


def never_ends(path, begun):
    with written(path) as folder:
        (folder / "half").write_text("a")
        begun.set()
        time.sleep(600)


def hidden(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def writing(tmp_path):
    """A process that is in the middle of writing."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=never_ends, args=(tmp_path / "first", begun))
    process.start()
    assert begun.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(how, writing, tmp_path):
    assert len(hidden(tmp_path)) == 1
    os.kill(writing.pid, how)
    writing.join()
    assert len(hidden(tmp_path)) == 1, "nobody was there to remove it"
    with written(tmp_path / "second") as folder:
        (folder / "whole").write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


def test_what_a_living_process_writes_is_left_alone(writing, tmp_path):
    (unfinished,) = hidden(tmp_path)
    with written(tmp_path / "second"):
        assert len(hidden(tmp_path)) == 2
    assert (unfinished / "half").read_text() == "a"


def test_a_try_that_is_killed_leaves_no_empty_folder_where_a_patch_would_be(tmp_path):
    directory = tmp_path / "patch"
    if not (child := os.fork()):
        folders.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        folders.refuse_unusable(directory)
    os.waitpid(child, 0)
    assert not directory.exists()
    assert [path.name for path in tmp_path.iterdir()], "it was killed after it had begun"


def test_only_folders_of_ours_are_removed(tmp_path):
    """Not what merely looks alike, and nothing behind a link."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("mine")
    mine = [tmp_path / ".notes.unfinished-chapter", tmp_path / f".x.unfinished-{'0' * 32}.bak"]
    for path in mine:
        path.mkdir()
    link = tmp_path / f".x.unfinished-{'1' * 32}"
    link.symlink_to(tmp_path / "precious")
    stale = tmp_path / f".x.unfinished-{'2' * 32}"
    stale.mkdir()
    with written(tmp_path / "new"):
        pass
    assert all(path.exists() for path in mine) and link.is_symlink()
    assert (tmp_path / "precious" / "data").read_text() == "mine"
    assert not stale.exists()


def test_without_locks_everything_is_written_and_nothing_removed(tmp_path, monkeypatch):
    from controllability.models.files import folders

    stale = tmp_path / f".x.unfinished-{'2' * 32}"
    stale.mkdir()
    monkeypatch.setattr(folders, "fcntl", None)
    with written(tmp_path / "new") as folder:
        (folder / "whole").write_text("b")
    assert stale.exists() and (tmp_path / "new" / "whole").exists()
