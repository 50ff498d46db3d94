"""Tensor-parallel models on two processes (gloo, CPU): every test ends its own processes, within a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

pytestmark = pytest.mark.sharded

pytest.importorskip("transformers.distributed")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

WORKER = Path(__file__).with_name("sharded_worker.py")
FLOAT32, EXACT = 1e-5, 1e-12
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, head_dim=8)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
}
WITHIN = 300  # seconds


def start(out: Path, *cases: str, processes: int = 2) -> subprocess.Popen[str]:
    root = str(WORKER.parents[1])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(WORKER),
        str(out),
        *cases,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def ended(process: subprocess.Popen[str], within: float = WITHIN) -> tuple[str, str]:
    """Its output; the whole group is killed when it takes too long."""
    try:
        return process.communicate(timeout=within)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, (kind, config) in FAMILIES.items():
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():  # norms' scales and biases are not all alike
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        found[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(found[name])
    return found


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What cases found, by name; those that are asked for together share one start of torch."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def told(*cases: str, family: str = "llama") -> dict[str, Any]:
        if (family, *cases) not in known:
            output, errors = ended(
                start(tmp_path_factory.mktemp("out"), *(f"{case}:{folders[family]}" for case in cases))
            )
            lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
            assert lines, errors[-2000:]
            found = known[family, *cases] = {line["case"].partition(":")[0]: line["found"] for line in lines}
            for here in found.values():
                assert not (isinstance(here, dict) and isinstance(here.get("error"), str)), here["error"]
        return known[family, *cases]

    return told


OF_A_FAMILY = ("patched", "exactly", "sent", "generated")
OTHERS = ("compiled", "refused", "fully_sharded")
EVERY = ["gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mixtral"))]


@pytest.mark.parametrize("family", EVERY)
def test_two_processes_give_what_one_gives(run: Run, family: str) -> None:
    """Every scope, at both places: applied, merged, undone to the bit, saved by two and loaded by one."""
    found = run(*OF_A_FAMILY, family=family)["patched"]
    assert len(found) == 6
    for here in found.values():
        errors = {name: value for name, value in here.items() if isinstance(value, float) and name != "unpatched"}
        assert max(errors.values()) < FLOAT32 < 0.05 < here["unpatched"], here
        assert here.get("same bits", True) is True
        assert here["files"] == ["patch.json", "patch.safetensors"]


@pytest.mark.parametrize("family", EVERY)
def test_in_exact_float64(run: Run, family: str) -> None:
    for here in run(*OF_A_FAMILY, family=family)["exactly"].values():
        assert max(here["applied"], here["against one process"]) < EXACT < 0.05 < here["unpatched"], here


@pytest.mark.parametrize("family", EVERY[:2])
@pytest.mark.parametrize("place", ["feed-forward", "mixer"])
@pytest.mark.parametrize("scope", ["each", "last"])
def test_the_sweep_sends_a_few_numbers_a_token_and_layer(run: Run, family: str, place: str, scope: str) -> None:
    a_token, once = run(*OF_A_FAMILY, family=family)["sent"][f"{place} {scope}"]
    most = (
        64 if scope == "each" else 8 * 11
    )  # "last" spares the 11 tokens of the source: a row of their Gram matrix each
    assert 0 < a_token <= most and once < 1024


@pytest.mark.parametrize("family", EVERY)
def test_generating(run: Run, family: str) -> None:
    found = run(*OF_A_FAMILY, family=family)["generated"]
    assert found["same"] is True
    assert found["error"] < 1e-4 < 0.1 < found["unpatched"]


def test_a_context_is_compiled(run: Run) -> None:
    found = run(*OTHERS)["compiled"]
    assert found["moments"] < FLOAT32
    for strength, exact in (("exact", True), ("balanced", False)):
        one, two = found[strength]
        assert one == two == [exact, ["Rome", "Lima"]]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("inputs", "BadInput: the processes of this model have different inputs: process 1 is not as process 0"),
        ("patches", "BadInput: the processes of this model have different patches: process 1 is not as process 0"),
        ("versions", "BadInput: the processes of this model have different versions: controllability "),
        (
            "export",
            "PatchError: this patch is of a model that is split over several devices: save it, and export it in one",
        ),
        (
            "NaN in mlp.down_proj",
            "BadInput: parameter model.layers.1.mlp.down_proj.weight holds NaN or infinite values",
        ),
        ("NaN in self_attn.q_proj", "BadInput: parameter model.layers.1.self_attn.q_proj.weight holds NaN or infinite"),
        ("occupied", "exists already and is not an empty directory: nothing was written"),
    ],
)
def test_all_processes_end_with_one_error(run: Run, case: str, words: str) -> None:
    assert words in run(*OTHERS)["refused"][case]
    assert float(run(*OTHERS)["refused"]["afterwards"]) < FLOAT32  # and nothing was lost


def test_fsdp_is_refused_by_name(run: Run) -> None:
    assert "spread by fully_shard (FSDP2)" in run(*OTHERS)["fully_sharded"]


def test_a_number_of_processes_that_does_not_divide_the_heads(folders: dict[str, str], tmp_path: Path) -> None:
    output, _ = ended(start(tmp_path, f"uneven:{folders['llama']}", processes=3))
    assert (
        "3 processes share this model, which has 4 attention and 2 key heads: start it with a number that divides them (1, 2)"
        in output
    )


def test_a_process_that_is_ended_ends_the_others(folders: dict[str, str], tmp_path: Path) -> None:
    process = start(tmp_path, f"killed:{folders['llama']}")
    started = time.monotonic()
    _, errors = ended(process, within=150)
    assert process.returncode != 0
    assert "SIGTERM" in errors or "Signal 15" in errors or "exitcode: -15" in errors.replace("\x1b", "")
    assert len(list(tmp_path.glob("running-*"))) == 2
    assert time.monotonic() - started < 150
