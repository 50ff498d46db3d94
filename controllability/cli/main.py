"""Arguments in, exit status out: 0 done and verified, 1 refused or not verified, 2 wrong usage or bad input."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from controllability import errors
from controllability.cli.arguments import COMMANDS
from controllability.cli.output import Output
from controllability.cli.terminal import own_terminal

REFUSED, USAGE = 1, 2


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
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.what, description=command.what, epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
        command.arguments(sub)
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
    with own_terminal():
        return _run(args, output)


def _run(args: argparse.Namespace, output: Output) -> int:
    try:
        import numpy  # noqa: F401 (before torch, which would take a Ctrl-C in here for a missing NumPy)

        from controllability.cli import commands

        status = int(getattr(commands, args.command)(args, output))
        sys.stdout.flush()
        return status
    except (errors.BadInput, errors.ReadingError, errors.PatchError) as error:
        return _fail(error, USAGE)
    except (errors.NotControllable, errors.SideConditionFailed) as error:
        output.refusal(error)
        return _refuse(error)
    except errors.ControllabilityError as error:
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
        text = errors.in_a_line(error)
        hint = "please report it; CONTROLLABILITY_TRACEBACK=1 shows where"
        return _fail(f"internal error ({type(error).__name__}: {text}); {hint}", REFUSED)


def _fail(error: Exception | str, status: int) -> int:
    try:
        from controllability.rendering.text import printable
    except ImportError:  # what failed may be NumPy, which is imported once or never
        printable = ascii
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
