"""Whatever becomes of its streams, its arguments, the disk and the names around it, a command says so in a line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from commands import PATCH, TEXTS, one_line, status_of

import controllability as ct

ROOT = Path(__file__).parent.parent
LIST = ("list", "gemma")  # what proves little and prints something


def command(*arguments, shell="{}", env=None, **more):
    """The command in a process of its own; ``shell`` is what a shell does with it."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "controllability", *arguments))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(["bash", "-c", shell.format(words)], capture_output=True, env=environment, **more)


# --------------------------------------------------------------------------------------------------------------- streams


def test_a_closed_stderr_leaves_what_is_written_alone(tmp_path):
    done = command("prove", "gemma3", "--json", "--out", str(tmp_path / "p.json"), shell="{} 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["verdict"] == "patchable"
    assert (tmp_path / "p.json").read_bytes() == done.stdout


@pytest.mark.slow
def test_a_closed_stderr_leaves_one_json_object_on_stdout(tmp_path):
    done = command(*PATCH, "--json", "--out", str(tmp_path / "p"), shell="{} 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["relative_error"] < 1e-5
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"patch.json", "patch.safetensors"}


@pytest.mark.parametrize("arguments", [("prove", "nonsense"), ("dance",), ("prove", "jetmoe", "--place", "mixer")])
def test_with_a_closed_stderr_an_error_does_not_go_to_stdout(arguments):
    done = command(*arguments, shell="{} 2>&-")
    assert (done.returncode, done.stdout) == (1 if "jetmoe" in arguments else 2, b"")


@pytest.mark.parametrize("arguments", [(*LIST, "--json"), ("--help",), ("--version",), ("prove", "gemma3", "--help")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_an_error(arguments, unbuffered):
    done = command(*arguments, shell="{} >/dev/full", env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    one_line(done.stderr, "cannot write the result: No space left on device")


@pytest.mark.parametrize("where", [">/dev/full 2>&1", ">&- 2>&- <&-", "2>/dev/full >&-"])
def test_with_nowhere_to_write_only_the_status_is_left(where):
    assert command(*LIST, shell="{} " + where).returncode == 2


@pytest.mark.parametrize("arguments", [(*LIST, "--json"), ("--help",)])
def test_a_reader_that_leaves_is_no_failure(arguments):
    done = command(*arguments, shell="{} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, b"")


# ------------------------------------------------------------------------------------------------- bytes that are no text


@pytest.mark.parametrize("at", range(3, 9))
def test_bytes_that_are_no_utf8_in_an_argument(at):
    words = [
        os.fsencode(w)
        for w in ("patch", "embedded", "--context", "Mia", "--query", "Who", "--out", "x", "--device", "y")
    ]
    words[at] = b"Mia \xff"
    done = subprocess.run(
        [sys.executable, "-m", "controllability", *words],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    one_line(done.stderr, "not UTF-8", "character 4 is '\\udcff'")


@pytest.mark.parametrize("which", ["context", "query", "prompt", "queries", "config", "proof"])
def test_bytes_that_are_no_utf8_in_a_file(capsys, tmp_path, which):
    bad = tmp_path / "config.json"
    bad.write_bytes(b"Mia \xff")
    arguments = {
        "context": ("patch", "embedded", "--context-file", bad, "--query", "x"),
        "query": ("patch", "embedded", "--context", "x", "--query-file", bad),
        "prompt": ("generate", "embedded", "--prompt-file", bad),
        "queries": ("compile", "embedded", "--context", "x", "--queries", bad, "--out", tmp_path / "o"),
        "config": ("prove", tmp_path),
        "proof": ("recheck", bad),
    }[which]
    assert status_of(*arguments) == 2
    one_line(capsys.readouterr().err, "is not UTF-8: byte 4 is 0xff")


# -------------------------------------------------------------------------------------------------- the disk runs full


@contextlib.contextmanager
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", ["patch", "merge", "peft", "export", "demo", "prove"])
def test_a_disk_that_runs_full_is_a_line_and_leaves_nothing(capsys, tmp_path, how):
    (tmp_path / "q").write_text("Where does Mia live ?")
    out = ("--out", str(tmp_path / "new" / "out"))
    compiled = ("compile", "embedded", *TEXTS[:2], "--queries", str(tmp_path / "q"), *out)
    arguments = {
        "patch": (*PATCH, *out), "merge": (*compiled, "--merge"), "peft": (*compiled, "--peft"),
        "export": ("export", str(tmp_path / "saved"), "--model", "embedded", *out), "demo": ("demo", "--worlds", "1", *out),
        "prove": ("prove", "gemma3", "--format", "html", *out),
    }[how]  # fmt: skip
    if how == "export":
        assert status_of(*PATCH, "--scope", "last", "--out", tmp_path / "saved") == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with small_files():
        assert status_of(*arguments) == 2
    one_line(
        capsys.readouterr().err.splitlines(keepends=True)[-1],
        f"cannot write to {tmp_path / 'new' / 'out'}: File too large",
    )
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------- names that stand in the way


def theirs_of(kind, tmp_path):
    """Something of the user's that is called as our own package."""
    theirs = tmp_path / "architectures"
    if kind == "file":
        theirs.with_suffix(".py").write_text("class MyNet: ...\n")
    else:
        theirs.mkdir()
        (theirs / ("__init__.py" if kind == "package" else "notes.txt")).write_text("")
    return theirs


@pytest.mark.parametrize("kind", ["package", "file", "folder"])
def test_a_package_of_the_users_called_architectures(tmp_path, kind):
    theirs = theirs_of(kind, tmp_path)
    done = command("prove", "gemma3", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["verdict"] == "patchable"
    if kind != "folder":  # which Python itself passes by
        one_line(done.stderr, str(theirs), "rename it")


@pytest.mark.parametrize(
    ("kind", "first"), [("package", "patch_model"), *((kind, "__version__") for kind in ("package", "file", "folder"))]
)
def test_a_package_called_architectures_where_a_program_of_the_users_runs(tmp_path, kind, first):
    """Whether our own modules are the first to import ours, or the program is."""
    theirs = theirs_of(kind, tmp_path)
    run = f"import controllability as ct; ct.{first}; import architectures; print(architectures.names()[0])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert kind == "folder" or (str(theirs) in done.stderr and "rename it" in done.stderr)


def test_one_that_was_imported_first_is_named(tmp_path):
    (tmp_path / "architectures.py").write_text("class MyNet: ...\n")
    run = "import architectures; import controllability"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: {tmp_path / 'architectures.py'} has the name of controllability's own package"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, env=env)  # ours: no clash
    assert (done.returncode, done.stderr) == (0, "")


def test_files_of_the_users_that_are_called_as_packages_we_need(tmp_path):
    for name in ("numpy.py", "torch.py", "rich.py", "queue.py"):
        (tmp_path / name).write_text("raise SystemExit(77)\n")
    assert command(*LIST, "--json", cwd=tmp_path).returncode == 0


def test_a_package_that_is_another_one_is_no_internal_error(tmp_path):
    (tmp_path / "numpy.py").write_text("")
    done = command("list", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=ROOT.parent)
    assert done.returncode == 2
    one_line(done.stderr, "numpy", "is something of that name found first")


# ------------------------------------------------------------------------------------------- what drives a terminal


def tokenizer_with(directory, word, instead):
    """A copy of the embedded model in ``directory``, one word of its vocabulary replaced."""
    import shutil

    from controllability.models.loading import embedded_directory

    shutil.copytree(embedded_directory(), directory)
    path = directory / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace(json.dumps(word), json.dumps(instead)))
    return directory


@pytest.mark.parametrize("sign", ["\x1b]0;PWNED\x07", "\u202e\x9b31m"])
def test_a_tokenizer_does_not_drive_the_terminal(capsys, tmp_path, sign):
    model = tokenizer_with(tmp_path / "m", "Oslo", f"{sign}Oslo")
    context = ("--context", f"Mia lives in {sign}Oslo .")
    (tmp_path / "q").write_text("Where does Mia live ?\n")
    for arguments in (
        ("patch", model, *context, "--query", "Where does Mia live ?", "--skip-sensitivity"),
        ("generate", model, "--prompt", f"Mia lives in {sign}Oslo . Where does Mia live ?", "--tokens", "2", "--skip-sensitivity"),
        ("compile", model, *context, "--queries", tmp_path / "q", "--out", tmp_path / "out"),
    ):  # fmt: skip
        assert status_of(*arguments) == 0
        shown = capsys.readouterr()
        everything = shown.out + shown.err
        assert sign not in everything
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", everything)
        assert sign.encode("unicode_escape").decode() in everything  # it is shown, as its code


def test_a_token_makes_no_line_of_its_own(capsys, tmp_path):
    model = tokenizer_with(tmp_path / "m", "Tokyo", "Tokyo\nverified")  # what it says without the context
    assert status_of("patch", model, *TEXTS) == 0
    assert "without: Tokyo\\nverified\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    ("prove", "a\x1b[31m"), ("dance\x1b[31m",), ("list", "x\x1b[31m"), ("recheck", "x\x1b[31m"), ("verify", "embedded", "x\x1b[31m"),
    ("patch", "./x\x1b[31m", *TEXTS), ("export", "x\x1b[31m", "--out", "o"), (*PATCH, "--device", "x\x1b[31m"),
])  # fmt: skip
def test_names_do_not_drive_the_terminal(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert status_of(*arguments) == 2
    one_line(capsys.readouterr().err, "\\x1b[31m")


def test_the_name_of_a_file_does_not_drive_the_terminal(capsys, tmp_path):
    assert status_of("list", "llama", "--out", tmp_path / "\x1b]0;PWNED\x07") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "saved to" in out and "PWNED" in out


def test_a_warning_is_a_line_and_does_not_drive_the_terminal(capsys, monkeypatch):
    import warnings

    from controllability.cli import catalogue

    real = catalogue.rows
    monkeypatch.setattr(
        catalogue,
        "rows",
        lambda *a: warnings.warn("odd \x1b[31m name\n here", ct.ControllabilityWarning, stacklevel=1) or real(*a),
    )
    assert status_of("list", "--json") == 0
    assert capsys.readouterr().err == "controllability: odd \\x1b[31m name here\n"
