"""What each command does.  Heavy imports happen inside, so that ``--help`` is instant."""

from __future__ import annotations

import argparse

from controllability.cli.output import Output


def list(args: argparse.Namespace, output: Output) -> int:  # noqa: A001 (named after the command)
    """Print the registered architectures."""
    from controllability import catalogue

    if args.markdown:
        print(catalogue.markdown(), end="")
        return 0
    rows = catalogue.rows()
    output.result({"architectures": rows})
    output.table(
        f"{len(rows)} registered architectures; families of one shape stand together",
        ["families", "residual", "feed-forward", "verdict", "rules, or culprit"],
        [[", ".join(names), *shape] for shape, names in catalogue.shapes(rows).items()],
    )
    return 0


def prove(args: argparse.Namespace, output: Output) -> int:
    """Print the proof of one architecture, and what the checks of a level showed."""
    import architectures
    from controllability.errors import NotControllable
    from controllability.prover import prove as prove_block

    try:
        proof = prove_block(architectures.block(args.name), args.via, args.route)
    except NotControllable as refused:
        if not (output.as_json or args.format == "json"):
            raise
        output.as_json = True
        output.result({
            "name": args.name, "verdict": "refused", "culprit": refused.culprit, "reason": refused.reason,
            "hint": refused.hint,
        })  # fmt: skip
        return 1
    checks = proof.check(args.level)
    failed = any(c["status"] == "failed" for c in checks)
    # a level counts as reached when the whole block passed it; what was skipped was not run
    reached = args.level if checks[-1]["status"] == "passed" else "derived"
    data = {"name": args.name} | proof.to_dict() | {"level": reached, "checks": checks}
    if output.as_json or args.format == "json":
        output.as_json = True
        output.result(data)
    elif args.format == "latex":
        print(proof.to_latex(reached))
    elif args.format == "html":
        from controllability.rendering.html import proof_html

        print(proof_html(proof, args.name, reached))
    else:
        output.text(str(proof))
        if args.level != "derived":
            output.table(
                f"level {args.level}",
                ["rule", "status", "method"],
                [[c["rule"], c["status"], c["method"]] for c in checks],
            )
    return 1 if failed else 0


def patch(args: argparse.Namespace, output: Output) -> int:
    """Make the patch of a context on a model directory; verify it by applying it."""
    from controllability.cli import live

    return live.patch(args, output)


def verify(args: argparse.Namespace, output: Output) -> int:
    """Reload a patch and hold it against a fresh target run."""
    from controllability.cli import live

    return live.verify(args, output)


def demo(args: argparse.Namespace, output: Output) -> int:
    """The embedded model, with context, without, and patched."""
    from controllability.cli import demonstration

    return demonstration.demo(args, output)
