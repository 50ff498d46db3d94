"""Wrong certificates, made of right ones, and a session of Coq that tries many of them with one start."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SWAPS = {
    "add": "sub", "sub": "add", "times": "add", "silu": "relu", "gelu_tanh": "silu", "rms": "layer", "layer": "rms", "mix": "mix_twice",
    "sum_after": "sum_before", "I_leaf": "O_leaf", "O_leaf": "I_leaf", "T_split": "T_sum", "I_before": "I_after",
    "theorem_1": "theorem_1b", "theorem_1b": "theorem_1", "balanced": "uniform", "I_combine": "T_split", "first": "second",
    "linear": "elementwise", "linear_jointly": "elementwise_jointly", "keep": "uniform", "direction": "scale", "fst": "snd",
    "T_mixture": "I_mixture", "mixture": "experts", "rank_one": "rank_all", "rank_each": "rank_rows", "target": "serves",
}  # fmt: skip
WORD = re.compile(r"[A-Za-z_]\w*'?")


def mutations(text: str) -> Iterator[tuple[str, str]]:
    """(what was done, the wrong certificate): each altered in one place."""
    head, theorem = text.split("Theorem patch", 1)
    for name in re.findall(r"\n  \((H\d+) :", theorem.split(":\n")[0]):
        dropped = re.sub(rf"\n  \({name} : .*\)(?=\n| :)", "", text)
        yield f"side condition {name} dropped", dropped
    for name in dict.fromkeys(re.findall(r"\w+'", theorem.split("Proof")[0])):
        if name != "v'":
            yield (
                f"patch {name} missing",
                head + "Theorem patch" + re.sub(rf"(?<=block)(.*?){name}", rf"\1{name[:-1]}", theorem, count=1),
            )
    for line in head.splitlines():
        if not line.startswith("Definition "):
            continue
        kind = {"block": "formula", "tree": "tree"}.get(line.split()[1], "patch or target")
        body = line.index(":=")
        for found in WORD.finditer(line, body):
            new = SWAPS.get(found[0])
            if new is not None:
                yield (
                    f"{kind}: {found[0]} is {new}",
                    text.replace(line, line[: found.start()] + new + line[found.end() :], 1),
                )
        for found in re.finditer(r"\((sub|times|add) (\w+'?) (\w+'?)\)", line[body:]):
            if found[2] != found[3]:
                turned = line[body:].replace(found[0], f"({found[1]} {found[3]} {found[2]})", 1)
                yield f"{kind}: {found[0]} is turned", text.replace(line, line[:body] + turned, 1)
        for found in re.finditer(r"(?<=[ (])v'?(?=[ ).])", line[body:]):
            other = "v" if found[0] == "v'" else "v'"
            at = body + found.start()
            yield (
                f"{kind}: {found[0]} is {other}",
                text.replace(line, line[:at] + other + line[at + len(found[0]) :], 1),
            )


def spread(found: Iterator[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """``most`` of them, from all kinds."""
    every = list(found)
    step = max(1, len(every) // most)
    return list(islice(every[::step], most))


def accepted(texts: list[str], compiled: Path, folder: Path, seconds: int = 600) -> list[bool]:
    """Which certificates the kernel accepts: one session, each in a module of its own; an error ends none but the one it is in."""
    lines = ["From Coq Require Import Reals.", "From Controllability Require Import Theory.", "Open Scope R_scope."]
    for i, text in enumerate(texts):
        body = text.split("Open Scope R_scope.", 1)[1].split("Print Assumptions", 1)[0]
        body = body.replace("Qed.\nEnd certificate.", f"Qed.\nEnd certificate.\nDefinition accepted{i} := @perfect.")
        lines += [f"Module M{i}.", body, "Abort All."]
        # an error leaves the section open: both ways out, one of which is an error that harms nothing
        lines += ["End certificate.", f"End M{i}."]
    done = subprocess.run(
        ["coqtop", "-q", "-R", str(compiled), "Controllability"], input="\n".join(lines) + "\n", cwd=folder,
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    return [f"accepted{i} is defined" in done.stdout for i in range(len(texts))]
