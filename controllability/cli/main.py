"""Arguments in, exit status out: 0 done and verified, 1 refused or not verified, 2 wrong usage or bad input."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from controllability.cli.output import Output
from controllability.errors import (
    BadInput,
    ControllabilityError,
    NotControllable,
    PatchError,
    ReadingError,
    SideConditionFailed,
)

REFUSED, USAGE = 1, 2
VIA, ROUTES = ("input-output", "output"), ("auto", "scale", "secular", "uniform", "ball")
LEVELS, FORMATS = ("derived", "symbolic", "exact", "numeric"), ("text", "latex", "html", "json")


class Parser(argparse.ArgumentParser):
    """Wrong usage is one clear line on stderr and status 2."""

    def error(self, message: str) -> Any:
        self.exit(USAGE, f"controllability: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The whole command line."""
    root = Parser(
        prog="controllability",
        description="Context into weights, exactly, with a proof.",
        epilog="start with: controllability demo",
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, what: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=what, description=what, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
        return sub

    demo = command(
        "demo",
        "The embedded trained model: facts in the context, questions without it.",
        "controllability demo --out pictures",
    )
    demo.add_argument("--out", metavar="DIR", help="also write a picture of every layer's error and patch sizes")
    demo.add_argument("--worlds", type=int, default=8, metavar="N", help="how many fresh contexts to draw (default 8)")
    demo.add_argument("--seed", type=int, default=0, help="which contexts are drawn (default 0)")
    demo.add_argument("--scope", choices=("each", "last"), default="each", help="see the patch command")
    demo.add_argument("--route", choices=ROUTES, default="auto")

    known = command("list", "Registered architectures.", "controllability list --json")
    known.add_argument("--markdown", action="store_true", help="the table of docs/architectures.md")

    prove = command(
        "prove",
        "Proof that a family's block is patchable, or the refusal.",
        "controllability prove gemma3 --level symbolic",
    )
    prove.add_argument("name", metavar="NAME", help="an architecture or a model type; see controllability list")
    prove.add_argument("--via", choices=VIA, default="input-output", help="Theorem 1 (default) or 1b")
    prove.add_argument("--route", choices=ROUTES, default="auto", help="what a normalised output does (default auto)")
    prove.add_argument("--level", choices=LEVELS, default="derived", help="what to run (default derived: nothing)")
    prove.add_argument("--format", choices=FORMATS, default="text")

    recheck = command(
        "recheck",
        "Rebuild a written proof and check every node of it again, without search.",
        "controllability prove gemma3 --json > p.json\n  controllability recheck p.json --level numeric",
    )
    recheck.add_argument(
        "file", metavar="FILE", help="written by controllability prove NAME --json, or Proof.to_dict()"
    )
    recheck.add_argument("--level", choices=LEVELS, default="derived", help="what to run beside (default derived)")

    example = 'controllability patch MODEL_DIR --context "Mia lives in Oslo ." --query "Where does Mia live ?"'
    patch = command("patch", "Patches that replace a context, on a model directory or Hub id.", example)
    patch.add_argument("model", metavar="MODEL", help="directory written by save_pretrained, or a Hub id")
    patch.add_argument("--context", required=True, metavar="TEXT")
    patch.add_argument("--query", required=True, metavar="TEXT")
    patch.add_argument(
        "--scope",
        choices=("each", "last", "all"),
        default="each",
        help="a patch for each position (default), or one for the last",
    )
    patch.add_argument("--via", choices=VIA, default="input-output")
    patch.add_argument("--route", choices=ROUTES, default="auto")
    patch.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16"),
        default="float32",
        help="default float32; float64 computes exactly",
    )
    patch.add_argument(
        "--positions",
        choices=("keep", "reset"),
        default="keep",
        help="positions of the query: as in the target (default), or from 0",
    )
    patch.add_argument("--out", metavar="DIR", help="save the patch here; must be new or empty")
    patch.add_argument(
        "--trust-remote-code", action="store_true", help="run code that a model directory brings (off by default)"
    )

    verify = command(
        "verify",
        "Reload a saved patch and check it against a fresh target run.",
        "controllability verify MODEL_DIR PATCH_DIR",
    )
    verify.add_argument("model", metavar="MODEL", help="the model it was made for")
    verify.add_argument("patch", metavar="PATCH_DIR")
    verify.add_argument(
        "--trust-remote-code", action="store_true", help="run code that a model directory brings (off by default)"
    )
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every expected failure is one clear line on stderr."""
    cli = parser()
    args = cli.parse_args(arguments)
    if args.command is None:
        cli.print_help(sys.stderr)
        return USAGE
    if sys.stdout is None:
        return _fail("stdout is closed: there is nowhere to write the result", USAGE)
    output = Output(as_json=args.json)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a sign gets its code, not a traceback
            stream.reconfigure(errors="backslashreplace")
    from controllability.cli import commands

    try:
        status = int(getattr(commands, args.command)(args, output))
        sys.stdout.flush()
        return status
    except (BadInput, ReadingError, PatchError) as error:
        return _fail(error, USAGE)
    except (NotControllable, SideConditionFailed) as error:
        output.refusal(error)
        return _refuse(error)
    except ControllabilityError as error:
        return _fail(error, REFUSED)
    except KeyboardInterrupt:
        print("controllability: interrupted; nothing was changed", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"cannot write the result: {error.strerror or error}", USAGE)
    except MemoryError:
        print("controllability: not enough memory for this model; nothing was changed", file=sys.stderr)
        return USAGE
    except Exception as error:  # ours to mend; still no traceback for the user
        if os.environ.get("CONTROLLABILITY_TRACEBACK"):
            raise
        text = " ".join(str(error).split())[:300]
        hint = "please report it; CONTROLLABILITY_TRACEBACK=1 shows where"
        return _fail(f"internal error ({type(error).__name__}: {text}); {hint}", REFUSED)


def _fail(error: Exception | str, status: int) -> int:
    from controllability.rendering.text import printable

    print(f"controllability: {printable(' '.join(str(error).splitlines()))}", file=sys.stderr)
    return status


def _refuse(error: Exception) -> int:
    """A refusal has a line for each of its parts: what they begin with stands out, whatever the width."""
    from controllability.rendering.text import terminal_width, wrapped

    width = terminal_width(sys.stderr)
    first, *others = f"controllability: {error}".splitlines()
    lines = wrapped(first, width, "", "    ")
    for line in others:
        name = re.match(r"\s*(\w+:\s*)?", line)
        lines += wrapped(line, width, "", " " * (name.end() if name else 4))
    print("\n".join(lines), file=sys.stderr)
    return REFUSED
