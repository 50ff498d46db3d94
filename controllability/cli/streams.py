"""Standard output and error of a command, also closed, full or broken; what a terminal can show, and what it is spared."""

import codecs
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from controllability.errors import printable

SIGNS: dict[str, str] = {
    "─": "-", "│": "|", "├": "|", "└": "`", "…": "...", "–": "-", "−": "-", "—": "-", "·": "*", "∘": " o ", "×": "x", "√": "sqrt",
    "Δ": "Delta ", "Σ": "sum ", "α": "alpha", "γ": "gamma", "δ": "delta", "ε": "eps", "θ": "theta", "κ": "kappa", "λ": "lambda",
    "μ": "mu", "ρ": "rho", "σ": "sigma", "φ": "phi", "ᵀ": "^T", "⁺": "^+", "⁻": "^-", "¹": "^1", "²": "^2", "ᵢ": "_i", "₁": "_1", "₂": "_2",
    "‖": "||", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->", "↦": "|->", "⊆": " within ", "∈": " in ", "“": '"', "”": '"', "’": "'",
}  # fmt: skip


def open_missing() -> None:
    """Give the numbers 0 to 2 to nothing where they are closed: else the next file that is opened would be stderr."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def say(*lines: object) -> None:
    """Lines on stderr, if anybody reads there; nothing in them drives the terminal."""
    with suppress(OSError, ValueError):
        print(*(printable(" ".join(str(line).splitlines())) for line in lines), sep="\n", file=sys.stderr, flush=True)


def drop_unwritten() -> None:
    """What stdout does not take is dropped: the interpreter would try once more at its end, and exit with 120."""
    try:
        print(end="", flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _spelt(error: Any) -> tuple[str, int]:
    lacking: str = error.object[error.start : error.end]
    return "".join(SIGNS.get(c, c.encode("ascii", "backslashreplace").decode()) for c in lacking), error.end


codecs.register_error("controllability", _spelt)


def spelt(text: str, encoding: str) -> str:
    """The text as a stream of this encoding will show it: to be known before lines are made of it."""
    return text.encode(encoding, "controllability").decode(encoding)


def _told(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings in a line; what other libraries have to say is theirs."""
    text = " ".join(str(message).split())
    if category.__module__.startswith("controllability") or text.startswith("architecture plug-in"):
        say(f"controllability: {text}")


@contextmanager
def own_terminal() -> Iterator[None]:
    """Within this context a stream spells what it cannot show, and other libraries say nothing below errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="controllability")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is loaded later, and begins with its own
    for library in ("transformers", "huggingface_hub", "bitsandbytes", "peft", "accelerate", "torch", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.showwarning = _told
        yield
