"""Arguments in, exit status out: 0 done and verified, 1 refused or not verified, 2 wrong usage or bad input."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from controllability import errors
from controllability.cli.arguments import COMMANDS
from controllability.cli.output import Output
from controllability.cli.streams import drop_unwritten, open_missing, own_terminal, say
from controllability.version import __version__

REFUSED, USAGE = 1, 2


class Once(argparse.Action):
    """An option with a value, which may be given once: of two values one would be lost without a word."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = vars(parser).setdefault("given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "it is given twice, and takes one value")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Wrong usage is one clear line on stderr and status 2."""

    def error(self, message: str) -> Any:
        say(f"controllability: {message} (see {self.prog} --help)")
        self.exit(USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file, flush=True)  # argparse's own is silent where it cannot write


def parser() -> Parser:
    """The whole command line."""
    what, first = "Context into weights, exactly, with a proof.", "start with: controllability demo"
    root = Parser(prog="controllability", description=what, epilog=first)
    root.add_argument("--version", action="version", version=f"controllability {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.what, description=command.what, epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.register("action", None, Once)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
        command.arguments(sub)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    open_missing()
    try:
        with own_terminal():
            return _guarded(sys.argv[1:] if arguments is None else arguments)
    finally:
        drop_unwritten()


def _guarded(arguments: Sequence[str]) -> int:
    """The exit status; every expected failure is one clear line on stderr."""
    try:
        return _run(arguments)
    except (errors.BadInput, errors.ReadingError, errors.PatchError) as error:
        return _fail(error, USAGE)
    except errors.ControllabilityError as error:
        return _fail(error, REFUSED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was changed", 130)
    except BrokenPipeError:  # the reader has seen enough
        return 0
    except OSError as error:
        what = f"use {error.filename}" if error.filename else "write the result"
        return _fail(f"cannot {what}: {error.strerror or error}", USAGE)
    except Exception as error:  # no traceback for the user
        if os.environ.get("CONTROLLABILITY_TRACEBACK"):
            raise
        return _fail(*_explained(error))


def _run(arguments: Sequence[str]) -> int:
    _refuse_bytes(arguments)
    cli = parser()
    args = cli.parse_args(arguments)
    if args.command is None:
        cli.print_help(sys.stderr)
        return USAGE
    if sys.stdout is None:
        raise errors.BadInput("stdout is closed: there is nowhere to write the result")
    import numpy  # noqa: F401 (before torch, which would take a Ctrl-C in here for a missing NumPy)

    from controllability.cli import commands
    from controllability.cli.files import printed_to, read_texts

    output = Output(as_json=args.json)
    read_texts(args)
    with printed_to(getattr(args, "into", None), output):
        try:
            status = int(getattr(commands, args.command)(args, output))
        except (errors.NotControllable, errors.SideConditionFailed) as error:
            output.refusal(error)
            status = _refuse(error)
    sys.stdout.flush()
    return status


def _refuse_bytes(arguments: Sequence[str]) -> None:
    for option, word in zip(("", *arguments), arguments, strict=False):
        if wrong := re.search("[\0\ud800-\udfff]", word):
            which = f"the argument after {option}" if option.startswith("-") else "an argument"
            raise errors.BadInput(f"{which} is not UTF-8: character {wrong.start()} is {wrong[0]!a}")


def _explained(error: Exception) -> tuple[str, int]:
    """What an error that others raised means, and the status."""
    text = errors.in_a_line(error)
    if isinstance(error, MemoryError) or re.search("(can't allocate|out of|not enough) memory", text):
        return "not enough memory for this model; nothing was changed", USAGE
    if isinstance(error, ImportError) or isinstance(getattr(error, "obj", None), ModuleType):
        return f"cannot import what is needed: {text}; is something of that name found first, or not installed?", USAGE
    what, where = f"{type(error).__name__}: {text}", "CONTROLLABILITY_TRACEBACK=1 shows where"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    library = frame.f_globals.get("__name__", "").partition(".")[0]
    if library not in ("controllability", "architectures"):
        return f"{library} cannot run this: {what}; is the model or a file damaged? {where}", USAGE
    return f"internal error ({what}); please report it; {where}", REFUSED


def _fail(error: Exception | str, status: int) -> int:
    say(f"controllability: {error}")
    return status


def _refuse(error: Exception) -> int:
    """A refusal has a line for each of its parts: what they begin with stands out, whatever the width."""
    from controllability.cli.docs import page_of
    from controllability.rendering.text import terminal_width, wrapped

    width = terminal_width(sys.stderr)
    first, *others = f"controllability: {error}".splitlines()
    lines = wrapped(first, width, "", "    ")
    for line in others:
        name = re.match(r"\s*(\w+:\s*)?", line)
        lines += wrapped(line, width, "", " " * (name.end() if name else 4))
    say(*lines, *page_of(error))  # whole, however long: it is copied
    return REFUSED
