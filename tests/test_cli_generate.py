"""``controllability generate``: the same tokens without the context, what is shown, and what is refused."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import sys

import pytest
import torch
from commands import outcome
from rich.console import Console

from controllability.cli import generate as generating, side_by_side
from controllability.cli.generate import padded, word_after
from controllability.cli.main import main
from controllability.cli.side_by_side import Transcript
from controllability.errors import SideConditionFailed
from controllability.models.generation.steps import GeneratedToken
from controllability.models.loading import embedded_directory, load_model
from controllability.models.reading import tolerances

PETS = "Tom has a goat . Yan has a parrot . Ray has a horse . What animal does Yan own ?"
CITY = "Zoe lives in Seoul . Where does Zoe live ?"


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(generating, "load_model", cached)


cached = functools.cache(load_model)


def run(capsys, *arguments):
    """(exit status, JSON or None, stderr)."""
    status, data, _, err = outcome(capsys, "generate", *arguments)
    return status, data, err


def prompts(*texts):
    return [argument for text in texts for argument in ("--prompt", text)]


# -------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("dtype, error", [("float64", 1e-12), ("float32", 5e-6), ("bfloat16", 0.03), ("float16", 5e-3)])
def test_tokens_are_those_of_the_contextual_model(capsys, dtype, error):
    status, data, err = run(capsys, "embedded", *prompts(PETS, CITY), "--tokens", 8, "--dtype", dtype, "--json")
    assert (status, err, data["verified"]) == (0, "", True)
    model, tokenizer = load_model("embedded", dtype)
    for sample, text in zip(data["samples"], (PETS, CITY), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert [row["target_id"] for row in sample["tokens"]] == alone
        assert "".join(row["target"] for row in sample["tokens"]) == " " + tokenizer.decode(alone)
        assert [row["position"] for row in sample["tokens"]] == [ids.shape[1] - 1 + i for i in range(8)]
    assert data["tokens"] == data["samples"][0]["tokens"]
    rows = [row for sample in data["samples"] for row in sample["tokens"]]
    assert data["agreement"] == sum(row["target_id"] == row["patched_id"] for row in rows) / len(rows)
    assert data["relative_error"] == max(row["relative_error"] for row in rows) < error
    # negative control: without patches other tokens come, from other logits
    assert data["max_logit_error"] < 0.1 < 5 < data["max_logit_error_unpatched"]
    assert sum(row["unpatched"] != row["target"] for row in rows) > len(rows) / 2
    if dtype in ("float64", "float32"):
        assert data["agreement"] == 1
        assert data["tokens"][0]["target"] == data["tokens"][0]["patched"] == " parrot"
        assert data["different"] == []
    assert data["kl_max"] < 1e-3
    assert {"target", "patched"} == set(data["seconds_per_token"])


def test_sampling_draws_by_the_seed(capsys):
    found = []
    for seed in (3, 3, 4):
        options = ("--sample", "--temperature", 3, "--top-k", 50, "--top-p", 0.9, "--seed", seed, "--tokens", 6)
        status, data, _ = run(capsys, "embedded", *prompts(PETS), *options, "--json")
        assert (status, data["agreement"]) == (0, 1)
        found.append([row["patched_id"] for row in data["tokens"]])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("options", [("--via", "output"), ("--route", "secular"), ("--follow", "patched")])
def test_options(capsys, options):
    status, data, _ = run(capsys, "embedded", *prompts(PETS), "--tokens", 3, *options, "--json")
    assert (status, data["agreement"], data[options[0][2:]]) == (0, 1, options[1])
    assert data["relative_error"] < 5e-6


def test_what_is_not_within_tolerance_is_not_verified(capsys, monkeypatch):
    monkeypatch.setitem(tolerances.VERIFIED, torch.float32, 1e-12)
    assert main(["generate", "embedded", *prompts(PETS), "--tokens", "2"]) == 1
    shown = capsys.readouterr().out
    assert "NOT verified" in shown
    assert "--dtype float64 tells rounding from a mistake" in shown


def copied(tmp_path, **changes):
    """The embedded model with other settings: ``file__key=value``."""
    directory = shutil.copytree(embedded_directory(), tmp_path / "model")
    for name, value in changes.items():
        file, key = name.split("__")
        path = directory / f"{file}.json"
        data = json.loads(path.read_text())
        data.pop(key, None) if value is None else data.update({key: value})
        path.write_text(json.dumps(data))
    return directory


def test_a_prompt_that_ends_early_is_shown_and_the_others_go_on(capsys, tmp_path):
    _, tokenizer = load_model("embedded")
    mark = tokenizer.convert_tokens_to_ids("parrot")
    directory = copied(tmp_path, generation_config__eos_token_id=mark)
    status, data, _ = run(capsys, directory, *prompts(PETS, CITY), "--tokens", 4, "--json")
    assert status == 0
    assert [(s["ended_early"], len(s["tokens"])) for s in data["samples"]] == [(True, 1), (False, 4)]
    assert main(["generate", str(directory), *prompts(PETS, CITY), "--tokens", "4"]) == 0
    assert "prompt 1 ended by itself after 1 tokens" in capsys.readouterr().out


def test_a_tokenizer_without_a_padding_token(capsys, tmp_path):
    arguments = (*prompts(PETS, CITY), "--tokens", 3, "--json")
    directory = copied(
        tmp_path, tokenizer_config__pad_token=None, config__pad_token_id=None, generation_config__pad_token_id=None
    )
    assert load_model(str(directory))[1].pad_token is None
    (status, data, _), (_, with_padding, _) = run(capsys, directory, *arguments), run(capsys, "embedded", *arguments)
    assert status == 0
    assert data["samples"] == with_padding["samples"]


def test_padding_is_on_the_left():
    ids, mask = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_table_fits_the_terminal(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["generate", "embedded", *prompts(PETS, CITY), "--tokens", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["contextual", "patched", "without"]
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("token 5 of 5"))]
    assert max(map(len, table)) <= width
    column = lines[0].index("patched")
    assert "parrot" in table[2][:column]
    assert "≠" not in "".join(line[: lines[0].index("without")] for line in table)
    assert "≠" in "".join(line[lines[0].index("without") :] for line in table)
    assert "agreement 100.0% (10 of 10)" in "\n".join(lines)
    assert lines[-1].startswith("verified: the relative error is")


def test_a_terminal_without_unicode(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["generate", "embedded", *prompts(PETS + " ≠ é"), "--tokens", "2"]) == 0
    shown = sys.stdout.buffer.getvalue().decode("ascii")
    assert "!=" in shown
    assert r"\u2260 \xe9" in shown
    assert max(len(line) for line in shown.splitlines()[:5]) <= 60


def row(target, patched="", unpatched="", ids=(1, 1, 1)):
    texts = {"target": target, "patched": patched or target, "unpatched": unpatched or target}
    return texts | {f"{name}_id": i for name, i in zip(("target", "patched", "unpatched"), ids, strict=True)}


def drawn(transcript, width=60, height=None, **options):
    console = Console(width=width, file=io.StringIO(), **options)
    console.print(side_by_side.side_by_side(transcript, console, height))
    return console.file.getvalue()


def test_differences_have_a_sign_and_a_colour():
    rows = [row(" one"), row(" two", " deux", " zwei", ids=(1, 2, 3))]
    transcript = Transcript(["go"], 2, [rows])
    assert "one two" in drawn(transcript)
    assert "one ≠deux" in drawn(transcript)
    assert "one ≠zwei" in drawn(transcript)
    coloured = drawn(transcript, force_terminal=True, color_system="standard")
    assert "\x1b[1;31m ≠deux\x1b[0m" in coloured
    assert "\x1b[33m ≠zwei\x1b[0m" in coloured


def test_line_breaks_escapes_and_brackets_are_shown_as_text():
    transcript = Transcript(["a\nb [bold]"], 4, [[row("\n"), row("\x1b[31m"), row("[/bold]"), row("<eos>")]])
    assert r"prompt: a\nb [bold]" in drawn(transcript)
    assert r"\n\x1b[31m[/bold]<eos>" in drawn(transcript, width=100)


def test_the_live_view_shows_the_latest_tokens_of_what_fits():
    many = [[row(f" word{i}") for i in range(200)] for _ in range(20)]
    for height in (10, 24, 60):
        shown = drawn(Transcript(["a prompt"] * 20, 200, many), height=height).splitlines()
        assert len(shown) <= height - 3  # the numbers stand below
        assert shown[-1].strip() == f"and {20 - sum(line.startswith('prompt') for line in shown)} more prompts"
        assert "word199" in "\n".join(shown)
        assert "…" in "\n".join(shown)
    assert "and" not in drawn(Transcript(["a prompt"] * 20, 200, many))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_view_grows_on_a_terminal_and_the_result_is_on_stdout(capsys, monkeypatch):
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["generate", "embedded", *prompts(PETS), "--tokens", "4"]) == 0
    frames = re.findall(r"token (\d) of 4", terminal.getvalue())
    assert sorted(set(frames)) == ["1", "2", "3", "4"]
    assert terminal.getvalue().endswith("\x1b[2K")  # it is wiped away
    shown = capsys.readouterr().out
    assert shown.count("token 4 of 4") == 1
    assert "\x1b" not in shown


def test_without_a_terminal_nothing_moves(capsys):
    status, _, err = run(capsys, "embedded", *prompts(PETS), "--tokens", 2)
    assert (status, err) == (0, "")


def test_the_text_of_a_token_is_what_it_adds():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["a", "Ġa", "Ċ", "Ã", "©"]  # é is two of them
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert [word_after(fast, [0], i) for i in range(3)] == ["a", " a", "\n"]
    assert word_after(fast, [0], 3) == "�"  # half of a sign
    assert word_after(fast, [0, 3], 4) == "é"  # and the other half
    assert word_after(fast, [0], 99) == "token 99"


# ------------------------------------------------------------------------------------ interruption


def stopping(monkeypatch, after, error):
    """Generation in which ``error`` comes before token ``after``."""
    real = generating.generate_tokens

    def broken(*args, on_step, **options):
        done: list[GeneratedToken] = []

        def step(found):
            if len(done) == after:
                raise error
            done.append(found)
            on_step(found)

        return real(*args, on_step=step, **options)

    monkeypatch.setattr(generating, "generate_tokens", broken)


def test_ctrl_c_shows_what_was_done(capsys, monkeypatch):
    stopping(monkeypatch, 3, KeyboardInterrupt())
    status, data, _ = run(capsys, "embedded", *prompts(PETS), "--tokens", 9, "--json")
    assert (status, data["interrupted"], len(data["tokens"])) == (130, True, 3)
    assert data["samples"][0]["ended_early"] is False
    assert main(["generate", "embedded", *prompts(PETS), "--tokens", "9"]) == 130
    shown = capsys.readouterr().out
    assert "stopped after 3 of 9 tokens; the model was not changed" in shown
    assert "parrot" in shown


def test_ctrl_c_before_the_first_token(capsys, monkeypatch):
    stopping(monkeypatch, 0, KeyboardInterrupt())
    status, data, err = run(capsys, "embedded", *prompts(PETS), "--json")
    assert (status, data) == (130, None)
    assert err == "controllability: interrupted; nothing was changed\n"


def test_a_failed_condition_in_mid_generation(capsys, monkeypatch):
    stopping(monkeypatch, 2, SideConditionFailed("x ≠ 0", "linear W", 0.0))
    assert main(["generate", "embedded", *prompts(PETS), "--tokens", "5"]) == 1
    captured = capsys.readouterr()
    assert "stopped after 2 of 5 tokens" in captured.out
    assert "side condition failed at linear W" in captured.err
    status, data, _ = run(capsys, "embedded", *prompts(PETS), "--tokens", 5, "--json")
    assert (status, data["verdict"], data["culprit"]) == (1, "condition failed", "linear W")


def test_a_refused_route_says_why(capsys):
    status, data, err = run(capsys, "embedded", *prompts(PETS), "--route", "ball", "--json")
    assert (status, data["verdict"]) == (1, "condition failed")
    assert "take route='auto'" in " ".join(err.split())


def test_logits_that_are_not_finite_are_no_result(capsys, monkeypatch):
    real = generating.generate_tokens

    def broken(*args, on_step, **options):
        def step(found):
            on_step(GeneratedToken(**{**vars(found), "kl": torch.full_like(found.kl, torch.nan)}))

        return real(*args, on_step=step, **options)

    monkeypatch.setattr(generating, "generate_tokens", broken)
    status, data, err = run(capsys, "embedded", *prompts(PETS), "--tokens", 2, "--json")
    assert (status, data) == (1, None)
    assert "logits are not finite" in err


# -------------------------------------------------------------------------------------- bad input

REFUSED = {
    "no prompt": ((), "one of the arguments --prompt --prompt-file is required"),
    "empty prompt": (prompts(""), "the prompt is empty"),
    "empty among several": (prompts(PETS, " \n", CITY), "prompt 2 of 3 is empty"),
    "no tokens": ([*prompts(PETS), "--tokens", "0"], "--tokens must be at least 1, got 0"),
    "prompt too long": (
        prompts("Mia " * 300),
        "a prompt of 301 tokens and 20 more need 320 positions, the model has 256",
    ),
    "too many tokens": ([*prompts(CITY), "--tokens", "300"], "a prompt of 11 tokens and 300 more need 310 positions"),
    "temperature": ([*prompts(CITY), "--sample", "--temperature", "0"], "--temperature must be above 0, got 0"),
    "temperature nan": ([*prompts(CITY), "--sample", "--temperature", "nan"], "--temperature must be above 0, got nan"),
    "top-p": ([*prompts(CITY), "--sample", "--top-p", "1.5"], "--top-p must be above 0 and at most 1, got 1.5"),
    "top-p 0": ([*prompts(CITY), "--sample", "--top-p", "0"], "--top-p must be above 0 and at most 1, got 0"),
    "top-k": ([*prompts(CITY), "--sample", "--top-k", "0"], "--top-k must be at least 1, got 0"),
    "seed": ([*prompts(CITY), "--sample", "--seed", "-1"], "--seed must lie in 0 … 2^63 − 1, got -1"),
    "huge seed": ([*prompts(CITY), "--sample", "--seed", str(2**70)], "--seed must lie in"),
    "seed without sampling": ([*prompts(CITY), "--seed", "1"], "--seed says how tokens are drawn: add --sample"),
    "dtype": ([*prompts(CITY), "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "follow": ([*prompts(CITY), "--follow", "me"], "argument --follow: invalid choice: 'me'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_clear_line_and_status_2(capsys, name):
    arguments, reason = REFUSED[name]
    status, data, err = run(capsys, "embedded", *arguments, "--json")
    assert (status, data) == (2, None)
    assert err.startswith("controllability: ")
    assert reason in err
    assert err.count("\n") == 1


def test_a_model_that_does_not_exist(capsys, tmp_path):
    status, data, err = run(capsys, tmp_path / "none", *prompts(CITY), "--json")
    assert (status, data) == (2, None)
    assert "does not exist" in err


def test_a_tokenizer_without_tokens_for_the_prompt(capsys, monkeypatch):
    monkeypatch.setattr(generating, "load_model", lambda *args: (None, lambda text, **_: {"input_ids": []}))
    status, _, err = run(capsys, "embedded", *prompts(CITY))
    assert status == 2
    assert "the prompt has no tokens in this vocabulary" in err


def test_an_end_mark_after_the_prompt_is_left_out():
    _, tokenizer = load_model("embedded")
    marked = [*tokenizer(CITY)["input_ids"], tokenizer.eos_token_id]

    class Marking:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": marked if add_special_tokens else marked[:-1]}

    assert generating.encoded(Marking(), CITY, 0, 1) == marked[:-1]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as left:
        main(["generate", "--help"])
    assert left.value.code == 0
    assert "example:\n  controllability generate embedded --tokens" in capsys.readouterr().out
