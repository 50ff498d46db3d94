"""What people see and type: objects in a prompt and a notebook, tables, terminals, words for what was run, packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error, runs, tiny_gemma

import architectures
import controllability as ct
from controllability import checks
from controllability.arrays import arithmetic
from controllability.checks import LEVELS, SAID
from controllability.cli.main import main
from controllability.components import Linear, residual
from controllability.interfaces import Component, Param
from controllability.models.files import peft_check
from controllability.models.files.peft_check import check_adapter
from controllability.rules import RULES
from controllability.rules.references import PAPERS, references

ROOT = Path(__file__).parent.parent
CONTEXT, QUERY = "Mia lives in Oslo . Leo lives in Rome .", "Where does Leo live ?"


@pytest.fixture(scope="module")
def embedded():
    return ct.load_model("embedded")


@pytest.fixture(scope="module")
def patch(embedded):
    model, tokenizer = embedded
    return ct.patch_model(model, *ct.encode(tokenizer, CONTEXT, QUERY))


def command(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "controllability", *arguments], capture_output=True, text=True, env=os.environ | env
    )


# --------------------------------------------------------------------------------- objects in a prompt


def test_everything_that_holds_tensors_shows_itself_in_a_line(embedded, patch):
    model, tokenizer = embedded
    compiled = ct.compile_context(model, tokenizer, CONTEXT, [QUERY], strength="exact")
    generated = ct.generate(model, tokenizer(CONTEXT, return_tensors="pt").input_ids, max_new_tokens=1)
    block = architectures.block("gemma3")
    proof, (params, v, target) = ct.prove(block), ct.sample(block)
    reading = architectures.read(model)
    shown = [
        patch, patch.report, patch.report.layers, patch.report.layers[0], patch.report.layers[0].tokens, patch.entries[0], patch.rows,
        patch.entries[0].delta, patch.output, compiled, compiled.solution, compiled.context, *compiled.sets.values(), generated,
        generated.steps[0], reading, reading.layers[0], reading.layers[0].params, proof, proof.construct(params, v, target),
        ct.Trace(block, params, v), ct.diff(patch, patch), ct.verify(block, params, proof.construct(params, v, target), v, target),
    ]  # fmt: skip
    for one in shown:
        assert len(repr(one)) <= 250, type(one)
        assert "\n" not in repr(one), type(one)
    assert "3 layers, 5 tokens" in repr(patch)
    assert "exact" in repr(compiled)
    assert "moves 4 parameters" in repr(proof)


class Table(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.rows[-1] if self.open[-1] in ("th", "td") else self.words).append(data)


def test_a_notebook_shows_the_table_of_the_layers_and_the_sensitivity_beside_it(embedded, patch):
    found = Table(patch._repr_html_())
    assert len(found.rows) == 1 + len(patch) == 4
    heading, *rows = found.rows
    for layer, row in zip(patch, rows, strict=True):
        assert row[0] == str(layer.index)
        assert float(row[heading.index("residual")]) == pytest.approx(layer.residual, rel=0.05)
    words = " ".join(found.words)
    for explained in ("amplifies: ", "smallest margin: ", "max|Δm|/|m|: ", str(patch.sensitivity)):
        assert explained in words
    compiled = ct.compile_context(*embedded, CONTEXT, [QUERY], strength="exact")
    assert "same likeliest token" in Table(compiled._repr_html_()).rows[0]
    assert len(compiled) == len([*compiled]) == 3


def test_an_imported_patch_without_a_report_is_not_nothing(gemma, tmp_path):
    ct.patch_model(gemma, *runs(context=9, query=1)).export_peft(tmp_path / "adapter")
    back = ct.import_peft(tmp_path / "adapter", gemma)
    assert len(back) == 0
    assert bool(back)
    assert "scope 'last'" in repr(back)


def test_the_columns_are_explained_where_they_stand(capsys, patch):
    assert main(["patch", "embedded", "--context", CONTEXT, "--query", QUERY]) == 0
    for text in (capsys.readouterr().out, str(patch.report), patch.report.table()):
        for column in ("amplifies: ", "smallest margin: ", "max|Δm|/|m|: "):
            assert column in text


def test_a_scale_is_a_scale_whatever_its_module_is_called(patch):
    from controllability.models.sweep.report import COLUMNS, _cells

    for name in ("post_feedforward_layernorm.weight", "output.LayerNorm.weight", "ln_2.weight"):
        cells = dict(zip(COLUMNS, _cells(0.0, "scale", None, None, [], {name: 2.0, "mlp.weight": 0.5}), strict=True))
        assert (cells["max|Δm|/|m|"], cells["‖ΔW‖/‖W‖"]) == ("2", "0.5")


# ------------------------------------------------------------------------------------------- one shape


@pytest.mark.parametrize("batch", [1, 2])
def test_target_logits_have_one_shape(gemma, batch):
    target, source = runs(context=9, query=4, batch=batch)
    with torch.no_grad():
        wanted = gemma(**target).logits[:, -4:]
    for scope, pairs in (("each", 4), ("last", 1), ("all", 4)):
        mp = ct.patch_model(gemma, target, source, scope)
        assert mp.target_logits.shape == (batch, pairs, 60)
        assert error(mp.target_logits, wanted[:, -pairs:]) < 1e-6
    some = ct.patch_model(gemma, target, source, positions=([1, 3], [10, 12]))
    assert error(some.target_logits, wanted[:, [1, 3]]) < 1e-6


def test_samples_with_fewer_pairs_begin_with_nan(gemma):
    target, source = runs(context=9, query=4, batch=2)
    masks = [torch.ones_like(x["input_ids"]) for x in (target, source)]
    for mask in masks:
        mask[0, :2] = 0
    mp = ct.patch_model(gemma, *(x | {"attention_mask": m} for x, m in zip((target, source), masks, strict=True)))
    assert mp.target_logits.shape == (2, 4, 60)
    assert mp.target_logits.isnan().all(-1).tolist() == [[True, True, False, False], [False] * 4]
    last = ct.patch_model(gemma, *runs(context=9, query=4), scope="last")
    last.merge(gemma)
    assert last.merged_error(gemma).relative_error < 1e-5


# --------------------------------------------------------------------------------------- public names


def test_public_names_and_no_others():
    assert set(dir(ct)) == {*ct.__all__, "__version__"}
    assert {"load_model", "encode"} <= set(ct.__all__)


def test_a_device_that_is_not_there_is_named():
    assert next(ct.load_model("embedded", device="cpu")[0].parameters()).device.type == "cpu"
    with pytest.raises(ct.BadInput, match="device 'nowhere' cannot be used"):
        ct.load_model("embedded", device="nowhere")


def test_the_package_says_what_it_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["authors"] and project["urls"] == {"Paper": "https://arxiv.org/abs/2511.17864"}, (
        "the source has no public address"
    )
    named = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r"Python :: 3\.\d+", c)}
    assert named == {"3.11"}, "those that .ci/run has run on"
    assert (ROOT / "controllability/py.typed").is_file() and (ROOT / "architectures/py.typed").is_file()
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"version: {ct.__version__}\n" in cited and project["urls"]["Paper"] in cited
    assert "cff-version: 1.2.0" in cited
    for file in ("pyproject.toml", "CITATION.cff", "README.md", "CONTRIBUTING.md", "setup.py"):
        assert not re.search(r"https?://[\w.-]*\.(example|invalid|test)\b", (ROOT / file).read_text()), file


def test_an_sdist_holds_its_tests_and_a_wheel_a_readme_without_relative_links(tmp_path):
    import shutil
    import tarfile
    import zipfile

    skipped = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", "model", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "source", ignore=skipped)
    build = "import setuptools.build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "tests/helpers.py",
        "tests/data/format-4/gemma3.json",
        "docs/theory.md",
        "docs/proof.schema.json",
        "CITATION.cff",
    ):
        assert needed in held
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        meta = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"controllability/py.typed", "architectures/py.typed"} <= set(names)
    assert all(link.startswith(("https://", "#")) for link in re.findall(r"\]\(([^)]*)\)", meta))
    assert "(the mathematics, lesson 4)" in meta, "what was linked is still there"


# ---------------------------------------------------------------------------------- tables, terminals


def test_the_list_has_a_filter_and_a_line_for_each_family_when_piped():
    piped = command("list").stdout.splitlines()
    assert [line.split("\t")[0] for line in piped] == architectures.names()
    assert any("gemma3_text" in line for line in piped)  # model types are found too
    some = [line.split("\t")[0] for line in command("list", "gpt_neo").stdout.splitlines()]
    assert some == ["gpt_neo", "gpt_neox", "gpt_neox_japanese"]
    none = command("list", "no-such-family")
    assert (none.returncode, none.stdout) == (2, "")
    assert "no architecture has 'no-such-family' in its name" in none.stderr


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_stay_whole_in_every_table(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["list"]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    words = set(re.findall(r"[\w.-]+", shown))
    assert set(architectures.names()) <= words
    assert max(map(len, shown.splitlines())) <= width
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["prove", "gpt_neox_japanese", "--level", "symbolic"]) == 0
    shown = capsys.readouterr().out
    for rule in ct.prove(architectures.block("gpt_neox_japanese")).rules:
        assert rule in re.findall(r"[\w-]+", shown[shown.index("level symbolic") :])


@pytest.mark.parametrize("arguments", [("prove", "gemma3", "--level", "symbolic"), ("list", "gemma")])
def test_a_terminal_without_utf_8_gets_spellings_not_codes(arguments):
    done = command(*arguments, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii() and "\\u" not in done.stdout and "\\x" not in done.stdout
    if arguments[0] == "prove":
        assert "Delta W = delta y^T/||y||^2" in done.stdout and "|- I-before" in done.stdout
        table = [line for line in done.stdout.splitlines() if line.startswith("|") and line.endswith("|")]
        assert len({len(line) for line in table}) == 1  # the borders are in line
    assert "ΔW" in command("prove", "gemma3", PYTHONIOENCODING="utf-8").stdout


def test_tokens_are_text(capsys, tmp_path):
    """A tokenizer whose pieces begin with Ġ: nowhere in what is said or written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["Mia", "Ġlives", "Ġin", "ĠOslo", "Ġ.", "ĠWhere", "Ġ?", "Ċ", *(f"Ġw{i}" for i in range(52))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "Ġ?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="Ġ?").save_pretrained(tmp_path / "model")
    tiny_gemma(layers=2, vocab=60).save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    capsys.readouterr()
    (tmp_path / "queries").write_text("Mia Where\n")
    for given in (
        ["patch", name, "--context", "Mia lives in Oslo .", "--query", " Where Mia"], ["generate", name, "--prompt", "Mia lives in"],
        ["compile", name, "--context", "Mia lives in Oslo .", "--queries", str(tmp_path / "queries"), "--out", str(tmp_path / "out")],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            if (tmp_path / "out").exists():
                (tmp_path / "out").rename(tmp_path / "before")
            assert main([*given, *more]) == 0
            out, err = capsys.readouterr()
            assert "Ġ" not in json.dumps(json.loads(out), ensure_ascii=False) if more else "Ġ" not in out
            assert err == "" and "Ċ" not in out


def test_other_libraries_are_quiet_and_our_warnings_are_a_line(capsys, monkeypatch):
    import logging
    import warnings

    from controllability.cli import catalogue

    def noisy(having):
        logging.getLogger("bitsandbytes.backends").warning("kernels are missing")
        warnings.warn("something will change in version 6", FutureWarning, stacklevel=1)
        warnings.warn("fragile,\nthat is", ct.ControllabilityWarning, stacklevel=1)
        return []

    monkeypatch.setattr(catalogue, "rows", noisy)
    assert main(["list", "--json"]) == 0
    assert capsys.readouterr().err == "controllability: fragile, that is\n"


# -------------------------------------------------------------------------- levels and what is cited


def partly(status):
    return [{"rule": "a", "status": "passed", "method": "m"}, {"rule": "whole block", "status": status, "method": "m"}]


@pytest.mark.parametrize("status", ["passed", "skipped", "failed"])
def test_text_html_and_json_say_the_same_of_a_level(capsys, monkeypatch, status):
    monkeypatch.setattr(ct.Proof, "check", lambda self, level: partly(status))
    said = []
    for form in (["--format", "text"], ["--format", "html"], ["--json"]):
        assert main(["prove", "llama", "--level", "exact", *form]) == (status == "failed")
        said.append(capsys.readouterr().out)
    data = json.loads(said[2])
    assert data["level"] == ("exact" if status == "passed" else "derived")
    assert all(data["summary"] in " ".join(text.split()) for text in said[:2])
    assert (SAID["exact"] == data["summary"]) == (status == "passed")
    assert f"patchable ({data['level']})" in said[0]
    for text in said:
        assert "othing was computed" not in text
    if status != "passed":
        assert f"1 passed, 1 {status}" in data["summary"]


def test_a_level_is_reached_when_every_row_passed():
    assert tuple(SAID) == LEVELS
    for level in LEVELS:
        assert checks.reached(level, partly("passed")) == level
        assert checks.reached(level, partly("skipped")) == "derived"


def test_every_citation_of_the_code_resolves():
    theory = (ROOT / "docs" / "theory.md").read_text()
    sections = set(re.findall(r"^## (\d+)\. ", theory, re.M))
    for key in "GDIM":
        assert f"[{key}] " in theory
    for rule in RULES:
        text = f"{rule.source} {rule.when}"
        asked = {*re.findall(r"\[([A-Z])[],]", text), *re.findall(r"theory (\d+)", text)}
        assert {re.sub(r"\W|theory", "", key) for key in references(text)} == asked, rule.name
        assert asked <= {*PAPERS, *sections}
    for path in (*ROOT.glob("controllability/**/*.py"), *ROOT.glob("docs/*.md")):
        text = path.read_text()
        assert set(re.findall(r"theory,? (?:section )?(\d+)", text)) <= sections, path
        assert set(re.findall(r"\[([A-Z]), (?:Thm|App|Def|Alg|section)", text)) <= set("GDIM"), path
    assert not re.search(r"/work|shared/|house/|issues?/", theory)


@pytest.mark.parametrize("form", ["text", "html", "latex", "json"])
def test_every_output_has_its_references(capsys, form):
    assert main(["prove", "gemma3", "--format", form]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\n    ", " ").split())
    assert "arXiv 2511.17864" in shown and "docs/theory.md" in shown
    assert re.search("theory 4.*section 4", shown)
    if form == "json":
        assert set(json.loads(shown)["references"]) == {"[G]", "[D]", "theory 2", "theory 4"}


# ------------------------------------------------------------------------------------ one's own component

up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))


@dataclass(frozen=True)
class Own(Component):
    """A function of somebody's own."""

    function: object
    name: str = "my part"

    def __call__(self, params, x):
        return self.function(x)

    def describe(self):
        return self.name

    def output_width(self, width):
        return width


def whole(function, level, **options):
    return ct.prove(residual(up >> Own(function) >> down), **options).check(level)[-1]


def broken(x):
    raise ValueError("no such\nthing")


@pytest.mark.parametrize("level", ["symbolic", "exact", "numeric"])
def test_an_exception_inside_a_component_is_a_failure_with_its_text(level):
    row = whole(broken, level)
    assert row["status"] == "failed"
    assert row["method"].startswith("my part fails (ValueError: no such thing)")
    assert whole(lambda x: x.no_such_method(), level)["status"] == "failed"
    assert whole(lambda x: x * x, level)["status"] == "passed"


def test_what_takes_no_such_numbers_is_skipped():
    row = whole(np.exp, "symbolic")
    assert row["status"] == "skipped"
    assert "runs on float64 numbers and does not take those of this level (TypeError" in row["method"]


def test_a_float_in_exact_arithmetic_gets_a_hint():
    block = residual(up >> Own(lambda x: 0.1 * x) >> down)
    with pytest.raises(ct.BadInput, match=r"number\(Fraction\(1, 10\)\)"):
        ct.prove(block).construct(*ct.sample(block, "rational"))
    row = whole(lambda x: 0.1 * x, "exact", via="output", jointly=True)
    assert (row["status"], "Fraction(1, 10)" in row["method"]) == ("failed", True)

    def as_told(x):
        return arithmetic(x).number(Fraction(1, 10)) * x

    block = residual(up >> Own(as_told) >> down)
    ct.prove(block).construct(*ct.sample(block, "rational"))
    assert whole(as_told, "exact", via="output", jointly=True)["status"] == "passed"


def turned(x):
    middle = x.shape[-1] // 2
    return np.concatenate([-x[..., middle:], x[..., :middle]], -1)


def test_parts_are_put_together_in_index_notation():
    assert whole(turned, "symbolic")["status"] == "passed"
    assert whole(lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]], "symbolic")["status"] == "passed"
    assert whole(lambda x: np.stack([x, x])[0], "symbolic")["status"] == "skipped"  # no other function of NumPy


