"""What each command does.  Heavy imports happen inside, so that ``--help`` is instant."""

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from controllability.cli.output import Output

if TYPE_CHECKING:
    from controllability.proof import Proof


def list(args: argparse.Namespace, output: Output) -> int:  # noqa: A001 (named after the command)
    """Print the registered architectures."""
    from controllability.cli import catalogue
    from controllability.errors import BadInput

    if args.markdown and output.as_json:
        raise BadInput("--markdown and --json are two forms of one list: leave one of them out")
    if args.markdown:
        output.text(catalogue.markdown().removesuffix("\n"))
        return 0
    rows = catalogue.rows(args.filter)
    output.result({"architectures": rows})
    if not sys.stdout.isatty():  # a line a family, for grep and its like
        for row in rows:
            cells = row["name"], ", ".join(row["model_types"]), row["verdict"], row["topology"], row["feed_forward"]
            output.text("\t".join((*cells, ", ".join(row["rules"]) or row["culprit"])))
        return 0
    output.table(
        f"{len(rows)} registered architectures; families of one shape stand together",
        ["families", "residual", "feed-forward", "verdict", "rules, or culprit"],
        [[", ".join(names), *shape] for shape, names in catalogue.shapes(rows).items()],
    )
    return 0


def prove(args: argparse.Namespace, output: Output) -> int:
    """Print the proof of one architecture, and what the checks of a level showed."""
    import architectures
    from controllability.errors import BadInput, NotControllable
    from controllability.proof import prove as prove_block

    if output.as_json and args.format not in (None, "json"):
        raise BadInput(f"--json and --format {args.format} ask for two forms: leave one of them out")
    output.as_json = output.as_json or args.format == "json"
    args.name = _family(args.name)
    block = None  # a family that is refused by its declaration has none
    try:
        block = architectures.block(args.name)
        proof = prove_block(block, args.via, args.route, jointly=args.jointly)
    except NotControllable as refused:
        if args.format == "html":
            from controllability.rendering.html import refusal_html

            _print_page(refusal_html(args.name, block, refused))
            return 1
        if not output.as_json:
            raise
        output.refusal(refused, name=args.name)
        return 1
    checks = proof.check(args.level)
    failed = any(c["status"] == "failed" for c in checks)
    data = {"name": args.name} | proof.to_dict() | _levels(proof, args.level, checks)
    if output.as_json:
        output.result(data)
    elif args.format == "latex":
        output.text(proof.to_latex(data["level"], args.name))
    elif args.format == "html":
        from controllability.rendering.html import proof_html

        _print_page(proof_html(proof, args.name, args.level, checks))
    else:
        _show_proof(proof, args.level, checks, output)
    return 1 if failed else 0


def _family(name: str) -> str:
    """The name, where it is registered; else that of the family that a model directory, a config or a GGUF file names."""
    import architectures
    from controllability.errors import BadInput

    try:
        architectures.find(name)
        return name
    except BadInput:
        if name != "embedded" and not os.path.exists(name):
            raise
    from controllability.models.loading import model_type

    return architectures.find(model_type(name)).name


def recheck(args: argparse.Namespace, output: Output) -> int:
    """Rebuild a written proof, check every node of it again, and run the checks of a level."""
    from controllability.errors import NotVerified
    from controllability.proof import Proof
    from controllability.proof_files.read import read_proof_file

    data = read_proof_file(args.file)
    name = data.get("name", "")
    try:
        proof = Proof.from_dict(data)
    except NotVerified as wrong:
        output.result({"name": name, "file": args.file, "verdict": "wrong", "reason": str(wrong)})
        raise
    checks = proof.check(args.level)
    failed = any(c["status"] == "failed" for c in checks)
    nodes = sum(1 for root in (proof.root, *proof.alternatives) for _ in root.walk())
    moved = sorted(map(str, proof.root.moved))
    output.result({
        "name": name, "file": args.file, "verdict": "patchable", "nodes": nodes, "via": proof.via, "route": proof.route,
        "frozen": sorted(proof.frozen), "jointly": proof.jointly, "most": proof.max_tokens, "moved": moved, "rules": [*proof.rules],
    } | _levels(proof, args.level, checks))  # fmt: skip
    output.text(f"{name or args.file}: each of the {nodes} nodes follows from its premises, and nothing was searched")
    _show_proof(proof, args.level, checks, output)
    return 1 if failed else 0


def _print_page(page: str) -> None:
    """A page says that it is UTF-8: where stdout is not, signs beyond ASCII become references."""
    if codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8":
        page = page.encode("ascii", "xmlcharrefreplace").decode()
    print(page)


def _levels(proof: "Proof", level: str, checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was run and what it showed, and what the proof cites."""
    from controllability.checks import reached, summary
    from controllability.rendering.text import cited

    shown = {"level": reached(level, checks), "summary": summary(level, checks)}
    return shown | {"checks": checks, "references": cited(proof)}


def _show_proof(proof: "Proof", level: str, checks: Sequence[dict[str, Any]], output: Output) -> None:
    from controllability.rendering.text import proof_text, terminal_width, wrapped

    found = _levels(proof, level, checks)
    output.text(proof_text(proof, level=found["level"]))
    if level != "derived":
        rows = [[c["rule"], c["status"], c["method"]] for c in checks]
        output.table(f"level {level}", ["rule", "status", "method"], rows)
    cited = [f"{key} {text}" for key, text in found["references"].items()]
    for line in (found["summary"], "references:", *cited):
        output.text("\n".join(wrapped(line, terminal_width(), "", "    ")))


def _elsewhere(module: str, name: str) -> Callable[[argparse.Namespace, Output], int]:
    """The function ``name`` of ``controllability.cli.module``, imported when it is called: the models are heavy."""
    return lambda args, output: getattr(import_module(f"controllability.cli.{module}"), name)(args, output)


patch, verify, export = (_elsewhere("patch", name) for name in ("patch", "verify", "export"))
generate, demo = _elsewhere("generate", "generate"), _elsewhere("demo", "demo")
protocol = _elsewhere("protocol", "protocol")
compile = _elsewhere("compile", "compile")  # noqa: A001 (named after the command)
moments = _elsewhere("moments", "moments")
