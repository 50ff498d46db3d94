"""The registry of architectures: names are taken once; installed plug-ins are loaded, broken ones left out by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from minnow import registering

import architectures
import controllability as ct

registered = pytest.fixture(registering)


@pytest.mark.parametrize(
    ("name", "model_types", "message"),
    [
        ("minnow", (), r"architecture 'minnow' is registered already: take another name, or architectures.unregister\('minnow'\) first"),
        ("mine", ("minnow",), "model type 'minnow' is registered already, by architecture 'minnow': architectures.unregister"),
        ("gemma3_text", ("mine",), "model type 'gemma3_text' is registered already, by architecture 'gemma3'"),
    ],
)  # fmt: skip
def test_a_name_is_taken_once(registered, name, model_types, message):
    known = architectures.names()
    with pytest.raises(ct.BadInput, match=message):
        architectures.register(name, layer_class="X", model_types=model_types)
    assert architectures.names() == known


def test_a_builder_without_an_abstract_block_is_named(registered):
    registered(lambda view: None)
    with pytest.raises(ct.BadInput, match="'minnow' builds no abstract block: its builder returned None"):
        architectures.block("minnow")


# ---------------------------------------------------------------------------------------- plug-ins

HEAD = "import architectures\nfrom controllability.components import residual\n"
REGISTER = """
@architectures.register({0!r}, layer_class="Layer")
def {0}(view):
    return residual(view.linear("mix", "d", "d"))
"""
PLUGINS = {
    "by_module": ("by_module", HEAD + REGISTER.format("trout")),
    "by_function": (
        "by_function:register_all",
        HEAD + "def register_all():\n    assert 'gemma3' in architectures.names()\n" + REGISTER.format("carp").replace("\n", "\n    "),
    ),
    "by_builder": ("by_builder:tench", HEAD + REGISTER.format("tench")),
    "half_way": ("half_way", HEAD + REGISTER.format("pike") + REGISTER.format("gemma3")),
    "missing": ("no_such_module", ""),
    "a_number": ("a_number:SEVEN", "SEVEN = 7"),
}  # fmt: skip
SCRIPT = """
import json, sys, warnings
import architectures, controllability as ct
early = [name for name in sys.modules if name.startswith("by_")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    known = architectures.names()
    architectures.find("llama"), architectures.names()
try:
    architectures.find("pike")
except ct.BadInput as error:
    unknown = str(error)
rules = ct.prove(architectures.block("carp"), via="output").rules
print(json.dumps([early, known, [[str(w.category.__name__), str(w.message)] for w in caught], unknown, rules]))
"""


def test_installed_plug_ins_are_loaded_and_a_broken_one_is_left_out_by_name(tmp_path):
    for name, (value, source) in PLUGINS.items():
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[controllability.architectures]\n{name} = {value}\n")
        if source:
            (tmp_path / f"{name}.py").write_text(source)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SCRIPT}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    early, known, caught, unknown, rules = json.loads(run.stdout)
    assert early == [], "plug-ins are not loaded by the import"
    assert {"trout", "carp", "tench", "gemma3", "llama"} <= set(known)
    assert "pike" not in known, "half a plug-in is none"
    assert {kind for kind, _ in caught} == {"RuntimeWarning"}
    assert len(caught) == 3, "each once"
    texts = "\n".join(text for _, text in caught)
    for part in (
        "architecture plug-in 'half_way' (half_way, from half_way 1.2) could not be loaded and is left out: "
        "BadInput: architecture 'gemma3' is registered already",
        "plug-in 'missing' (no_such_module, from missing 1.2) could not be loaded and is left out: "
        "ModuleNotFoundError: No module named 'no_such_module'; mend or uninstall it, everything else works",
        "plug-in 'a_number' (a_number:SEVEN, from a_number 1.2) could not be loaded and is left out: "
        "BadInput: a_number:SEVEN is a int; name a module, or a function without arguments",
    ):
        assert part in texts
    assert "unknown architecture or model type 'pike'" in unknown
    assert "the plug-in 'half_way' (half_way, from half_way 1.2) could not be loaded: BadInput: architecture" in unknown
    assert "theorem-1b" in rules