def test_a_view_and_a_state_point_are_explained():
    reference = (ROOT / "docs" / "reference.md").read_text()
    for word in ("view.param(name, *sizes)", "`architectures.StatePoint`", "`Seen`"):
        assert word in reference
    for documented in (architectures.View.param, architectures.StatePoint):
        assert ">>>" in documented.__doc__


# -------------------------------------------------------------------------------------------- adapters


def test_adapters_of_mixed_ranks_are_right_for_loaders_that_know_one_rank(gemma, tmp_path):
    from safetensors.torch import load_file

    mp = ct.patch_model(gemma, *runs(context=9, query=3), scope="all")
    small = next(e for e in mp.entries if e.param.name.endswith("up_proj.weight"))
    less = type(small.delta)(small.delta.left[:1], small.delta.right[:1])
    mp.entries = tuple(type(e)(e.param, less, e.layer) if e is small else e for e in mp.entries)
    done = mp.export_peft(tmp_path / "adapter", gemma)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["r"] == config["lora_alpha"] == done.rank == 3
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for entry in mp.entries:
        key = f"base_model.model.{entry.module}"
        if f"{key}.lora_A.weight" not in held:
            continue
        a, b = held[f"{key}.lora_A.weight"], held[f"{key}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == config["r"]
        plain = config["lora_alpha"] / config["r"] * (b @ a)  # what a loader without patterns adds
        assert error(plain, entry.delta.dense().reshape(plain.shape)) < 1e-6
    back = ct.import_peft(tmp_path / "adapter", gemma)
    ranks = {str(e.param): e.delta.left.shape[-2] for e in back.entries if hasattr(e.delta, "left")}
    assert ranks[str(small.param)] == 1 and max(ranks.values()) == 3  # what only fills up is no rank


def test_a_failed_check_of_an_adapter_names_the_true_reason(tmp_path, monkeypatch):
    model = tiny_gemma(layers=2)
    mp = ct.patch_model(model, *runs(context=9, query=3), scope="last")
    mp.export_peft(tmp_path / "adapter", model)

    def reason(directory):
        with pytest.raises(ct.NotVerified, match="misses the patched model's") as failed:
            check_adapter(mp, directory, model)
        return str(failed.value)

    from safetensors.torch import load_file, save_file

    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(n for n in held if "1.mlp.down_proj.lora_B" in n)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_bytes(
        (tmp_path / "adapter" / "adapter_config.json").read_bytes()
    )
    save_file(
        held | {name: 1.5 * held[name]}, tmp_path / "other" / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    assert "holds another change of model.layers.1.mlp.down_proj.weight than the patch, off by 0.33" in reason(
        tmp_path / "other"
    )

    def past(self, x):  # reads the weight of a module that PEFT has wrapped
        wrapped = self.up_proj
        inner = getattr(wrapped, "base_layer", wrapped)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, inner.weight))

    mlp = type(model.model.layers[0].mlp)
    plain = mlp.forward
    twin = peft_check.on_twin

    def on_twin(*given):
        adapted = twin(*given)
        monkeypatch.setattr(mlp, "forward", past)
        return adapted

    monkeypatch.setattr(peft_check, "on_twin", on_twin)
    assert "model.layers.0.mlp.up_proj never ran, so its weights are read past" in reason(tmp_path / "adapter")
    monkeypatch.setattr(mlp, "forward", plain)
    monkeypatch.setattr(peft_check, "on_twin", twin)
    monkeypatch.setattr(peft_check, "VERIFIED", type("Strict", (), {"of": lambda *_: 1e-12})())
    assert "the file holds another change" in reason(
        tmp_path / "adapter"
    ) or "what is left is how PEFT rounds" in reason(tmp_path / "adapter")


