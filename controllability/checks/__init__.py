"""The levels of proof (theory, section 6): what is run at each, and what it showed.

derived    the tree follows the rules
symbolic   every rule on its own statement, and the whole block, reduced to 0 with every size a symbol
exact      the whole block on random rational numbers, roots as algebraic numbers: residual exactly 0
numeric    bfloat16, float32, float64 and 50 digits against 50 digits: the residual falls, or is 0
machine    the derivation as a certificate that the kernel of Coq (Rocq) accepts; see ``controllability.rocq``
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from controllability.arrays.lazy import np
from controllability.errors import BadInput, NotExact, SideConditionFailed, within_depth
from controllability.prover.derivation import Derivation

SAID = {
    "derived": "Derived: every rule follows from its premises; no formula and no number was evaluated.",
    "symbolic": "Checked symbolically: computer algebra reduced every difference that is listed to 0.",
    "exact": "Checked exactly: on a random instance of rational numbers the residual is exactly 0.",
    "numeric": "Checked numerically: on a random instance, in several precisions; the residual falls with them, or is 0.",
    "machine": "Machine-checked: the kernel of a proof assistant accepted the patch of this block, over the real numbers.",
}
LEVELS = tuple(SAID)


def reached(level: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The level, if every row of its checks passed: what was skipped was not shown."""
    return level if all(row["status"] == "passed" for row in rows) else "derived"


def summary(level: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the checks of a level showed, in words no stronger than that.

    >>> summary("exact", [{"status": "passed"}, {"status": "failed"}])
    'Derived: every rule follows from its premises. Of the checks of level exact: 1 passed, 1 failed.'
    """
    if reached(level, rows) == level:
        return SAID[level]
    count = Counter(row["status"] for row in rows)
    found = ", ".join(f"{n} {status}" for status, n in count.items())
    skipped = " What is marked as skipped was not shown." if count["skipped"] else ""
    return f"Derived: every rule follows from its premises. Of the checks of level {level}: {found}.{skipped}"


@within_depth
def check(proof: Derivation, level: str, seed: int = 0) -> list[dict[str, Any]]:
    """Run a level's checks: [{rule, status: passed | failed | skipped, method}], the whole block last.

    Raises ``BadInput`` for an unknown level.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.proof import prove
    >>> for row in check(prove(residual(Linear(Param("W", ("d", "d")))), via="output"), "symbolic"):
    ...     print(row["rule"], row["status"])
    theorem-1b passed
    O-linear passed
    whole block passed
    """
    if level not in LEVELS:
        raise BadInput(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    if level == "machine":
        raise BadInput("level machine is run by Proof.check: a derivation becomes a certificate there")
    if level == "derived":
        method = "applied with all its premises by the prover"
        return [{"rule": rule, "status": "passed", "method": method} for rule in proof.rules]
    if level != "symbolic" or proof.jointly:
        try:
            np.ndindex  # noqa: B018
        except ModuleNotFoundError as missing:
            raise BadInput(f"level {level} of this proof computes with arrays of explicit size: {missing}") from None
    from controllability.checks.exact_block import exact
    from controllability.checks.failing_component import told
    from controllability.checks.numeric_block import numeric
    from controllability.checks.symbolic_block import whole_block
    from controllability.checks.symbolic_joint_block import whole_block as joint_block
    from controllability.checks.symbolic_rules import rule_checks
    from controllability.execution.sampling import sample, sizes_of

    sample(proof.block, "indexed")  # a shape or a size that is not known is told in the user's own names
    if level == "numeric":
        sizes_of(proof.block)
    results = rule_checks(proof) if level == "symbolic" else []
    started = time.perf_counter()
    try:
        if level == "symbolic":
            status, method = (joint_block if proof.jointly else whole_block)(proof)
        else:
            status, method = (exact if level == "exact" else numeric)(proof, seed)
    except (NotExact, SideConditionFailed) as reason:
        status, method = "skipped", str(reason).splitlines()[0]
    except (BadInput, RecursionError):
        raise
    except Exception as reason:  # a component of somebody's own may fail in any way
        status, method = told(proof.block, reason)
    seconds = f"({time.perf_counter() - started:.1f} s)"
    return [*results, {"rule": "whole block", "status": status, "method": f"{method} {seconds}"}]
