"""Promises about the project itself: import time, every rule and component in its places (imports: test_architecture.py)."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import controllability
import controllability.components as components
from controllability.interfaces import Component
from controllability.rules import RULES, Rule

ROOT = Path(__file__).parent.parent


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import controllability; s = time.perf_counter() - t;"
        "import json; print(json.dumps([s, [m for m in ('torch', 'transformers', 'sympy', 'numpy') if m in sys.modules]]))"
    )
    seconds, loaded = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert loaded == []
    assert seconds < 0.3


def test_the_mathematics_runs_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import controllability as ct, architectures\n"
        "block = architectures.block('gemma3'); params, v, t = ct.sample(block)\n"
        "patch = ct.prove(block).construct(params, v, t)\n"
        "assert ct.verify(block, params, patch, v, t).residual < 1e-12"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commands_that_need_no_model_start_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from controllability.cli.main import main\n"
        "assert main(['prove', 'gemma3']) == main(['list', 'gemma']) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_rule_is_complete_and_named_once():
    names = [(rule.name, rule.side) for rule in RULES]
    assert len(names) == len(set(names))
    assert len({rule.name: rule.statement for rule in RULES}) == len({(r.name, r.statement) for r in RULES})
    stated = {cls.__name__ for cls in Rule.__subclasses__() if cls.__module__.startswith("controllability.")} - {
        "LeafRule",
        "Assumption",
    }  # what schemas assume
    assert stated <= {type(rule).__name__ for rule in RULES}
    for rule in RULES:
        for text in (rule.statement, rule.when, rule.patch, rule.source):
            assert text
        assert rule.side in ("input", "output", "through")


def test_every_rule_stands_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    for rule in RULES:
        assert f"| {rule.name} |" in reference, f"docs/reference.md lacks the rule {rule.name}"


def exported():
    return [c for _, c in inspect.getmembers(components, inspect.isclass) if issubclass(c, Component)]


@pytest.mark.parametrize("component", exported(), ids=lambda c: c.__name__)
def test_adding_a_component_leaves_no_step_out(component):
    """Exported, documented, with a formula and an example that runs."""
    text = inspect.getdoc(component) or ""
    assert f"`{component.__name__}`" in (ROOT / "docs" / "reference.md").read_text()
    assert ">>>" in text or component.__name__ in ("Identity", "Sum", "Product"), "an example that runs"
    assert re.search(r"[xyf]", text)


def test_no_component_is_forgotten():
    defined, bases = set(), {"Component", "Combinator", "SelfWeighted", "_Elementwise", "Select"}
    package = ROOT / "controllability"
    for path in (*(package / "components").glob("*.py"), package / "interfaces" / "component.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and bases & {ast.unparse(b) for b in node.bases}:
                defined.add(node.name)
    assert defined - (bases - {"Select"}) == {c.__name__ for c in exported()}


def test_public_names_exist_and_are_documented():
    reference = (ROOT / "docs" / "reference.md").read_text()
    for name in controllability.__all__:
        assert inspect.getdoc(getattr(controllability, name)), name
        assert f"`{name}`" in reference or f"`ct.{name}" in reference, f"docs/reference.md lacks {name}"


def test_nothing_unsafe_is_loaded():
    for path in (*(ROOT / "controllability").rglob("*.py"), *(ROOT / "architectures").rglob("*.py")):
        text = path.read_text()
        for pattern in (r"\bpickle\b", r"torch\.load\(", r"trust_remote_code=True", r"\beval\(", r"yaml\.load"):
            found = [
                line
                for line in text.splitlines()
                if re.search(pattern, line) and "model.eval(" not in line and ".eval()" not in line
            ]
            assert not found, f"{path}: {found}"


def test_version_is_stated_once():
    assert controllability.__version__ in (ROOT / "CHANGELOG.md").read_text()