# -------------------------------------------------------------------------------------------- pictures


def drawn(monkeypatch, module):
    """What a picture's figure is when it is written."""
    kept = []
    right = module.drawn
    monkeypatch.setattr(
        module,
        "drawn",
        lambda figure, path, *more, **how: (figure.canvas.draw(), kept.append(figure), right(figure, path))[2],
    )
    return kept


def sound(figure):
    """Legends lie outside the axes, marks inside, and no bar stands on a scale of powers."""
    for axes in figure.axes:
        box = axes.get_window_extent()
        legend = axes.get_legend()
        if legend is not None:
            assert legend.get_window_extent().y1 <= box.y0, "a legend covers data"
        assert not (axes.patches and axes.get_yscale() == "log"), "bars without a foot"
        for line in axes.lines:
            if line.get_marker() in ("None", None, ""):
                continue
            for x, y in axes.transData.transform(np.column_stack(line.get_data())):
                if np.isfinite(y):
                    half = line.get_markersize() * figure.dpi / 144
                    assert box.x0 + half <= x <= box.x1 - half and box.y0 + half <= y <= box.y1 - half, "a mark is cut"


def test_pictures_show_all_of_their_data(embedded, patch, tmp_path, monkeypatch):
    from controllability.cli import demo
    from controllability.compiling import rank_figure
    from controllability.compiling.yardstick import Agreement

    model, tokenizer = embedded
    kept = drawn(monkeypatch, demo)
    demo.layer_picture(model, patch, *ct.encode(tokenizer, CONTEXT, QUERY), tmp_path / "demo.png")
    sound(kept[0])
    assert str(patch.sensitivity) in {text.get_text() for text in kept[0].texts}
    kept = drawn(monkeypatch, rank_figure)
    compiled = ct.compile_context(
        model, tokenizer, CONTEXT, [QUERY], heldout=["Where does Mia live ?"], strength="exact"
    )
    none = Agreement(0.0, 0.0, 1.0, 1.0, 3)  # at the edge of everything
    rows = [
        rank_figure.RankRow(1, False, dict.fromkeys(compiled.results, none)),
        rank_figure.RankRow(2, True, compiled.results),
    ]
    rank_figure.rank_picture(compiled, rows, tmp_path / "rank.png")
    sound(kept[0])


def test_verified_is_said_of_what_was(capsys, tmp_path):
    """A fit that was written and read again is the compiled model, and no more."""
    (tmp_path / "queries").write_text(f"{QUERY}\nWhere does Mia live ?\n")
    given = ["compile", "embedded", "--context", CONTEXT, "--queries", str(tmp_path / "queries")]
    assert main([*given, "--ridge", "0.1", "--out", str(tmp_path / "fit")]) == 0
    fit = capsys.readouterr().out
    assert "not exact" in fit and "verified to be the compiled model, no more" in fit
    assert main([*given, "--strength", "exact", "--out", str(tmp_path / "exact")]) == 0
    assert "verified: the patch, read from its files, has a largest logit error of" in capsys.readouterr().out
