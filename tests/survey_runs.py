"""Surveys of the embedded model in processes of their own, which may be killed: how far each one came."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from controllability.embedded.world import draw_world

BATCH = 4
CODE = """
import json, os, resource, signal, sys, time
import torch
torch.set_num_threads(1)
import controllability as ct
model, tokenizer = ct.load_model("embedded")
ct.patch_model(model, *ct.encode(tokenizer, "Mia lives in Oslo .", "Where does Mia live ?"))
said = lambda *words: print(*words, flush=True)
for line in sys.stdin:
    data, out, batch, most, kill_after = json.loads(line)
    if not (child := os.fork()):
        try:
            if most:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            began = time.perf_counter()
            ct.survey(model, tokenizer, data, out, batch=batch, progress=lambda _, done, total: said(done))
            said("took", time.perf_counter() - began)
        except Exception as error:
            said("error", type(error).__name__, error)
        finally:
            os._exit(0)
    ends = time.monotonic() + kill_after
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)  # nobody has waited for it: the number is still its own
            os.waitpid(child, 0)
            break
        time.sleep(0.001)
    said("end")
"""


def draw_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng, pairs = random.Random(seed), []
    for i in range(count):
        world = draw_world(rng, rng.randint(2, 10))
        pairs.append({"context": world.context, "query": rng.choice(world.questions).text, "id": f"pair {i}"})
    return pairs


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


class Runner:
    """Surveys in processes that share one start: each is a fork of a process that has the model."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, data: Path, out: Path, kill_after: float = 1e9, most: int = 0) -> tuple[list[int], float, str]:
        """(how many pairs were done at each report, seconds or 0 where it did not end, its error); ``most``: bytes of a file."""
        asked, told = self.process.stdin, self.process.stdout
        assert asked is not None and told is not None
        print(json.dumps([str(data), str(out), BATCH, most, kill_after]), file=asked, flush=True)
        lines = [*iter(lambda: told.readline().strip(), "end")]
        took = sum(float(line.split()[1]) for line in lines if line.startswith("took"))
        return [int(line) for line in lines if line.isdigit()], took, "".join(x for x in lines if x.startswith("error"))
