"""What each command does.  Those that load a model stand in files of their own."""

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import architectures
from controllability.checks import reached, summary
from controllability.cli import catalogue
from controllability.cli.output import Output
from controllability.errors import BadInput, NotControllable, NotVerified
from controllability.proof import Proof, prove as prove_block
from controllability.proof_files.read import read_proof_file
from controllability.rendering.html import proof_html, refusal_html
from controllability.rendering.text import cited, proof_text, terminal_width, wrapped


def list(args: argparse.Namespace, output: Output) -> int:  # noqa: A001 (named after the command)
    """Print the registered architectures."""
    if args.markdown and output.as_json:
        raise BadInput("--markdown and --json are two forms of one list: leave one of them out")
    if args.markdown:
        output.text(catalogue.markdown().removesuffix("\n"))
        return 0
    rows = catalogue.rows(args.filter)
    output.result({"architectures": rows})
    if not sys.stdout.isatty():  # a line a family, for grep and its like
        for row in rows:
            types, why = ", ".join(row["model_types"]), ", ".join(row["rules"]) or row["culprit"]
            cells = row["name"], types, catalogue.verdict(row), row["topology"], row["feed_forward"], why
            output.text("\t".join(cells))
        return 0
    output.table(
        f"{len(rows)} registered architectures; families of one shape stand together",
        ["families", "residual", "feed-forward", "verdict", "rules, or culprit"],
        [[", ".join(names), *shape] for shape, names in catalogue.shapes(rows).items()],
    )
    return 0


def prove(args: argparse.Namespace, output: Output) -> int:
    """Print the proof of one architecture, and what the checks of a level showed."""
    if output.as_json and args.format not in (None, "json"):
        raise BadInput(f"--json and --format {args.format} ask for two forms: leave one of them out")
    output.as_json = output.as_json or args.format == "json"
    args.name = _family(args.name)
    block = None  # a family that is refused by its declaration has none
    try:
        block = architectures.block(args.name, place=args.place)
        proof = prove_block(block, args.via, args.route, jointly=args.jointly)
    except NotControllable as refused:
        if args.format == "html":
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
    elif args.format == "rocq":
        output.text(proof.to_rocq().removesuffix("\n"))
    elif args.format == "latex":
        output.text(proof.to_latex(data["level"], args.name))
    elif args.format == "html":
        _print_page(proof_html(proof, args.name, args.level, checks))
    else:
        _show_proof(proof, args.level, checks, output)
    return 1 if failed else 0


def _family(name: str) -> str:
    """The name, where it is registered; else that of the family that a model directory, a config or a GGUF file names."""
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
    if str(args.file).endswith(".v"):
        return _recheck_certificate(args, output)
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


def _recheck_certificate(args: argparse.Namespace, output: Output) -> int:
    """Give a certificate to the kernel, if it is nothing but one."""
    from controllability.rocq import check as kernel
    from controllability.rocq.vocabulary import LARGEST, theorem_of
    from controllability.texts import read_text

    if args.level not in ("derived", "machine"):
        raise BadInput(f"{args.file} is a certificate: its level is machine, no other is run")
    text = read_text(Path(args.file), "the certificate", LARGEST >> 20)
    try:
        verdict = kernel.kernel_verdict(text)
    except kernel.NoKernel as missing:
        raise BadInput(str(missing)) from None
    shown = {"file": args.file, "verdict": "accepted" if verdict.accepted else "refused", "theorem": theorem_of(text)}
    output.result(shown | asdict(verdict))
    output.text(f"{args.file}: {verdict.told()}")
    if verdict.accepted:
        output.text(f"what it states, for you to read:\n{shown['theorem']}")
    return 0 if verdict.accepted else 1


def _print_page(page: str) -> None:
    """A page says that it is UTF-8: where stdout is not, signs beyond ASCII become references."""
    if codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8":
        page = page.encode("ascii", "xmlcharrefreplace").decode()
    print(page)


def _levels(proof: Proof, level: str, checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was run and what it showed, and what the proof cites."""
    shown = {"level": reached(level, checks), "summary": summary(level, checks)}
    return shown | {"checks": checks, "references": cited(proof)}


def _show_proof(proof: Proof, level: str, checks: Sequence[dict[str, Any]], output: Output) -> None:
    found = _levels(proof, level, checks)
    output.text(proof_text(proof, level=found["level"]))
    if level != "derived":
        rows = [[c["rule"], c["status"], c["method"]] for c in checks]
        output.table(f"level {level}", ["rule", "status", "method"], rows)
    for line in (found["summary"], "references:", *(f"{key} {text}" for key, text in found["references"].items())):
        output.text("\n".join(wrapped(line, terminal_width(), "", "    ")))


def _elsewhere(name: str, module: str = "") -> Callable[[argparse.Namespace, Output], int]:
    """The function ``name`` of ``controllability.cli.module``, imported when it is called: the models are heavy."""
    return lambda args, output: getattr(import_module(f"controllability.cli.{module or name}"), name)(args, output)


patch, generate, demo, docs, protocol = map(_elsewhere, ("patch", "generate", "demo", "docs", "protocol"))
verify, export, moments = _elsewhere("verify", "patch"), _elsewhere("export", "patch"), _elsewhere("moments", "compile")
compile = _elsewhere("compile")  # noqa: A001 (named after the command)
attribute, dynamics, inspect, survey = (
    _elsewhere(name, "instrument") for name in ("attribute", "dynamics", "inspect", "survey")
)
