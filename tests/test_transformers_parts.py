"""What transformers does not promise to keep: touched in one file, and where it changed one line says what was tested."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from family_models import build, inputs
from helpers import hook_count, snapshot, unchanged
from test_families import quiet

import controllability as ct
from controllability.models import transformers_parts
from controllability.models.gguf_files.load import refuse_missing_extra

ROOT = Path(__file__).parent.parent
LINE = rf"transformers {re.escape(transformers.__version__)} has no .* as it was: tested with {re.escape(transformers_parts.TESTED)}"
MINE = "controllability/models/transformers_parts.py"


def private(source: str) -> list[str]:
    """What a file takes from transformers that is not among its public names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            found += [f"{node.module}.{one.name}" for one in node.names if "." in node.module or not public(one.name)]
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.startswith("transformers.")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_experts_impl"):
            found.append(node.value)
    return found


def public(name: str) -> bool:
    return name == "logging" or name in transformers.__all__


def test_one_file_alone_touches_what_is_private():
    found = {}
    for folder in ("controllability", "architectures"):
        for path in (ROOT / folder).rglob("*.py"):
            if names := private(path.read_text(encoding="utf-8")):
                found[path.relative_to(ROOT).as_posix()] = names
    assert set(found) <= {MINE}, found
    assert private("from transformers.cache_utils import DynamicLayer") == ["transformers.cache_utils.DynamicLayer"]


@pytest.mark.parametrize("missing", ["ALL_EXPERTS_FUNCTIONS", "_grouped_linear"])
def test_a_part_that_is_gone_is_named_with_the_versions_tested(monkeypatch, missing):
    with quiet():
        model = build("mixtral", torch.float32)
        before = snapshot(model)
        monkeypatch.delattr(f"transformers.integrations.moe.{missing}")
        with pytest.raises(ct.BadInput, match=LINE) as error:
            ct.patch_model(model, *inputs("mixtral", model))
    assert "\n" not in str(error.value)
    assert hook_count(model) == 0
    assert unchanged(model, before)


def test_an_experts_switch_that_has_no_effect_any_more_is_noticed(monkeypatch):
    with quiet():
        model = build("mixtral", torch.float32)
        monkeypatch.setattr(type(model.config), "_experts_implementation", property(lambda self: "eager"))
        with pytest.raises(ct.BadInput, match=LINE):
            ct.patch_model(model, *inputs("mixtral", model))
    assert hook_count(model) == 0


def test_experts_of_an_unknown_form_are_named(monkeypatch):
    with quiet():
        model = build("mixtral", torch.float32)
        monkeypatch.setattr(transformers_parts, "is_fused", lambda experts: False)
        with pytest.raises(ct.BadInput, match="experts MixtralExperts as it was"):
            ct.patch_model(model, *inputs("mixtral", model))
    assert hook_count(model) == 0


def test_an_older_transformers_reads_no_gguf(monkeypatch, tmp_path):
    """It would give weights that do not fit random numbers, without a word."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(transformers, "__version__", "5.22.2")
    with pytest.raises(ct.BadInput, match=r"reading .*m\.gguf needs transformers 5\.23"):
        refuse_missing_extra(tmp_path / "m.gguf")
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    refuse_missing_extra(tmp_path / "m.gguf")


def test_the_versions_named_are_those_that_may_be_installed_and_those_of_the_table():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(one for one in project["dependencies"] if one.startswith("transformers"))
    oldest, newest = transformers_parts.TESTED.split(" to ")
    major, minor = newest.split(".")
    assert wanted == f"transformers>={oldest},<{major}.{int(minor) + 1}"
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \|", (ROOT / "docs" / "versions.md").read_text(encoding="utf-8"), re.M)
    tried = {one.rpartition(".")[0] for one, _ in rows}
    assert {oldest, newest} <= tried
    torch_range = next(one for one in project["dependencies"] if one.startswith("torch"))
    numbers = [tuple(map(int, one.split(".")[:2])) for _, one in rows]
    assert torch_range == f"torch>={'.'.join(map(str, min(numbers)))},<2.{max(numbers)[1] + 1}"
