"""What people see and hold: objects in a prompt and a notebook, target logits, public names, packages, pictures."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error, runs

import architectures
import controllability as ct
from controllability.cli.main import main

ROOT = Path(__file__).parent.parent
CONTEXT, QUERY = "Mia lives in Oslo . Leo lives in Rome .", "Where does Leo live ?"


@pytest.fixture(scope="module")
def patch(embedded):
    model, tokenizer = embedded
    return ct.patch_model(model, *ct.encode(tokenizer, CONTEXT, QUERY))


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
    assert "(the mathematics, lesson 7)" in meta, "what was linked is still there"


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
    from controllability.compiling import write
    from controllability.compiling.yardstick import Agreement

    model, tokenizer = embedded
    kept = drawn(monkeypatch, demo)
    demo.layer_picture(model, patch, *ct.encode(tokenizer, CONTEXT, QUERY), tmp_path / "demo.png")
    sound(kept[0])
    assert str(patch.sensitivity) in {text.get_text() for text in kept[0].texts}
    kept = drawn(monkeypatch, write)
    compiled = ct.compile_context(
        model, tokenizer, CONTEXT, [QUERY], heldout=["Where does Mia live ?"], strength="exact"
    )
    none = Agreement(0.0, 0.0, 1.0, 1.0, 3)  # at the edge of everything
    rows = [write.RankRow(1, False, dict.fromkeys(compiled.results, none)), write.RankRow(2, True, compiled.results)]
    write.rank_picture(compiled, rows, tmp_path / "rank.png")
    sound(kept[0])
